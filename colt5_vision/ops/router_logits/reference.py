"""Logits of the learned router, the specification: tokens are normalised, then compared."""

import torch
from torch import Tensor


def router_logits(x: Tensor, tokens: Tensor, eps: float) -> Tensor:
    """``w_r · x_i / max(|x_i|, eps)``, (B, R, N).

    Args:
        x: (B, N, C).
        tokens: (R, C) or (B, R, C).
        eps: the least norm a token is divided by.
    """
    norm = x.square().sum(-1, keepdim=True).sqrt()
    tokens = tokens.expand(x.shape[0], -1, -1)
    return torch.einsum("bnc,brc->brn", x / norm.clamp_min(eps), tokens)
