"""Systematic sampling of tokens along a curve through the map, and the gates they are drawn by."""

import torch
from torch import Tensor, nn

from .._torch_internals import in_backward
from ..ops import soft_topk
from ..ops.autocast import without_autocast

_UNIFORM = 0.1  # part of the probability that is spread evenly
_ONE = 1 << 24  # a probability of 1 as an integer: sums are exact, also where there is no float64


def inclusion_gates(logits: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Probabilities (B, N) of being drawn, with sum k; none is tiny, so that no weight is huge.

    Args:
        logits: (B, N), log importance.
        k: number of tokens to draw.
        mask: (B, N) bool, True = valid.
    """
    with without_autocast(logits.device.type):
        valid = torch.ones_like(logits) if mask is None else mask.to(logits.dtype)
        share = logits.masked_fill(valid == 0, torch.finfo(logits.dtype).min).softmax(-1)
        uniform = valid / valid.sum(-1, keepdim=True).clamp_min(1)
        share = (1 - _UNIFORM) * share + _UNIFORM * uniform
        return soft_topk(share.clamp_min(torch.finfo(share.dtype).tiny).log(), k, mask=mask)


def sample_tokens(
    gates: Tensor,
    k: int,
    curve: Tensor,
    *,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Systematic sampling: each token with its probability, spread over the map, without
    replacement.

    Args:
        gates: (B, R, N) inclusion probabilities in [0, 1] with a sum of ``min(k, valid tokens)``.
        k: slots.
        curve: (M,) indices of the tokens that may be drawn, neighbours close together.
        mask: (B, N) bool, True = valid.
        generator: draws the offset of the comb anew; default: its middle, the same input gives the
            same sample.

    Returns:
        ``(indices, valid)``, both (B, R, k): raster indices, and a bool, False in an empty slot.

    Source: systematic sampling (Madow 1949).
    """
    total = k if mask is None else mask.sum(-1).clamp_max(k)[:, None, None]
    mass = (gates[..., curve] * _ONE).long().cumsum(-1)  # (B, R, M)
    whole = mass[..., -1:].clamp_min(1)
    if generator is None:
        offset = whole // 2
    elif in_backward():
        raise RuntimeError(
            "generator: a checkpointed layer runs again in backward and would draw other keys, "
            "expected None where gradients are checkpointed"
        )
    else:
        draw = torch.rand(1, generator=generator, device=generator.device).to(gates.device)
        offset = (draw * _ONE).long() * whole // _ONE

    # a token is drawn when its share of the mass reaches the next tooth of a comb whose teeth are
    # whole / total apart
    teeth = (nn.functional.pad(mass, (1, 0)) * total - offset) // whole
    drawn = teeth[..., 1:] > teeth[..., :-1]

    # the drawn ones, in the order of the curve
    place = torch.arange(curve.shape[0], 0, -1, device=gates.device)
    place = torch.where(drawn, place + curve.shape[0], place).topk(k, -1).indices
    return curve[place], drawn.gather(-1, place)
