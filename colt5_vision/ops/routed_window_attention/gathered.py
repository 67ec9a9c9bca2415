"""Window ∪ routed attention by gathering each window's keys: for biases of (query, key) pairs, and
for ONNX.

Unlike ``eager.py`` it is made of public differentiable operations only, so a bias gets its
gradient and an exporter finds nothing unknown. The price: logits are held, O(N (w² + K)) of them, a
    few windows at a time.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._torch_internals import is_transformed
from ..dtypes import wide_dtype
from ..grid import cell_slots, slot_of_token, window_of_token
from .geometry import Geometry, free_keys

PairBias = Callable[[Tensor, Tensor], Tensor]

_LOGITS = 1 << 25  # held at once
_OFF = (
    -1e30
)  # bias of a key that must not be read; finite, so that a query without any key stays free of NaN


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    keys: Tensor,
    valid: Tensor,
    log_weights: Tensor | None,
    pair_bias: PairBias | None,
    scale: float,
) -> Tensor:
    """Queries ``rows`` (G, L) against their group's keys (B, heads or 1, G, S): (B, heads, G, L,
    D)."""
    batch, heads, _, head_dim = q.shape
    groups, length = rows.shape
    index = keys.expand(batch, heads, -1, -1).flatten(2).unsqueeze(-1).expand(-1, -1, -1, head_dim)

    # gather; a masked key is never read
    query = q[:, :, rows.flatten()].unflatten(2, (groups, length))
    off = ~valid.unsqueeze(-1)
    key = k.gather(2, index).unflatten(2, (groups, -1)).masked_fill(off, 0)
    value = v.gather(2, index).unflatten(2, (groups, -1)).masked_fill(off, 0)

    # what is added to the logits, and which pairs there are
    bias = torch.zeros((), dtype=wide_dtype(q), device=q.device)
    if pair_bias is not None:
        bias = pair_bias(rows[None, None, :, :, None], keys.unsqueeze(-2))
    if log_weights is not None:
        bias = bias + log_weights.unsqueeze(-2)
    seen = valid.unsqueeze(-2) & (bias > float("-inf"))

    # written out: the fused kernels know neither forward-mode AD nor a second derivative
    logits = (query @ key.mT).to(wide_dtype(q)) * scale + bias
    weights = logits.masked_fill(~seen, _OFF).softmax(-1).to(value.dtype)
    out = weights @ value  # (B, heads, G, L, D)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    pair_bias: PairBias | None,
    geo: Geometry,
    *,
    whole: bool = False,
) -> Tensor:
    """(B, heads, P + N, D): every token to its window ∪ prefix ∪ routed keys, the prefix tokens to
    everything.

    Args:
        q, k, v: (B, heads, P + N, D).
        routed, log_weights: (B, R, K), see ``api.py``; -1 is an empty slot.
        key_mask: (B, P + N).
        pair_bias: maps positions of queries (1, 1, G, L, 1) and of keys (B or 1, heads or 1, G, 1,
            S), in [0, P + N), to a bias of their logits, broadcastable to (B, heads, G, L, S).
        whole: one step for all windows, for exporters.
    """
    batch, heads, length = q.shape[:3]
    routes = routed.shape[1]
    share = heads // routes if routes > 1 else 1
    slots, inside = cell_slots(geo.height, geo.width, geo.window, q.device)
    slots = slots + geo.prefix
    prefix = torch.arange(geo.prefix, device=q.device)
    if key_mask is None:
        key_mask = torch.ones(1, length, dtype=torch.bool, device=q.device).expand(batch, -1)

    # every query sees these: prefix tokens and routed keys, (B, R, P + K)
    seen = torch.cat([prefix.expand(batch, routes, -1), routed.clamp_min(0) + geo.prefix], -1)
    seen_valid = key_mask.unsqueeze(1).expand(-1, routes, -1).gather(-1, seen)
    seen_valid = torch.cat(
        [seen_valid[..., : geo.prefix], seen_valid[..., geo.prefix :] & (routed >= 0)], -1
    )
    weight = None
    if log_weights is not None:
        weight = torch.nn.functional.pad(log_weights, (geo.prefix, 0))
        seen_valid = seen_valid & (weight > float("-inf"))

    # what a window has beside them: its own keys, unless they are seen already
    free = free_keys(routed, key_mask, geo)  # (B, R, N)
    window_of = window_of_token(geo.height, geo.width, geo.window, q.device)
    seen_window = torch.nn.functional.pad(window_of[routed.clamp_min(0)], (geo.prefix, 0), value=-1)

    # some windows, by the places of their tokens (groups, area) and whether these exist
    def windows(rows: Tensor, within: Tensor) -> Tensor:
        groups, area = rows.shape

        def with_seen(own: Tensor, seen: Tensor) -> Tensor:
            both = torch.cat([seen.expand(-1, -1, groups, -1), own], -1)
            return both.repeat_interleave(share, 1)

        beyond = seen_valid.unsqueeze(2)
        if not geo.weight_own_window:
            own = window_of[rows[:, 0] - geo.prefix].unsqueeze(-1)
            beyond = beyond & (seen_window.unsqueeze(2) != own)
        keys = with_seen(rows.expand(batch, routes, -1, -1), seen.unsqueeze(2))
        valid = with_seen(free[..., rows - geo.prefix] & within, beyond)
        weights = None
        if weight is not None:
            weights = with_seen(weight.new_zeros(batch, routes, groups, area), weight.unsqueeze(2))
        return _attend(q, k, v, rows, keys, valid, weights, pair_bias, geo.scale)

    # all windows, a few at a time; backward computes each step again, so that its logits alone
    # live
    if whole:
        parts = [windows(slots, inside)]
    else:
        per_window = batch * heads * slots.shape[1] * (slots.shape[1] + seen.shape[-1])
        step = max(1, _LOGITS // max(1, per_window))
        several = step < slots.shape[0] and torch.is_grad_enabled() and not is_transformed()
        run = functools.partial(checkpoint, windows, use_reentrant=False) if several else windows
        parts = [run(*part) for part in zip(slots.split(step), inside.split(step))]
    out = torch.cat(parts, 2).flatten(2, 3)
    out = out[:, :, slot_of_token(geo.height, geo.width, geo.window, q.device)]
    if geo.prefix:
        every = torch.arange(length, device=q.device)[None, None, None]
        own = _attend(
            q, k, v, prefix[None], every, key_mask[:, None, None], None, pair_bias, geo.scale
        )
        out = torch.cat([own.squeeze(2), out], 2)
    return out
