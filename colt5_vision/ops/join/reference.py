"""Joining the branches, the specification: one-hot matrices, O(N Q), every step visible."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def join(
    light: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor, null: Tensor | None
) -> Tensor:
    """``light + gate * heavy`` for routed tokens, ``light + null`` for the others.

    Args:
        light: (B, N, C).
        heavy: (B, Q, C).
        indices: (B, Q) int64; -1: the slot is empty.
        gates: (B, Q), finite.
        null: (C,) or None.
    """
    filled = (indices >= 0).unsqueeze(-1)
    place = one_hot(indices.clamp_min(0), light.shape[1]).to(heavy.dtype) * filled  # (B, Q, N)
    rows = gates.unsqueeze(-1) * torch.where(filled, heavy, 0)  # (B, Q, C)
    out = light + place.mT @ rows
    if null is None:
        return out

    routed = place.sum(1).unsqueeze(-1)  # (B, N, 1), 1 or 0
    return out + (1 - routed) * null
