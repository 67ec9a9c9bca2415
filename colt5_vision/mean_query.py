"""Logits without parameters: what the mean query attends to."""

import torch
from torch import Tensor, nn

from .checks import check_float_tensor
from .ops.dtypes import wide_dtype


def mean_query_logits(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What the mean query attends to: ``log softmax_j(mean_i(q_i) · k_j · scale)`` of each head, in
    O(N).

    Args:
        query, key: (B, heads, N, head_dim).
        mask: (B, N) bool, True = valid; masked tokens count in no mean and no softmax.
        scale: factor of the logits, default head_dim ** -0.5.

    Returns:
        (B, heads, N), float32 (float64 for float64).
    """
    wide = wide_dtype(query)
    if mask is None:
        mean = query.to(wide).mean(2, keepdim=True)
    else:
        valid = mask[:, None, :, None]
        mean = query.to(wide).masked_fill(~valid, 0).sum(2, keepdim=True) / valid.sum(
            2, keepdim=True
        ).clamp_min(1)
    logits = (mean @ key.to(wide).mT).squeeze(2) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), torch.finfo(wide).min)
    return logits.log_softmax(-1)


def route_by_mean_query(
    x: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    num_routes: int,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """What the mean query of each route's heads attends to: the log of the sum of their shares.

    Args:
        x: (B, N, C) tokens, compared with themselves where there is no query.
        query, key: (B, heads, N, head_dim), heads divisible by ``num_routes``; both or neither.
        mask: (B, N) bool, True = valid.

    Returns:
        (B, num_routes, N), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for an argument that does not fit.
    """
    if (query is None) != (key is None):
        raise ValueError("query, key: expected both or neither")
    if query is None:
        query = key = nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-6).unsqueeze(1)
        query = key = query.expand(-1, num_routes, -1, -1)
    for name, tensor in (("query", query), ("key", key)):
        check_float_tensor(name, tensor, ndim=4)
        if (
            tensor.shape[0] != x.shape[0]
            or tensor.shape[2] != x.shape[1]
            or tensor.shape != query.shape
        ):
            expected = f"({x.shape[0]}, heads, {x.shape[1]}, head_dim), the same for both"
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
    heads = query.shape[1]
    if heads % num_routes:
        raise ValueError(f"query: {heads} heads are not divisible by {num_routes} routes")
    return mean_query_logits(query, key, mask=mask).unflatten(1, (num_routes, -1)).logsumexp(2)
