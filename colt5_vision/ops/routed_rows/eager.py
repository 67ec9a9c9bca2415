"""Reading routed rows of a map in plain torch: differentiable, and what the kernels
mirror."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from ..dtypes import wide_dtype


def _spread(indices: Tensor, dim: int) -> Tensor:
    return indices.unsqueeze(-1).expand(*indices.shape, dim)


def gather_normalize(x: Tensor, indices: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(B, ..., C) by autograd's own operators."""
    rows = x.gather(1, _spread(indices.flatten(1), x.shape[-1])).unflatten(1, indices.shape[1:])
    return rms_norm(rows, x.shape[-1:], weight, eps)


def gather_normalize_forward(
    x: Tensor, indices: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalised rows (B, R, K, C) in ``dtype``, and what they were multiplied by, 1 / sqrt(mean x²
    + eps) (B, R, K)."""
    wide = wide_dtype(x)
    rows = (
        x.gather(1, _spread(indices.flatten(1), x.shape[-1]))
        .unflatten(1, indices.shape[1:])
        .to(wide)
    )
    scale = (rows.square().mean(-1) + eps).rsqrt()
    return (rows * scale.unsqueeze(-1) * weight.to(wide)).to(dtype), scale


def gather_normalize_backward(
    grad: Tensor, x: Tensor, indices: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``. Routes are added one after the other: a token may be in
    several."""
    wide, dim = scale.dtype, x.shape[-1]
    rows = x.gather(1, _spread(indices.flatten(1), dim)).unflatten(1, indices.shape[1:]).to(wide)
    unit, grad = rows * scale.unsqueeze(-1), grad.to(wide)
    weighted = grad * weight.to(wide)
    grad_rows = scale.unsqueeze(-1) * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    grad_x = torch.zeros_like(x)
    for r in range(indices.shape[1]):
        grad_x.scatter_add_(1, _spread(indices[:, r], dim), grad_rows[:, r].to(x.dtype))
    return grad_x, (grad * unit).sum((0, 1, 2)).to(weight.dtype)
