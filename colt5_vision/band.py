"""Attention along a line: every token to the tokens beside it."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._torch_internals import is_traced
from .ops.sdpa import scaled_dot_product_attention


def band_attention(qkv: Tensor, reach: int, mask: Tensor | None) -> Tensor:
    """Attention of token i to the tokens j with ``|i - j| <= reach``, in O(N · reach).

    Args:
        qkv: (B, N, 3, heads, head_dim), finite also where masked.
        reach: tokens seen on either side.
        mask: (B, N) bool, True = valid. A masked token is seen by itself only.

    Returns:
        (B, N, heads * head_dim).
    """
    batch, num_tokens, _, heads, dim_head = qkv.shape
    # a graph of any length must not ask which of the two is smaller
    traced = is_traced(qkv)
    size = reach if traced else min(reach, num_tokens)
    blocks = num_tokens // size + 1

    # a band lies in its block of keys and the two beside it
    q, k, v = pad(qkv, (0,) * 6 + (size, 2 * size)).unbind(2)
    q = q.unfold(1, size, size).mT[:, 1:-1]  # (B, blocks, heads, size, head_dim), a view
    k, v = (t.unfold(1, 3 * size, size).mT for t in (k, v))
    if traced:  # whether a view does without a copy is not for a graph of any length to know
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))

    # who sees whom: valid keys within reach, and each token itself, so that no row is empty
    ahead = torch.arange(-size, 2 * size, device=qkv.device)  # keys, from the block's first token
    place = torch.arange(blocks, device=qkv.device).unsqueeze(1) * size + ahead
    valid = (place >= 0) & (place < num_tokens)
    valid = valid.unsqueeze(0) if mask is None else valid & mask[:, place.clamp(0, num_tokens - 1)]
    ahead = ahead - torch.arange(size, device=qkv.device).unsqueeze(1)
    seen = (ahead.abs() <= size) & valid.unsqueeze(2) | (ahead == 0)
    seen = seen.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    # attention of each block, and the blocks one after the other
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    out = out.transpose(1, 2).reshape(batch, blocks * size, heads * dim_head)
    # Linear would copy a slice; whether it is one is not for a graph of any length to know
    return out.index_select(1, torch.arange(num_tokens, device=qkv.device))
