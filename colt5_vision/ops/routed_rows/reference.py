"""Reading and writing routed rows of a map in plain torch: differentiable, and what the kernels mirror."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm


def _spread(indices: Tensor, dim: int) -> Tensor:
    return indices.unsqueeze(-1).expand(*indices.shape, dim)


def gather_normalize(x: Tensor, indices: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(B, ..., C) by autograd's own operators."""
    rows = x.gather(1, _spread(indices.flatten(1), x.shape[-1])).unflatten(1, indices.shape[1:])
    return rms_norm(rows, x.shape[-1:], weight, eps)


def gather_normalize_forward(
    x: Tensor, indices: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Normalised rows (B, R, K, C) in ``dtype``, and what they were multiplied by, 1 / sqrt(mean x² + eps) (B, R, K)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.gather(1, _spread(indices.flatten(1), x.shape[-1])).unflatten(1, indices.shape[1:]).to(wide)
    scale = (rows.square().mean(-1) + eps).rsqrt()
    return (rows * scale.unsqueeze(-1) * weight.to(wide)).to(dtype), scale


def gather_normalize_backward(
    grad: Tensor, x: Tensor, indices: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``. Routes are added one after the other: a token may be in several."""
    wide, dim = scale.dtype, x.shape[-1]
    rows = x.gather(1, _spread(indices.flatten(1), dim)).unflatten(1, indices.shape[1:]).to(wide)
    unit, grad = rows * scale.unsqueeze(-1), grad.to(wide)
    weighted = grad * weight.to(wide)
    grad_rows = scale.unsqueeze(-1) * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    grad_x = torch.zeros_like(x)
    for r in range(indices.shape[1]):
        grad_x.scatter_add_(1, _spread(indices[:, r], dim), grad_rows[:, r].to(x.dtype))
    return grad_x, (grad * unit).sum((0, 1, 2)).to(weight.dtype)


def gated_scatter_add_(out: Tensor, rows: Tensor, indices: Tensor, gates: Tensor | None, null: Tensor | None) -> Tensor:
    """``out[indices] += gates * rows - null`` in place, by autograd's own operators."""
    if gates is not None:
        rows = rows * gates.unsqueeze(-1)
    if null is not None:
        rows = rows - null
    return out.scatter_add_(1, _spread(indices, out.shape[-1]), rows.to(out.dtype))


def gated_scatter_add_backward(
    grad: Tensor, rows: Tensor, indices: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of ``rows``, ``gates`` and ``null`` (C,), the last in float32 (float64)."""
    taken = grad.gather(1, _spread(indices, grad.shape[-1]))
    wide = taken.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    grad_null = -wide.sum((0, 1))
    if gates is None:
        return taken.to(rows.dtype), None, grad_null
    return (wide * gates.unsqueeze(-1)).to(rows.dtype), (wide * rows).sum(-1).to(gates.dtype), grad_null
