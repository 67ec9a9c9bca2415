"""Attention of groups of queries to their own keys as one operator: checks, registration,
autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch_internals import (
    has_values,
    in_onnx_export,
    is_transformed,
    wants_plain_attention,
)
from ...checks import check_float_tensor, check_int
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
from .call import Call

NAME = "grouped_attention"
_WAY_OUT = (
    "call it with backend='eager' within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), "
    "which takes a plain path"
)


class PooledKeys(NamedTuple):
    """Keys of a group that stand for several, C of them a head.

    Attributes:
        keys: (B, heads, G, C, head_dim), in the dtype of q.
        values: the same.
        log_mass: (B, heads, G, C), added to their logits: the log of how many keys each stands
            for, or more, as float32 can hold it in any dtype of q. -inf: none.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor


def _implementation(q: Tensor, backend: str):
    if takes_attention_kernels(NAME, q, backend):
        from . import triton

        return triton
    return eager


@operator("grouped_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    pooled_keys: Tensor | None,
    pooled_values: Tensor | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    prefix: int,
    scale: float,
    backend: str = "",
) -> tuple[Tensor, Tensor]:
    pooled = (pooled_keys, pooled_values, log_mass)
    call = Call(q, k, v, groups, keys, log_weights, *pooled, key_mask, prefix, scale)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _implementation(q, backend).forward(call)
    return head_last(out), lse.contiguous()


@_attention.register_fake
def _(q, k, v, groups, keys, log_weights, pooled_keys, pooled_values, log_mass, key_mask, *_):
    return empty_head_last(q), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


@operator("grouped_attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    pooled_keys: Tensor | None,
    pooled_values: Tensor | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    prefix: int,
    scale: float,
    backend: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pooled = (pooled_keys, pooled_values, log_mass)
    call = Call(q, k, v, groups, keys, log_weights, *pooled, key_mask, prefix, scale)
    with torch.autocast(q.device.type, enabled=False):
        grads = _implementation(q, backend).backward(grad, out, lse, call)
    further = (log_weights, *pooled)
    return *(head_last(x) for x in grads[:3]), *(
        q.new_empty(0) if like is None else x.to(like.dtype).contiguous()
        for like, x in zip(further, grads[3:])
    )


@_attention_backward.register_fake
def _(grad, q, k, v, groups, keys, log_weights, pooled_keys, pooled_values, log_mass, *_):
    further = (log_weights, pooled_keys, pooled_values, log_mass)
    return *(empty_head_last(x) for x in (q, k, v)), *(
        q.new_empty(0) if like is None else like.new_empty(like.shape) for like in further
    )


def _setup(ctx, inputs, output):
    *tensors, ctx.prefix, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    if is_transformed(grad):
        raise NotImplementedError(
            f"{NAME}: its gradient has no forward-mode derivative; {_WAY_OUT}"
        )
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.prefix, ctx.scale, ctx.backend)
    further = (x if need else None for x, need in zip(grads[3:], ctx.needs_input_grad[5:9]))
    return *grads[:3], None, None, *further, None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup)


def _flops(
    q, k, v, groups, keys, log_weights, pooled_keys, values, log_mass, mask, prefix, *_, **__
) -> int:
    """Two matrix products over the pairs that see each other."""
    batch, heads, length, dim = q
    pooled = 0 if pooled_keys is None else pooled_keys[3]
    pairs = groups[2] * groups[3] * (prefix + keys[3] + pooled) + prefix * length
    return 4 * batch * heads * dim * pairs


def _flops_backward(grad, *args, out_shape=None, **kwargs) -> int:
    """Five matrix products: the logits once more, and four gradients."""
    tensors, prefix = args[:10], args[12]
    return 5 * _flops(*tensors, prefix) // 2


once_differentiable(
    _attention_backward, f"{NAME}: cannot be differentiated twice by its fused kernels; {_WAY_OUT}"
)
count_flops(NAME, _flops)
count_flops(f"{NAME}_backward", _flops_backward)


def _checked_groups(
    groups: Tensor, keys: Tensor, log_weights: Tensor | None, q: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked indices and log weights, all of (B, R, G, ...)."""
    # shapes
    batch, heads = q.shape[:2]
    for name, x, slots in (("query_groups", groups, "L"), ("key_indices", keys, "M")):
        check_indices(name, x, tokens, -1)
        if x.ndim != 4 or x.shape[0] not in (1, batch) or x.shape[1] < 1 or heads % x.shape[1]:
            raise ValueError(
                f"{name}: expected shape (1 or {batch}, R, G, {slots}) with R that divides "
                f"{heads} heads, got {tuple(x.shape)}"
            )

    # keys and weights of every group
    if groups.shape[2] != keys.shape[2]:
        raise ValueError(
            f"key_indices: expected the {groups.shape[2]} groups of query_groups, got "
            f"{keys.shape[2]}"
        )
    if log_weights is not None:
        check_float_tensor("log_weights", log_weights)
        if log_weights.shape != keys.shape:
            raise ValueError(
                f"log_weights: expected the shape of key_indices, {tuple(keys.shape)}, got "
                f"{tuple(log_weights.shape)}"
            )

    # routes
    routes = max(groups.shape[1], keys.shape[1])
    if any(routes % x.shape[1] for x in (groups, keys)):
        raise ValueError(
            f"key_indices: expected routes that divide, or are divided by, those of query_groups, "
            f"{groups.shape[1]}, got {keys.shape[1]}"
        )

    # each token once
    if has_values(groups) and groups.numel() > 0:
        token = torch.where(groups < 0, tokens, groups).flatten(2)
        count = torch.zeros(*token.shape[:2], tokens + 1, dtype=torch.int64, device=q.device)
        count = count.scatter_add_(2, token, torch.ones_like(token))[..., :tokens]
        if bool((count > 1).any()):
            raise ValueError("query_groups: expected each token in one group, got repeated ones")

    # all samples and all routes
    def whole(x: Tensor) -> Tensor:
        return x.expand(batch, -1, -1, -1).repeat_interleave(routes // x.shape[1], 1)

    return whole(groups), whole(keys), None if log_weights is None else whole(log_weights)


def _check_pooled(pooled, q: Tensor, groups: int) -> None:
    if not isinstance(pooled, tuple) or len(pooled) != 3:
        raise TypeError(f"pooled: expected PooledKeys, got {type(pooled).__name__}")
    for name, x, ndim in zip(PooledKeys._fields, pooled, (5, 5, 4)):
        check_float_tensor(f"pooled.{name}", x, ndim=ndim)
        shape = (*q.shape[:2], groups, pooled[0].shape[3], q.shape[-1])[:ndim]
        if tuple(x.shape) != shape:
            raise ValueError(f"pooled.{name}: expected shape {shape}, got {tuple(x.shape)}")
        if ndim == 5 and x.dtype != q.dtype:
            raise TypeError(f"pooled.{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")


@overridable
def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_groups: Tensor,
    key_indices: Tensor,
    pooled: PooledKeys | None = None,
    *,
    log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One softmax for each group of queries, over keys of its own: exact ones, and pooled ones.

    With every token in a group and every key in each list it is full attention. Time
    O(N (M + C)), memory O(N).

    Args:
        q, k, v: (B, heads, P + N, head_dim), P prefix tokens (class, registers, text), then N
            tokens of a map or a volume. Prefix tokens attend to every token and every token attends
            to them.
        query_groups: (B or 1, R, G, L) int64 in [0, N), each token in at most one group of a route;
            -1 fills up a group. R routes split the heads into as many runs of neighbours: 1 for
            groups that all heads share. A token in no group gets 0.
        key_indices: (B or 1, R, G, M) int64 in [0, N), distinct within a group; -1 is an empty
            slot.
        pooled: further keys of each group, see :class:`PooledKeys`; its mask is its log mass.
        log_weights: of the shape of ``key_indices``, added to the logits, differentiable; -inf
            removes the key, whatever stands in it. None: 0.
        key_mask: (B, N) or (B, P + N) bool, True = may be attended to. A query without any key gets
            0.
        num_prefix_tokens: P.
        scale: factor of the logits, default head_dim ** -0.5.
        backend: ``"eager"`` (plain torch), ``"triton"`` (kernels: float16 or bfloat16, head_dim up
            to 256, CUDA or ROCm) or ``"auto"`` (Triton where it can run). None: the environment
            variable ``COLT5_VISION_BACKEND``, else ``"auto"``.

    Returns:
        (B, heads, P + N, head_dim), the dtype of ``q``. Differentiable in q, k, v, ``pooled`` and
        ``log_weights``; the choice of groups and keys is constant.

    Raises:
        TypeError, ValueError: for bad arguments.
        RuntimeError: ``"triton"`` was asked for and cannot run, with the reason.

    Source: clusters of queries with keys of their own as in clustered attention (arXiv 2007.04825),
        pooled keys weighed by their number as in ToMe's proportional attention (arXiv 2210.09461).
    """
    # checks
    check_qkv(q, k, v)
    check_backend(backend)
    prefix = check_int("num_prefix_tokens", num_prefix_tokens, minimum=0)
    if q.shape[2] < prefix:
        raise ValueError(f"num_prefix_tokens: expected at most {q.shape[2]} tokens, got {prefix}")
    groups, keys, log_weights = _checked_groups(
        query_groups, key_indices, log_weights, q, q.shape[2] - prefix
    )
    if pooled is not None:
        _check_pooled(pooled, q, groups.shape[2])
    key_mask = checked_mask(key_mask, q, prefix)
    scale = checked_scale(scale, q.shape[-1])
    more = (None, None, None) if pooled is None else tuple(pooled)

    # the operator, fused, or plain torch
    floats = (q, k, v, log_weights, *more)
    plain = in_onnx_export(q) or takes_transform(NAME, backend, *floats)
    call = Call(q, k, v, groups, keys, log_weights, *more, key_mask, prefix, scale)
    if plain or ((backend == "eager" or not needs_operator(q)) and wants_plain_attention()):
        with without_autocast(q.device.type):
            return eager.grouped_attention(call)
    return _attention(*call, backend or "")[0]
