"""Window ∪ routed attention, the specification: all logits in one matrix, O(N²)."""

import torch
from torch import Tensor


def window_of(height: int, width: int, window: int | tuple[int, int]) -> Tensor:
    """(N,), a number for the window of each token; equal numbers, one window."""
    wh, ww = (window, window) if isinstance(window, int) else window
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((y // wh) * width + x // ww).reshape(-1)


def _routed_columns(
    routed: Tensor, log_weights: Tensor | None, heads: int, like: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Which of the N keys are routed, and their log weights, both (B, heads, N)."""
    routed = routed if routed.ndim == 3 else routed[:, None]
    share = heads // routed.shape[1]
    slot = torch.where(routed < 0, tokens, routed)  # an empty slot: a spare last column
    spare = like.new_zeros(*routed.shape[:2], tokens + 1)

    column = spare.bool().scatter(-1, slot, True)
    weights = spare
    if log_weights is not None:
        weights = spare.scatter_add(-1, slot, log_weights.reshape(routed.shape).to(like.dtype))
    return (
        column[..., :tokens].repeat_interleave(share, 1),
        weights[..., :tokens].repeat_interleave(share, 1),
    )


def _weighed(weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``weights @ v`` over what the mask lets through: 0 times a NaN behind it would be NaN."""
    broken = ~v.isfinite()
    out = weights @ v.masked_fill(broken, 0)
    return out.masked_fill(mask.to(v.dtype) @ broken.to(v.dtype) > 0, float("nan"))


def routed_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: tuple[int, int],
    window_size: int | tuple[int, int],
    routed_indices: Tensor | None = None,
    log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    scale: float | None = None,
    query_indices: Tensor | None = None,
    weight_own_window: bool = True,
) -> Tensor:
    """Attention under the mask window ∪ routed ∪ prefix. Arguments as those of the operator."""
    batch, heads, length, dim = q.shape
    prefix, tokens = num_prefix_tokens, length - num_prefix_tokens
    window = window_of(*grid_size, window_size).to(q.device)
    same = window[:, None] == window[None, :]  # (N, N)

    # which image token sees which, and what is added to the logit
    seen, bias = same.expand(batch, heads, -1, -1), q.new_zeros(batch, heads, tokens, tokens)
    if routed_indices is not None:
        column, weights = _routed_columns(routed_indices, log_weights, heads, q, tokens)
        seen = seen | column[:, :, None]
        bias = bias + weights[:, :, None]
        if not weight_own_window:
            bias = bias.masked_fill(same, 0)

    # prefix tokens see and are seen by all
    mask = torch.ones(batch, heads, length, length, dtype=torch.bool, device=q.device)
    mask[:, :, prefix:, prefix:] = seen
    bias = torch.nn.functional.pad(bias, (prefix, 0, prefix, 0))
    if key_mask is not None:
        if key_mask.shape[1] != length:
            key_mask = torch.nn.functional.pad(key_mask, (prefix, 0), value=True)
        mask = mask & key_mask[:, None, None]

    # softmax; a query without any key gets 0
    mask = mask & (bias != float("-inf"))
    logits = (q @ k.mT) * (dim**-0.5 if scale is None else scale) + bias
    logits = logits.masked_fill(~mask, float("-inf"))
    empty = ~mask.any(-1, keepdim=True)
    out = _weighed(logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0), v, mask)
    if query_indices is None:
        return out

    # the queries asked for
    index = query_indices[:, None, :, None].expand(-1, heads, -1, v.shape[-1])
    return torch.cat([out[:, :, :prefix], out[:, :, prefix:].gather(2, index)], 2)
