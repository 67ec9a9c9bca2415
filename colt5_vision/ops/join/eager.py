"""Joining the branches in plain torch: one pass over the map, and one over the routed rows."""

import torch
from torch import Tensor

from ..dtypes import wide_dtype
from ..registration import laid_out_as


def join(
    light: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor, null: Tensor | None
) -> Tensor:
    """A fresh map with its routed rows added in place; all of it seen by autograd and tracers.

    Args:
        light: (B, N, C).
        heavy: (B, Q, C).
        indices: (B, Q) int64; -1: the slot is empty.
        gates: (B, Q), finite.
        null: (C,) in the dtype of ``light``, or None.
    """
    # what a routed row gets in place of the null token; nothing in an empty slot
    filled = (indices >= 0).unsqueeze(-1)
    rows = torch.where(filled, heavy, 0) * gates.unsqueeze(-1)
    if null is not None:
        rows = rows - filled.to(null.dtype) * null  # one dtype: ONNX of torch 2.11 wants no other
    rows = rows.to(light.dtype)
    index = indices.clamp_min(0).unsqueeze(-1).expand_as(rows)

    # the fresh map; this zero has vmap's dimension if anything has, or vmap refuses to add in place
    zero = rows.new_zeros(()) + index.new_zeros((), dtype=rows.dtype)
    out = light + (zero if null is None else null + zero)
    return out.scatter_add_(1, index, rows)


def forward(
    light: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor, null: Tensor | None
) -> Tensor:
    """As :func:`join`, in the layout of ``torch.empty_like(light)``."""
    return laid_out_as(join(light, heavy, indices, gates, null), light)


def backward(
    grad: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``heavy``, ``gates`` and ``null``; plain torch, so twice differentiable."""
    wide = wide_dtype(grad)
    filled = (indices >= 0).unsqueeze(-1)
    index = indices.clamp_min(0).unsqueeze(-1).expand_as(heavy)
    taken = torch.where(filled, grad.gather(1, index), 0).to(wide)  # (B, Q, C)

    grad_heavy = (taken * gates.unsqueeze(-1)).to(heavy.dtype)
    grad_gates = (taken * torch.where(filled, heavy, 0)).sum(-1).to(gates.dtype)
    grad_null = grad.sum((0, 1), dtype=wide) - taken.sum((0, 1))
    return grad_heavy, grad_gates, grad_null
