"""What a router says, and how routed tokens are read."""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which tokens were routed; every field is (B, R, K): samples, routes, slots.

    Attributes:
        indices: int64 raster index of the token in each slot, in falling order of its logit. In
            range even where the slot is empty.
        gates: weight of the token in [0, 1]; with straight-through exactly 1. 0 in empty slots.
        log_weights: log of the gate, to be added to the logit of the token as a key. -inf in empty
            slots.
        mask: bool, False where a slot is empty (fewer valid tokens than slots).
    """

    indices: Tensor
    gates: Tensor
    log_weights: Tensor
    mask: Tensor

    def only_route(self) -> "Routing":
        """The routing of a router with one route, its fields (B, K)."""
        return Routing(*(field.squeeze(1) for field in self))


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens (B, N, C) at ``indices`` (B, ...) -> (B, ..., C)."""
    flat = indices.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, flat).unflatten(1, indices.shape[1:])
