"""Logits of the learned router in plain torch: differentiable, and the forward and backward that
the kernels mirror."""

import torch
from torch import Tensor


def router_logits(x: Tensor, tokens: Tensor, eps: float) -> Tensor:
    """(B, R, N) by autograd's own operators; ``tokens`` in the dtype of the result."""
    x = x.to(tokens.dtype)
    # normalising the product instead of x: no normalised copy of the map
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return ((x @ tokens.mT) / norm).transpose(-1, -2)


def forward(x: Tensor, tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Logits (B, R, N) and what they were divided by, ``max(|x|, eps)`` (B, N), both in the dtype
    of ``tokens``."""
    x = x.to(tokens.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(eps)
    return (tokens @ x.mT) / norm.unsqueeze(1), norm


def backward(
    grad: Tensor, x: Tensor, tokens: Tensor, logits: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``tokens``.

    ``d x_i = sum_r g_ri (w_r / n_i - l_ri x_i / n_i²)``, without the second term where the norm was
    raised to ``eps``; ``d w_r = sum_i g_ri x_i / n_i``.
    """
    wide, scaled = x.to(tokens.dtype), grad / norm.unsqueeze(1)
    radial = torch.where(norm > eps, (scaled * logits).sum(1) / norm, 0)
    grad_x = (scaled.mT @ tokens).addcmul_(radial.unsqueeze(-1), wide, value=-1)  # no second map
    grad_tokens = scaled @ wide
    return grad_x.to(x.dtype), grad_tokens if tokens.ndim == 3 else grad_tokens.sum(0)
