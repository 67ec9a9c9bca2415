"""Full attention of what a routed layer is called with: what training and calibration go by."""

import torch
from torch import Tensor

from ..ops import routed_window_attention
from ..ops.routed_window_attention.gathered import PairBias
from ..ops.sdpa import scaled_dot_product_attention
from .window import Grid, Window, several


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: Grid,
    window_size: Window,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    pair_bias: PairBias | None,
    scale: float | None,
) -> Tensor:
    """Full attention, with nothing of size N x N.

    Args:
        q, k, v: (B, heads, P + N, head_dim), P prefix tokens and a map, or several.
        grid_size: (H, W) or (T, H, W) of the map, or several (T, H, W).
        window_size: any; with a mask or a bias, that of the calls it is made of.
        num_prefix_tokens: P.
        key_mask: (B, P + N) bool, True = may be attended to.
        pair_bias: of pairs of tokens.
        scale: of the logits; None: head_dim ** -0.5.

    Returns:
        (B, heads, P + N, head_dim).
    """
    if pair_bias is None and key_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    tokens = q.shape[2] - num_prefix_tokens
    width = tokens if several(grid_size) else grid_size[-1]
    every = torch.arange(tokens, device=q.device).expand(q.shape[0], -1)
    return routed_window_attention(
        q,
        k,
        v,
        routed_indices=every,
        grid_size=(tokens // width, width),
        window_size=window_size[-2:],
        num_prefix_tokens=num_prefix_tokens,
        key_mask=key_mask,
        pair_bias=pair_bias,
        scale=scale,
    )
