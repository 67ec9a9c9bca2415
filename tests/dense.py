"""Dense O(N²) twins of the operators, for tests only."""

import torch


def window_of(height, width, window):
    wh, ww = (window, window) if isinstance(window, int) else window
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((y // wh) * width + x // ww).reshape(-1)


def dense_attention(
    q, k, v, grid_size, window_size, routed=None, log_weights=None, key_mask=None, prefix=0, scale=None, own=True
):
    """Attention under the mask window ∪ routed ∪ prefix, all logits in one matrix; ``own``: is weight_own_window."""
    batch, heads, length, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    win = window_of(*grid_size, window_size)
    allowed = (win[:, None] == win[None, :]).expand(batch, heads, -1, -1).clone()
    bias = torch.zeros(batch, heads, length - prefix, dtype=q.dtype)
    if routed is not None:
        routed = routed if routed.ndim == 3 else routed[:, None]
        log_weights = log_weights if log_weights is None or log_weights.ndim == 3 else log_weights[:, None]
        routed = routed.repeat_interleave(heads // routed.shape[1], 1)
        slot = torch.where(routed < 0, length - prefix, routed)
        column = torch.zeros(batch, heads, length - prefix + 1, dtype=torch.bool).scatter(-1, slot, True)[..., :-1]
        allowed |= column[:, :, None]
        if log_weights is not None:
            weights = log_weights.repeat_interleave(heads // log_weights.shape[1], 1)
            spare = torch.zeros(batch, heads, length - prefix + 1, dtype=q.dtype)
            bias = spare.scatter_add(-1, slot, weights.to(q.dtype))[..., :-1]
    mask = torch.ones(batch, heads, length, length, dtype=torch.bool)
    mask[:, :, prefix:, prefix:] = allowed
    full_bias = torch.zeros(batch, heads, length, length, dtype=q.dtype)
    same = win[:, None] == win[None, :]
    full_bias[:, :, prefix:, prefix:] = bias[:, :, None] if own else bias[:, :, None].masked_fill(same, 0)
    if key_mask is not None:
        if key_mask.shape[1] != length:
            key_mask = torch.nn.functional.pad(key_mask, (prefix, 0), value=True)
        mask &= key_mask[:, None, None]
    logits = (q @ k.mT) * scale + full_bias
    logits = logits.masked_fill(~mask, float("-inf"))
    empty = ~mask.any(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return weights @ v
