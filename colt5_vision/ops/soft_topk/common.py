"""What the implementations of soft top-k share."""

import torch
from torch import Tensor


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with the strides of ``empty_like(other)``, which is what the fake kernels promise."""
    if x.is_contiguous() and other.is_contiguous():
        return x
    out = torch.empty_like(other)
    return x if out.stride() == x.stride() else out.copy_(x)


def eps_schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> list[float]:
    """The eps of each iteration, and one more: the gates are read off after a last decay."""
    current, schedule = max(eps if eps_init is None else eps_init, eps), []
    for _ in range(n_iters + 1):
        schedule.append(current)
        current = max(current * eps_decay, eps)
    return schedule
