"""Heads of one layer that lie in several processes, as Ulysses and tensor parallelism spread them.

Which keys are routed is asked of all heads together, so the processes add up what theirs say.
"""

import torch
from torch import Tensor, distributed

Group = distributed.ProcessGroup | None if distributed.is_available() else None


def over_heads(x: Tensor, group: Group = None) -> Tensor:
    """The sum of (B, heads, ...) over the heads of all processes.

    Args:
        group: of the processes; None: this one has all heads.
    """
    total = x.sum(1)
    if group is not None:
        distributed.all_reduce(total, group=group)
    return total


def all_heads(features: Tensor, channels: int, group: Group) -> Tensor:
    """(B, N, channels), the channels of all heads, in the order of the processes.

    Args:
        features: (B, N, C) of this process; the last process may have fewer.
    """
    if group is None:
        return features
    count, own = group.size(), features.shape[-1]
    most = max(own, (channels - own) // (count - 1))
    padded = torch.nn.functional.pad(features, (0, most - own)).contiguous()
    parts = [torch.empty_like(padded) for _ in range(count)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat(parts, -1)[..., :channels]
