"""Soft top-k, the specification: the definition solved by bisection, and CoLT5's iteration."""

import math

import torch
from torch import Tensor


def soft_topk(scores: Tensor, k: float, eps: float) -> Tensor:
    """Gates ``min(1, exp((scores + a) / eps))`` that sum to ``k``, with ``a`` by bisection.

    Args:
        scores: (rows, n), not masked.
        k: at most n.
        eps: temperature.

    Returns:
        (rows, n), float64.
    """
    scores = scores.double()
    low = eps * (math.log(k / scores.shape[-1]) - 1) - scores.amax(-1, keepdim=True)
    high = eps - scores.amin(-1, keepdim=True)
    for _ in range(80):
        a = (low + high) / 2
        enough = ((scores + a) / eps).clamp_max(0).exp().sum(-1, keepdim=True) >= k
        low, high = torch.where(enough, low, a), torch.where(enough, a, high)
    return ((scores + high) / eps).clamp_max(0).exp()


def coordinate_descent(
    scores: Tensor, k: Tensor, num_valid: Tensor, schedule: list[float]
) -> Tensor:
    """CoLT5's two-vector iteration as it is published, by autograd's own operators.

    Args:
        scores: (rows, n), masked entries at the dtype's minimum.
        k, num_valid: (rows, 1).
        schedule: the eps of each iteration, and the last.
    """
    a = schedule[0] * (k / num_valid.clamp_min(1)).log()
    for eps in schedule[1:-1]:
        b = -torch.relu(scores + a)  # s + b <= -a: no gate above 1
        a = eps * (k.log() - ((scores + b) / eps).logsumexp(-1, keepdim=True))
    b = -torch.relu(scores + a)
    return ((scores + a + b) / schedule[-1]).exp()
