"""Routed keys without sampling: what the swap is compared with."""

import torch
from torch import Tensor

from ..mean_query import mean_query_logits
from ..ops import route_topk
from ..ops.autocast import without_autocast
from ..positions import fixed_scores
from .heads import Group, over_heads

CONTROLS = ("mean_query", "random", "grid", "window")


def control_keys(
    router: str,
    q: Tensor,
    k: Tensor,
    slots: int,
    *,
    grid_size: tuple[int, int],
    curve: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor] | None:
    """Routed keys of a map (B, heads, N, head_dim) by a control.

    Args:
        router: ``"mean_query"``, what the mean of all queries attends to most; ``"random"``;
            ``"grid"``, evenly spread; ``"window"``, none.
        slots: number of keys K.
        curve: (M,) indices of the tokens that may be routed, of a volume; None: an image.
        mask: (B, N) bool, True = valid.
        group: of processes that have the other heads.

    Returns:
        (indices, log_weights), both (B, K), -1 for an empty slot; None for no keys. Keys of
        ``"random"`` and ``"grid"`` stand for N / K each.
    """
    batch, tokens = q.shape[0], q.shape[2]
    if router == "window":
        return None
    if router == "mean_query":
        with without_autocast(q.device.type):
            shares = mean_query_logits(q.detach(), k.detach(), mask=mask, scale=scale).exp()
        indices, valid = route_topk(over_heads(shares, group), slots, mask=mask)
        return torch.where(valid, indices, -1), shares.new_zeros(batch, slots)

    if router == "random" or curve is None:
        scores = fixed_scores(router, *grid_size, range(1), q.device)
    else:
        scores = torch.zeros(tokens, device=q.device)
        scores = scores.scatter(0, curve, -_reversed_bits(curve.shape[0], q.device))
    indices, valid = route_topk(scores.expand(batch, -1), slots, mask=mask)
    count = q.new_full((batch, 1), tokens, dtype=torch.float32)
    if mask is not None:
        count = mask.sum(-1, keepdim=True).float()
    log_weights = (count / slots).clamp_min(1).log().expand(-1, slots)
    return torch.where(valid, indices, -1), log_weights


def _reversed_bits(count: int, device: torch.device) -> Tensor:
    """(count,) float32 in [0, 1), of which the lowest few are always evenly spread.

    Source: van der Corput (1935).
    """
    place = torch.arange(count, device=device)
    value = torch.zeros(count, device=device)
    for bit in range(24):  # exact in float32
        value = value + ((place >> bit) & 1) * 2.0 ** -(bit + 1)
    return value
