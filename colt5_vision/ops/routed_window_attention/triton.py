"""Window ∪ routed attention by Triton: the launches. The kernels are in ``kernels.py`` and
``kernels_backward.py``."""

import math

import torch
import triton
from torch import Tensor

from .. import backend
from ..attention_layout import empty_head_last
from ..attention_steps import PAD
from ..attention_tiles import dense_rows, options_for, outer_strides
from .geometry import Geometry
from .kernels import (
    forward_kernel,
    forward_prefix_kernel,
    gather_kernel,
    list_kernel,
    window_kernel,
)
from .kernels_backward import (
    backward_list_kernel,
    backward_prefix_kernel,
    backward_query_kernel,
    backward_window_kernel,
)

_LIST_BLOCK = 256
_GATHER_BLOCK = 64
_PIECE = 512  # keys (or queries) of a program at least, where a long loop is split


def _splits(device: torch.device, programs: int, length: int, block: int) -> tuple[int, int]:
    """In how many pieces, of what length, to cut loops of ``length`` so that few programs fill the
    device."""
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    pieces = max(1, min(4 * processors // max(1, programs), length // _PIECE))
    piece = max(block, triton.cdiv(triton.cdiv(length, pieces), block) * block)
    return triton.cdiv(length, piece), piece


class _Call:
    """What forward and backward share: sizes, and the lists that the kernels walk (see
    ``kernels.py``)."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routed: Tensor,
        log_weights: Tensor | None,
        key_mask: Tensor | None,
        query_indices: Tensor | None,
        geo: Geometry,
        others: tuple[Tensor, ...] = (),
        *,
        backward: bool,
    ):
        device = q.device
        self.geo = geo
        self.batch, self.heads, self.length, self.head_dim = q.shape
        self.align = math.gcd(
            8, self.head_dim, *outer_strides(q, k, v, *others)
        )  # 8 halves are 16 bytes
        self.routes, self.num_routed = routed.shape[1:]
        self.pairs, self.share = self.batch * self.heads, self.heads // self.routes
        self.listed = geo.prefix + self.num_routed
        self.columns = triton.cdiv(geo.width, geo.window[1])
        self.windows = triton.cdiv(geo.height, geo.window[0]) * self.columns
        self.area = geo.window[0] * geo.window[1]
        self.key_mask = None if key_mask is None else key_mask.contiguous()
        self.own_bias = log_weights is not None and geo.weight_own_window and self.num_routed > 0

        # the lists of keys and biases, see kernels.py
        rows, listed = self.batch * self.routes, triton.cdiv(self.listed, PAD.value) * PAD.value
        self.keys = torch.empty(rows, geo.tokens, dtype=torch.int32, device=device)
        self.biases = torch.empty(self.keys.shape, device=device) if self.own_bias else None
        self.list_keys = torch.empty(rows, listed, dtype=torch.int32, device=device)
        self.list_biases = torch.empty(rows, listed, dtype=torch.float32, device=device)
        self.list_window = torch.empty_like(self.list_keys)
        self.row_window = torch.empty(self.length, dtype=torch.int32, device=device)
        self.own_slot = None
        if self.own_bias or (backward and self.num_routed):
            self.own_slot = torch.full((rows, geo.tokens), -1, dtype=torch.int32, device=device)

        # written: what every query sees, then the windows
        grid = (
            geo.tokens,
            geo.height,
            geo.width,
            *geo.window,
            self.columns,
            geo.prefix,
            self.listed,
        )
        flags = {"HAS_MASK": key_mask is not None, "BLOCK": _LIST_BLOCK}
        if self.listed:
            tiles = triton.cdiv(listed, _LIST_BLOCK)
            weights = None if log_weights is None else log_weights.contiguous()
            backend.launch(
                list_kernel, (rows * tiles,), routed.contiguous(), weights, self.key_mask,
                self.list_keys, self.list_biases, self.list_window, self.own_slot, *grid,
                self.num_routed, tiles, self.routes,
                HAS_WEIGHTS=weights is not None, MAP=self.own_slot is not None, **flags,
            )  # fmt: skip
        tiles = triton.cdiv(self.length, _LIST_BLOCK)
        backend.launch(
            window_kernel, (rows * tiles,), self.key_mask, self.keys, self.biases,
            self.list_biases, self.own_slot, self.row_window,
            *grid, tiles, self.routes, OWN_BIAS=self.own_bias, **flags,
        )  # fmt: skip

        # the lists of queries: of all tokens those of keys, else the chosen ones by window
        self.query_indices, self.starts = query_indices, None
        self.query_rows = self.query_positions = self.keys
        self.query_share, self.query_row = self.share, geo.tokens
        self.rows = self.length
        if query_indices is not None:
            self.query_indices = query_indices.contiguous()
            # gather checks both bounds on the device; an index would wrap around below 0
            window = self.row_window[geo.prefix :].expand(self.batch, -1).gather(-1, query_indices)
            window, order = window.sort(dim=-1, stable=True)
            every = torch.arange(self.windows + 1, dtype=torch.int32, device=device).expand(
                self.batch, -1
            )
            self.starts = torch.searchsorted(window, every.contiguous(), out_int32=True)
            self.query_rows = (geo.prefix + order).to(torch.int32)
            self.query_positions = (geo.prefix + query_indices.gather(-1, order)).to(torch.int32)
            self.query_share, self.query_row = self.heads, query_indices.shape[1]
            self.rows = geo.prefix + query_indices.shape[1]

        # what every query sees, gathered: copied once, read by all windows
        self.list_k, self.list_v = (
            x.new_empty(self.batch, self.heads, listed, self.head_dim) for x in (k, v)
        )
        tiles = listed // _GATHER_BLOCK
        backend.launch(
            gather_kernel, (self.pairs * tiles,), k, v, self.list_keys, self.list_k, self.list_v,
            *self.strides(k, v), self.heads, self.share, self.listed, tiles,
            BLOCK=_GATHER_BLOCK, **self.flags(),
        )  # fmt: skip

    def lists(self) -> list[Tensor | None]:
        """keys ... list_v, as the kernels over queries take them."""
        return [
            self.keys, self.biases, self.list_biases, self.list_window, self.list_k, self.list_v,
        ]  # fmt: skip

    def queries(self) -> list[Tensor | None]:
        return [self.query_rows, self.query_positions, self.starts]

    def sizes(self) -> list[int]:
        """heads ... rows, as the kernels over windows take them."""
        geo = self.geo
        return [
            self.heads, self.share, self.query_share, self.query_row, geo.tokens, geo.height,
            geo.width, *geo.window,
            self.columns, self.windows, self.listed, self.rows,
        ]  # fmt: skip

    def flags(self, *names: str) -> dict[str, int | bool]:
        """The compile-time arguments: the width of a head, what divides all strides, and those
        named."""
        every = {
            "HAS_MASK": self.key_mask is not None,
            "OWN_BIAS": self.own_bias,
            "SUBSET": self.query_indices is not None,
            "HAS_ROUTED": self.num_routed > 0,
        }
        block = max(16, triton.next_power_of_2(self.head_dim))
        return {"HEAD_DIM": self.head_dim, "BLOCK_D": block, "ALIGN": self.align} | {
            name: every[name] for name in names
        }

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of (B, heads, L, D), those of all but D, in units of ``align``."""
        return [stride // self.align for stride in outer_strides(*tensors)]

    def tiles(self, block: int) -> tuple[int, int]:
        """Tiles of all windows, and of one."""
        each = triton.cdiv(self.area, block)
        return self.windows * each, each


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    query_indices: Tensor | None,
    geo: Geometry,
) -> tuple[Tensor, Tensor]:
    """As ``eager.forward``."""
    q, k, v = (dense_rows(x) for x in (q, k, v))
    call = _Call(q, k, v, routed, log_weights, key_mask, query_indices, geo, backward=False)
    out = empty_head_last(q, call.rows)
    lse = torch.empty(call.batch, call.heads, call.rows, dtype=torch.float32, device=q.device)
    scale2 = geo.scale / math.log(2)

    # queries of the map
    options = options_for("forward", q, call.area, max(call.area, call.listed))
    tiles, per_window = call.tiles(options["BLOCK_M"])
    backend.launch(
        forward_kernel, (call.pairs * tiles,), q, k, v, out, lse, *call.lists(),
        *call.queries(), *call.strides(q, k, v, out), scale2, *call.sizes(), tiles, per_window,
        **call.flags("SUBSET", "OWN_BIAS"), **options,
    )  # fmt: skip

    # the prefix, its keys split over programs and joined by their logsumexps
    if geo.prefix:
        options = options_for("forward", q, geo.prefix, call.length)
        tiles = triton.cdiv(geo.prefix, options["BLOCK_M"])
        splits, per_split = _splits(q.device, call.pairs * tiles, call.length, options["BLOCK_N"])
        part_lse = torch.empty(
            splits, call.batch, call.heads, geo.prefix, dtype=torch.float32, device=q.device
        )
        part = torch.empty(*part_lse.shape, call.head_dim, dtype=torch.float32, device=q.device)
        backend.launch(
            forward_prefix_kernel, (call.pairs * splits * tiles,), q, k, v, part, part_lse,
            call.key_mask,
            *call.strides(q, k, v), scale2, call.heads, geo.tokens, geo.prefix, tiles, splits,
            per_split,
            **call.flags("HAS_MASK"), **options,
        )  # fmt: skip
        total = part_lse.logsumexp(0)
        none = total == -math.inf
        share = (part_lse - total.masked_fill(none, 0)).exp()
        out[:, :, : geo.prefix] = (share.unsqueeze(-1) * part).sum(0)
        lse[:, :, : geo.prefix] = total.masked_fill(none, math.inf)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    query_indices: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geo: Geometry,
    with_log_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``eager.backward``."""
    grad, q, k, v, out = (dense_rows(x) for x in (grad, q, k, v, out))
    lse = lse.contiguous()
    call = _Call(
        q, k, v, routed, log_weights, key_mask, query_indices, geo, (out, grad), backward=True
    )
    batch, heads, length, head_dim = q.shape
    wide = {"dtype": torch.float32, "device": q.device}
    grad_q, grad_k, grad_v = (empty_head_last(x, length) for x in (q, k, v))
    if query_indices is not None:
        grad_q.zero_()  # a token that does not query gets no gradient as a query
    delta = torch.empty_like(lse)
    scales = (geo.scale, geo.scale / math.log(2))

    # queries of the map
    options = options_for("backward_query", q, call.area, max(call.area, call.listed))
    tiles, per_window = call.tiles(options["BLOCK_M"])
    backend.launch(
        backward_query_kernel, (call.pairs * tiles,), q, k, v, out, grad, lse, delta, grad_q,
        *call.lists(), *call.queries(), *call.strides(q, k, v, out, grad, grad_q), *scales,
        *call.sizes(), tiles, per_window, **call.flags("SUBSET", "OWN_BIAS"), **options,
    )  # fmt: skip

    # the prefix as queries
    if geo.prefix:
        options = options_for("backward_query", q, geo.prefix, length)
        tiles = triton.cdiv(geo.prefix, options["BLOCK_M"])
        splits, per_split = _splits(q.device, call.pairs * tiles, length, options["BLOCK_N"])
        part = torch.empty(splits, batch, heads, geo.prefix, head_dim, **wide)
        backend.launch(
            backward_prefix_kernel, (call.pairs * splits * tiles,), q, k, v, out, grad, lse, delta,
            part,
            call.key_mask, *call.strides(q, k, v, out, grad), *scales, heads, geo.tokens,
            geo.prefix, call.rows, tiles,
            splits, per_split, **call.flags("HAS_MASK"), **options,
        )  # fmt: skip
        grad_q[:, :, : geo.prefix] = part.sum(0)

    # prefix and routed keys, from queries beyond their window
    part_k = part_v = part_bias = grad_bias = None
    splits = 0
    if call.listed:
        options = options_for("backward_keys", q, call.rows, call.listed)
        tiles = triton.cdiv(call.listed, options["BLOCK_N"])
        splits, per_split = _splits(q.device, call.pairs * tiles, call.rows, options["BLOCK_M"])
        part_k = torch.empty(splits, batch, heads, call.listed, head_dim, **wide)
        part_v, part_bias = torch.empty_like(part_k), torch.empty(part_k.shape[:-1], **wide)
        backend.launch(
            backward_list_kernel, (call.pairs * splits * tiles,), q, k, v, grad, lse, delta,
            part_k, part_v, part_bias,
            call.list_keys, call.list_biases, call.list_window, call.query_indices,
            call.row_window,
            *call.strides(q, k, v, grad), *scales, heads, call.share, geo.tokens, geo.prefix,
            call.listed, call.rows,
            tiles, splits, per_split, **call.flags("SUBSET"), **options,
        )  # fmt: skip
        grad_bias = torch.zeros(
            batch, heads, call.num_routed, **wide
        )  # an empty slot is no token's
        if geo.prefix:
            grad_k[:, :, : geo.prefix] = part_k[:, :, :, : geo.prefix].sum(0)
            grad_v[:, :, : geo.prefix] = part_v[:, :, :, : geo.prefix].sum(0)

    # all keys of the map, with what came from beyond
    options = options_for("backward_keys", q, max(call.area, geo.prefix), call.area)
    tiles, per_window = call.tiles(options["BLOCK_N"])
    backend.launch(
        backward_window_kernel, (call.pairs * tiles,), q, k, v, grad, lse, delta, grad_k, grad_v,
        grad_bias, part_k,
        part_v, part_bias, call.keys, call.biases, call.own_slot, *call.queries(),
        *call.strides(q, k, v, grad, grad_k, grad_v), *scales, *call.sizes(), geo.prefix, tiles,
        per_window, splits,
        **call.flags("SUBSET", "HAS_ROUTED", "OWN_BIAS"), **options,
    )  # fmt: skip
    if log_weights is None or not with_log_weights:
        return grad_q, grad_k, grad_v, None
    if grad_bias is None:
        return grad_q, grad_k, grad_v, torch.zeros_like(log_weights)
    grad_log_weights = grad_bias.unflatten(1, (call.routes, -1)).sum(2)
    return grad_q, grad_k, grad_v, grad_log_weights.to(log_weights.dtype)
