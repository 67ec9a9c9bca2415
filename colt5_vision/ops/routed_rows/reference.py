"""Reading routed rows, the specification: one-hot matrices, O(N K)."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def gather_normalize(x: Tensor, indices: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows ``x[indices]`` over the root of their mean square, times ``weight``: (B, ..., C).

    Args:
        x: (B, N, C).
        indices: (B, ...) in [0, N).
        weight: (C,).
        eps: added to the mean square.
    """
    place = one_hot(indices.flatten(1), x.shape[1]).to(x.dtype)  # (B, K, N)
    rows = (place @ x).unflatten(1, indices.shape[1:])
    return rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
