"""CoLT5's two branches: light attention of every token, heavy attention of the routed ones."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ._torch_internals import is_plain
from .band import band_attention
from .ops import gather_normalize, window_attention
from .ops.backend import needs_operator
from .ops.sdpa import scaled_dot_product_attention
from .positions import axial_rotary, rotary, rows_and_columns
from .routing import Routing, gather_tokens


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, head_dim) -> (B, N, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def normalized_rows(
    norm: nn.Module, x: Tensor, indices: Tensor | None, filled: Tensor | None = None
) -> Tensor:
    """``norm`` of the tokens of x (B, N, C) at ``indices`` (B, ...); None: of all of them.

    Rows where ``filled`` (B, ...) is False are 0 before: what lies under a mask is never read.
    """
    if indices is None:
        return norm(x)
    fused = filled is None and needs_operator(x) and is_plain(norm, nn.RMSNorm)
    if fused and norm.weight is not None and norm.eps is not None:
        return gather_normalize(x, indices, norm.weight, eps=norm.eps)
    rows = gather_tokens(x, indices)
    return norm(rows if filled is None else torch.where(filled.unsqueeze(-1), rows, 0))


class LightBranch(nn.Module):
    """The light branch: attention of every token to those near it.

        x (B, N, C) ─ norm ─ to_qkv ─ in its window of a map, in its band of a line ─ to_out

    Args:
        dim: width C.
        heads, dim_head: number of heads and width of each.
        norm: applied first, to (..., C).
        window_size: (height, width) of the windows of a map; None: made for sequences.
        reach: tokens seen on either side in a sequence; None: made for maps.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        norm: nn.Module,
        *,
        window_size: tuple[int, int] | None = None,
        reach: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.window_size, self.reach = heads, window_size, reach
        self.norm = norm
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)
        self.start_small()

    @torch.no_grad()
    def start_small(self) -> None:
        """Scale fresh outputs down.

        At first both branches are means of random values. What is near a token differs from token
        to token. It would drown what a few routed tokens tell all of them, and the heavy branch and
        its router would learn nothing.
        """
        for parameter in self.to_out.parameters():
            parameter.mul_(0.2)

    def reset_parameters(self) -> None:
        """Draw the projections anew."""
        self.to_qkv.reset_parameters()
        self.to_out.reset_parameters()
        self.start_small()

    def forward(self, x: Tensor, grid_size: tuple[int, int] | None, mask: Tensor | None) -> Tensor:
        """x (B, N, C), a map of ``grid_size`` or a line (None), mask (B, N) -> (B, N, C)."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, d)
        if grid_size is None:
            return self.to_out(band_attention(qkv, self.reach, mask))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d)
        window = {"grid_size": grid_size, "window_size": self.window_size}
        return self.to_out(merge_heads(window_attention(q, k, v, key_mask=mask, **window)))


class NullKey(nn.Module):
    """A learned key and value that every query may attend to; with nothing routed it is all there
    is.

    Both start at 0, so that an empty selection gives 0.
    """

    def __init__(self, heads: int, dim_head: int, *, device=None, dtype=None):
        super().__init__()
        self.kv = nn.Parameter(torch.empty(2, heads, dim_head, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.kv)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """(2, heads, head_dim): key and value."""
        return self.kv.to(dtype)


class HeavyBranch(nn.Module):
    """The heavy branch: routed tokens, or all, attend to routed tokens and to one null key.

        x ─ rows of routed queries ─ norm ─ to_q  ─ · gate ─ rotate ─┐
                                                                     ├─ attention ─ to_out
        x ─ rows of routed keys ──── norm ─ to_kv ─ · gate ─ rotate ─┘
                                                    null key, value

    The heads are split over the R routes of keys.

    Args:
        dim: width C.
        heads, dim_head: number of heads and width of each.
        routes: R, sets of routed keys.
        multiply_keys_by_score, multiply_queries_by_score: gates scale the keys (queries) too, not
            only the values.
        rotary_emb: rotary positions: axial ones of a map, plain ones of a line.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        *,
        routes: int = 1,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        rotary_emb: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.routes, self.rotary_emb = heads, routes, rotary_emb
        self.multiply_keys_by_score = multiply_keys_by_score
        self.multiply_queries_by_score = multiply_queries_by_score
        self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
        self.null_key = NullKey(heads, dim_head, **factory)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        # outputs in the order route, head of the route, key and value
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        routed_q: Routing | None,
        routed_kv: Routing | None,
        *,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C), what asks.
            routed_q: which tokens of x ask, fields (B, Q). None: all of them.
            routed_kv: which tokens are read, fields (B, R, K). None: all, by every head.
            context: (B, M, C), what is read. None: x.
            key_mask: (B, R, K) bool, False where a key must not be read.
            grid_size: (H, W) of a map, for positions. None: a line.

        Returns:
            (B, Q, C).
        """
        context = x if context is None else context
        q = self._queries(x, routed_q)  # (B, heads, Q, head_dim)
        k, v = self._keys_and_values(context, routed_kv, key_mask)  # (B, heads, K, head_dim)

        # positions
        if self.rotary_emb:
            q = self._rotate(q, None if routed_q is None else routed_q.indices[:, None], grid_size)
            k = self._rotate(k, None if routed_kv is None else routed_kv.indices, grid_size)

        # the null key in front
        null_k, null_v = self.null_key(v.dtype).unsqueeze(2)  # (heads, 1, head_dim)
        k = torch.cat([null_k.expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([null_v.expand(v.shape[0], -1, -1, -1), v], 2)
        seen = None
        if key_mask is not None:
            seen = self._per_head(pad(key_mask, (1, 0), value=True)).unsqueeze(2)

        return self.to_out(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=seen)))

    def _queries(self, x: Tensor, routed: Routing | None) -> Tensor:
        """(B, heads, Q, head_dim) of the routed tokens, or of all."""
        rows = normalized_rows(self.norm, x, None if routed is None else routed.indices)
        q = split_heads(self.to_q(rows), self.heads)
        if routed is not None and self.multiply_queries_by_score:
            q = q * routed.gates.to(q.dtype)[:, None, :, None]
        return q

    def _keys_and_values(
        self, context: Tensor, routed: Routing | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both (B, heads, K, head_dim): each route's tokens for the heads of that route."""
        if routed is None:
            rows = self.norm(context).unsqueeze(1)  # (B, 1, M, C)
        else:
            rows = normalized_rows(self.norm, context, routed.indices, key_mask)  # (B, R, K, C)
        kv = self.to_kv(rows).unflatten(-1, (self.routes, self.heads // self.routes, 2, -1))
        kv = torch.stack([kv[:, r, :, r] for r in range(self.routes)], 1)  # (B, R, K, H / R, 2, d)
        k, v = kv.transpose(2, 3).flatten(1, 2).unbind(3)

        if routed is not None:
            gates = self._per_head(routed.gates.to(v.dtype)).unsqueeze(-1)
            v = v * gates
            k = k * gates if self.multiply_keys_by_score else k
        return k, v

    def _per_head(self, x: Tensor) -> Tensor:
        """(B, R, K) -> (B, heads, K)."""
        return x.repeat_interleave(self.heads // self.routes, 1)

    def _rotate(
        self, x: Tensor, indices: Tensor | None, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Turn x (B, heads, K, head_dim) by the places of its tokens, ``indices`` (B, 1 | R, K)."""
        if indices is None:
            indices = torch.arange(x.shape[2], device=x.device)
        elif indices.shape[1] > 1:
            indices = self._per_head(indices)
        if grid_size is None:
            return rotary(x, indices)
        return axial_rotary(x, rows_and_columns(indices, grid_size[1]))
