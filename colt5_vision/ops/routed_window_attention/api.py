"""Window ∪ routed attention as one operator: checks, registration, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._torch_internals import (
    has_values,
    in_onnx_export,
    is_transformed,
    wants_plain_attention,
)
from ...checks import check_float_tensor, check_int, check_pair
from ..attention_checks import (
    check_indices,
    check_qkv,
    checked_mask,
    checked_scale,
    takes_attention_kernels,
)
from ..attention_layout import empty_head_last, head_last
from ..autocast import without_autocast
from ..backend import check_backend, needs_operator, takes_transform
from ..dtypes import wide_dtype
from ..registration import count_flops, once_differentiable, operator, overridable
from . import eager
from .gathered import PairBias, gathered_attention
from .geometry import Geometry

NAME = "routed_window_attention"
_WAY_OUT = (
    "call it with backend='eager' within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), "
    "which takes a plain path"
)


def _geometry(grid: Sequence[int], scale: float) -> Geometry:
    prefix, height, width, window_height, window_width, weight_own_window = grid
    return Geometry(
        prefix, height, width, (window_height, window_width), scale, bool(weight_own_window)
    )


def _implementation(q: Tensor, backend: str):
    if takes_attention_kernels(NAME, q, backend):
        from . import triton

        return triton
    return eager


@operator("routed_window_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    query_indices: Tensor | None,
    grid: Sequence[int],
    scale: float,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    forward = _implementation(q, backend).forward
    with torch.autocast(q.device.type, enabled=False):
        out, lse = forward(
            q, k, v, routed, log_weights, key_mask, query_indices, _geometry(grid, scale)
        )
    return head_last(out), lse.contiguous()


@_attention.register_fake
def _(q, k, v, routed, log_weights, key_mask, query_indices, grid, scale, backend=""):
    length = q.shape[2] if query_indices is None else grid[0] + query_indices.shape[1]
    wide = wide_dtype(q)
    return empty_head_last(q, length), q.new_empty(q.shape[0], q.shape[1], length, dtype=wide)


@operator("routed_window_attention_backward")
def _attention_backward(
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
    grid: Sequence[int],
    scale: float,
    backend: str = "",
    with_log_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = _implementation(q, backend).backward
    with torch.autocast(q.device.type, enabled=False):
        grad_q, grad_k, grad_v, grad_log_weights = backward(
            grad,
            q,
            k,
            v,
            routed,
            log_weights,
            key_mask,
            query_indices,
            out,
            lse,
            _geometry(grid, scale),
            with_log_weights,
        )
    if grad_log_weights is None:
        grad_log_weights = q.new_empty(0)
    return head_last(grad_q), head_last(grad_k), head_last(grad_v), grad_log_weights.contiguous()


@_attention_backward.register_fake
def _(
    grad,
    q,
    k,
    v,
    routed,
    log_weights,
    key_mask,
    query_indices,
    out,
    lse,
    grid,
    scale,
    backend="",
    with_log_weights=True,
):
    none = log_weights is None or not with_log_weights
    grad_log_weights = q.new_empty(0) if none else torch.empty_like(log_weights).contiguous()
    return (*(empty_head_last(x, x.shape[2]) for x in (q, k, v)), grad_log_weights)


def _setup(ctx, inputs, output):
    q, k, v, routed, log_weights, key_mask, query_indices, ctx.grid, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, routed, log_weights, key_mask, query_indices, *output)


def _backward(ctx, grad, _):
    if is_transformed(grad):
        raise NotImplementedError(
            f"{NAME}: its gradient has no forward-mode derivative; {_WAY_OUT}"
        )
    weighted = ctx.needs_input_grad[4]
    grads = _attention_backward(
        grad, *ctx.saved_tensors, ctx.grid, ctx.scale, ctx.backend, weighted
    )
    grad_log_weights = grads[3] if weighted else None
    return *grads[:3], None, grad_log_weights, None, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def _seen_pairs(length: int, routed: int, grid: Sequence[int]) -> int:
    """Pairs of a query and a key in one head; ``length``: rows of the result, prefix included."""
    prefix, height, width, window_height, window_width, _ = grid

    def squares(size: int, window: int) -> int:
        return size // window * window**2 + (size % window) ** 2

    own = squares(height, window_height) * squares(width, window_width)  # if all tokens query
    queries, tokens = length - prefix, height * width
    return queries * own // tokens + queries * (prefix + routed) + prefix * (prefix + tokens)


def _flops(q, k, v, routed, log_weights, key_mask, query_indices, grid, *args, **kwargs) -> int:
    """Two matrix products over the pairs that see each other."""
    length = q[2] if query_indices is None else grid[0] + query_indices[1]
    return 4 * q[0] * q[1] * q[3] * _seen_pairs(length, routed[-1], grid)


def _flops_backward(
    grad, q, k, v, routed, log_weights, key_mask, query_indices, out, lse, grid, *args, **kwargs
) -> int:
    """Five matrix products: the logits once more, and four gradients."""
    return 5 * _flops(q, k, v, routed, log_weights, key_mask, query_indices, grid) // 2


once_differentiable(
    _attention_backward, f"{NAME}: cannot be differentiated twice by its fused kernels; {_WAY_OUT}"
)
count_flops(NAME, _flops)
count_flops(f"{NAME}_backward", _flops_backward)


def _check_map(q: Tensor, k: Tensor, v: Tensor, grid_size, window_size, prefix) -> list[int]:
    """[prefix, height, width, window height, window width] of a checked map."""
    check_qkv(q, k, v)
    height, width = check_pair("grid_size", grid_size)
    window = check_pair("window_size", window_size)
    prefix = check_int("num_prefix_tokens", prefix, minimum=0)
    if q.shape[2] != prefix + height * width:
        raise ValueError(
            f"grid_size: expected {prefix} prefix tokens + {height} * {width} = "
            f"{q.shape[2]} tokens of q"
        )
    return [prefix, height, width, min(window[0], height), min(window[1], width)]


def _checked_routes(
    routed: Tensor | None, log_weights: Tensor | None, q: Tensor, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Checked routed indices and their log weights, both (B, R, K)."""
    batch, heads = q.shape[:2]
    if routed is None:
        if log_weights is not None:
            raise ValueError("log_weights: given without routed_indices")
        return torch.empty(batch, 1, 0, dtype=torch.int64, device=q.device), None

    # shapes
    check_indices("routed_indices", routed, tokens, -1)
    if routed.ndim not in (2, 3) or routed.shape[0] != batch or 0 in routed.shape[1:-1]:
        raise ValueError(
            f"routed_indices: expected shape ({batch}, K) or ({batch}, R, K), "
            f"got {tuple(routed.shape)}"
        )
    if log_weights is not None:
        check_float_tensor("log_weights", log_weights)
        if log_weights.shape != routed.shape:
            raise ValueError(
                f"log_weights: expected the shape of routed_indices, {tuple(routed.shape)}, "
                f"got {tuple(log_weights.shape)}"
            )

    # with a dimension of routes
    if routed.ndim == 2:
        routed = routed.unsqueeze(1)
        log_weights = None if log_weights is None else log_weights.unsqueeze(1)
    if heads % routed.shape[1]:
        raise ValueError(
            f"routed_indices: {heads} heads are not divisible by {routed.shape[1]} routes"
        )
    return routed, log_weights


def _check_queries(query_indices: Tensor, batch: int, tokens: int) -> None:
    check_indices("query_indices", query_indices, tokens, 0)
    if query_indices.ndim != 2 or query_indices.shape[0] != batch:
        raise ValueError(
            f"query_indices: expected shape ({batch}, Q), got {tuple(query_indices.shape)}"
        )
    if has_values(query_indices):
        repeated = query_indices.sort(-1).values.diff(dim=-1) == 0
        if bool(repeated.any()):
            raise ValueError(
                "query_indices: expected distinct entries within a row, got repeated ones"
            )


def _takes_plain_path(q: Tensor, backend: str | None, pair_bias, *others: Tensor | None) -> bool:
    """Whether a call is plain torch throughout, logits held: what the fused kernels cannot do."""
    check_backend(backend)
    if pair_bias is not None and backend == "triton":
        raise RuntimeError(f"{NAME}: backend 'triton' cannot run: the kernels take no pair_bias")
    if pair_bias is not None or in_onnx_export(q) or takes_transform(NAME, backend, q, *others):
        return True
    return (backend == "eager" or not needs_operator(q)) and wants_plain_attention()


@overridable
def routed_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: int | tuple[int, int],
    window_size: int | tuple[int, int],
    routed_indices: Tensor | None = None,
    log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    query_indices: Tensor | None = None,
    pair_bias: PairBias | None = None,
    weight_own_window: bool = True,
    backend: str | None = None,
) -> Tensor:
    """One softmax over the keys of a token's own window and a few routed keys of the whole map.

    Equals dense attention under the mask ``window ∪ routed`` (a routed key inside the window counts
    once), hence full attention when every token is routed. Computed as a window part and a routed
    part joined by their logsumexps; the backward calls each part's fused backward with the global
    output and logsumexp. Time O(N (w² + K)), memory O(N).

    Args:
        q, k, v: (B, heads, P + N, head_dim), P prefix tokens (class, registers, text), then N = H *
            W in raster order. Prefix tokens attend to every token and every token attends to them.
        grid_size: (H, W).
        window_size: side of the windows in tokens, or (height, width); windows at the border are
            smaller.
        routed_indices: (B, K) or (B, R, K) int64 raster indices in [0, N), distinct within a row;
            -1 is an empty slot. With R routes, the heads are split into R groups of neighbours.
            None: window (and prefix) attention alone.
        log_weights: same shape, added to the logits of the routed keys, differentiable; -inf
            removes the key, whatever stands in it. None: 0.
        key_mask: (B, N) or (B, P + N) bool, True = may be attended to. A query without any key gets
            0.
        num_prefix_tokens: P.
        scale: factor of the logits, default head_dim ** -0.5.
        query_indices: (B, Q) int64 raster indices, distinct within a row: only these tokens (and
            the prefix) query; None: all of them.
        pair_bias: a function of query and key, for relative positions: given positions in [0, P +
            N) of queries, (1, 1, G, L, 1), and of keys, (B or 1, heads or 1, G, 1, S), it returns
            what is added to their logits, broadcastable to (B, heads, G, L, S). Differentiable.
            Only pairs that see each other are asked for; logits are then held, O(N (w² + K)) of
            them, a few windows at a time.
        weight_own_window: whether ``log_weights`` hold for queries in the key's own window as well.
            False, for a key whose weight stands for tokens that were left out: in its own window
            none was.
        backend: ``"eager"`` (plain torch), ``"triton"`` (one kernel: float16 or bfloat16, head_dim
            up to 256, CUDA or ROCm) or ``"auto"`` (Triton where it can run). None: the environment
            variable ``COLT5_VISION_BACKEND``, else ``"auto"``. ``pair_bias`` is always plain torch.

    Returns:
        (B, heads, P + N, head_dim), or (B, heads, P + Q, head_dim) with ``query_indices``; the
        dtype of ``q``.

    Raises:
        TypeError, ValueError: for bad arguments.
        RuntimeError: ``"triton"`` was asked for and cannot run, with the reason.

    Source: CoLT5 (arXiv 2303.09752) with one shared softmax; joining by logsumexp as in ring
        attention (arXiv 2310.01889).
    """
    # checks
    prefix, height, width, *window = _check_map(q, k, v, grid_size, window_size, num_prefix_tokens)
    tokens = height * width
    routed, log_weights = _checked_routes(routed_indices, log_weights, q, tokens)
    key_mask = checked_mask(key_mask, q, prefix)
    if query_indices is not None:
        _check_queries(query_indices, q.shape[0], tokens)
    scale = checked_scale(scale, q.shape[-1])
    if not isinstance(weight_own_window, bool):
        raise TypeError(f"weight_own_window: expected a bool, got {weight_own_window!r}")
    everywhere = weight_own_window or log_weights is None  # the same without weights
    grid = [prefix, height, width, *window, int(everywhere)]

    # the operator, fused
    if not _takes_plain_path(q, backend, pair_bias, k, v, log_weights):
        return _attention(
            q, k, v, routed, log_weights, key_mask, query_indices, grid, scale, backend or ""
        )[0]

    # plain torch
    with without_autocast(q.device.type):
        out = gathered_attention(
            q,
            k,
            v,
            routed,
            log_weights,
            key_mask,
            pair_bias,
            _geometry(grid, scale),
            whole=in_onnx_export(q),
        )
    if query_indices is None:
        return out
    index = (query_indices + prefix).unsqueeze(1).unsqueeze(-1)
    chosen = out.gather(2, index.expand(-1, q.shape[1], -1, q.shape[-1]))
    return torch.cat([out[:, :, :prefix], chosen], 2)


@overridable
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: int | tuple[int, int],
    window_size: int | tuple[int, int],
    key_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each token to its own window (and the prefix tokens):
    :func:`routed_window_attention`, nothing routed.

    Arguments, shapes, return value and errors are those of :func:`routed_window_attention`.

    Source: local attention as CoLT5's light branch (arXiv 2303.09752), in 2-D windows (Swin, arXiv
        2103.14030).
    """
    return routed_window_attention(
        q,
        k,
        v,
        grid_size=grid_size,
        window_size=window_size,
        key_mask=key_mask,
        num_prefix_tokens=num_prefix_tokens,
        scale=scale,
        backend=backend,
    )
