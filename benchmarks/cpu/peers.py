"""Relaxations of top-k that no package at hand has, as their authors compute them; in float32, once
differentiable."""

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, k: float, *, n_iters: int, eps: float = 1.0) -> Tensor:
    """Gates (..., n): entropic transport of n entries to "taken" (k) and "left" (n - k), Sinkhorn's
    iteration on logs.

    Source: SOFT top-k, Xie et al. 2020 (arXiv 2002.06504); there the backward solves for the
    gradient of the fixed point, here autograd goes through the iterations, as it does in
    colt5_attention.
    """
    n = scores.shape[-1]
    logits = torch.stack([scores, torch.zeros_like(scores)], -1) / eps  # (..., n, 2)
    columns = scores.new_tensor([k, n - k]).log()
    for _ in range(n_iters):
        logits = logits - logits.logsumexp(-2, keepdim=True) + columns
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits[..., 0].exp()


def sorted_projection(scores: Tensor, k: float, *, eps: float = 1.0) -> Tensor:
    """Gates (..., n): Euclidean projection of scores / eps onto {0 <= y <= 1, sum y = k}, by
    sorting.

    ``y = clip(s - t, 0, 1)``, and the sum falls in t, linearly between the breakpoints s and s - 1:
    the sums at all of them from one sort and one cumulative sum, then one division.

    Source: soft top-k as projection onto a permutahedron, Blondel et al. 2020 (arXiv 2002.08871),
    which for top-k is this capped simplex (Wang and Lu 2015, arXiv 1503.01002).
    """
    s = scores / eps

    # the piece of the sum, linear in the threshold, on which it is k
    with torch.no_grad():
        rising = s.sort(-1).values
        # in float32 k would be lost
        below = torch.nn.functional.pad(rising.cumsum(-1, dtype=torch.float64), (1, 0))
        points = torch.cat([rising, rising - 1], -1).sort(-1).values
        at_most, at_most_1 = (
            torch.searchsorted(rising, points + shift, right=True) for shift in (0, 1)
        )

        # the sum at every breakpoint
        between = at_most_1 - at_most
        sums = (
            below.gather(-1, at_most_1)
            - below.gather(-1, at_most)
            - points * between
            + s.shape[-1]
            - at_most_1
        )

        # the last breakpoint whose sum is still k or more: between it and the next one no entry
        # changes sides
        last = ((sums >= k).sum(-1, keepdim=True) - 1).clamp_min(0)
        point = points.gather(-1, last)
        inside, capped = (s > point) & (s <= point + 1), s > point + 1
        count = inside.sum(-1, keepdim=True).clamp_min(1)

    # the threshold, with its gradient
    threshold = (
        torch.where(inside, s, 0).sum(-1, keepdim=True) + capped.sum(-1, keepdim=True) - k
    ) / count
    return (s - threshold).clamp(0, 1)
