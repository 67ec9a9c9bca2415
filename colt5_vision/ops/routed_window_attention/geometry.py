"""What all implementations of window ∪ routed attention share: the static part of a call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch_internals import has_values


@dataclass(frozen=True)
class Geometry:
    """The static part of a call: prefix tokens, map, window, factor of the logits."""

    prefix: int
    height: int
    width: int
    window: tuple[int, int]
    scale: float
    weight_own_window: bool = True

    @property
    def tokens(self) -> int:
        return self.height * self.width


def free_keys(routed: Tensor, key_mask: Tensor | None, geo: Geometry) -> Tensor:
    """(B, R, N), True for a key that a window may read: valid and, if the routed part has it for
    all, not routed."""
    if not geo.weight_own_window:
        every = torch.ones(*routed.shape[:2], geo.tokens, dtype=torch.bool, device=routed.device)
        return every if key_mask is None else every & key_mask[:, None, geo.prefix :]
    taken = torch.zeros(*routed.shape[:2], geo.tokens + 1, dtype=torch.bool, device=routed.device)
    # empty slots land in the spare last column
    slot = torch.where(routed >= 0, routed, geo.tokens)
    free = ~taken.scatter(-1, slot, torch.ones_like(slot, dtype=torch.bool))[..., : geo.tokens]
    return free if key_mask is None else free & key_mask[:, None, geo.prefix :]


def removed_keys(routed: Tensor, log_weights: Tensor | None, geo: Geometry) -> Tensor | None:
    """(B, R, N), True for a key that its log weight takes from all queries of the map; None: no
    key."""
    if log_weights is None or not geo.weight_own_window:
        return None
    gone = (log_weights == float("-inf")) & (routed >= 0)
    if gone.device.type == "cpu" and has_values(gone) and not bool(gone.any()):
        return None
    removed = torch.zeros(*routed.shape[:2], geo.tokens + 1, dtype=torch.bool, device=routed.device)
    slot = torch.where(gone, routed, geo.tokens)
    return removed.scatter(-1, slot, True)[..., : geo.tokens]
