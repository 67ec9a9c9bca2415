"""Attention of groups of queries to their own keys, the specification: a loop over groups."""

import torch
from torch import Tensor


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_groups: Tensor,
    key_indices: Tensor,
    pooled: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    log_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Each group to the prefix, its keys and its pooled keys. Arguments as those of the
    operator, ``query_groups``, ``key_indices`` and ``log_weights`` with all their four dimensions.
    """
    # the arguments, written out in full
    batch, heads, length, dim = q.shape
    prefix, scale = num_prefix_tokens, dim**-0.5 if scale is None else scale
    if key_mask is None:
        key_mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    if key_mask.shape[1] != length:
        key_mask = torch.nn.functional.pad(key_mask, (prefix, 0), value=True)

    # groups, keys and weights of every head
    def by_head(x: Tensor) -> Tensor:
        return x.expand(batch, -1, -1, -1).repeat_interleave(heads // x.shape[1], 1)

    query_groups, key_indices = by_head(query_groups), by_head(key_indices)
    log_weights = None if log_weights is None else by_head(log_weights)

    # rows of one head to some of its keys, and to pooled ones
    def attend(b: int, h: int, rows: Tensor, keys: Tensor, weights: Tensor | None, more) -> Tensor:
        seen = key_mask[b, keys]
        key, value = k[b, h, keys[seen]], v[b, h, keys[seen]]
        bias = q.new_zeros(len(key)) if weights is None else weights[seen].to(q.dtype)
        if more is not None:
            key, value = torch.cat([key, more[0]]), torch.cat([value, more[1]])
            bias = torch.cat([bias, more[2].to(q.dtype)])
        there = bias > float("-inf")
        if not there.any():
            return q.new_zeros(len(rows), dim)
        logits = q[b, h, rows] @ key[there].T * scale + bias[there]
        return logits.softmax(-1) @ value[there]

    # the prefix sees all, a group its own
    every, out = torch.arange(length, device=q.device), torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            out[b, h, :prefix] = attend(b, h, every[:prefix], every, None, None)
            for group, rows in enumerate(query_groups[b, h]):
                rows, keys = rows[rows >= 0] + prefix, key_indices[b, h, group]
                weights = None
                if log_weights is not None:
                    own = log_weights[b, h, group][keys >= 0]
                    weights = torch.cat([own.new_zeros(prefix), own])
                keys = torch.cat([every[:prefix], keys[keys >= 0] + prefix])
                more = None if pooled is None else [x[b, h, group] for x in pooled]
                out[b, h, rows] = attend(b, h, rows, keys, weights, more)
    return out
