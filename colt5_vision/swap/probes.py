"""A few queries of a map that attend to everything: how much each key matters, and what routed
attention gets wrong."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch_internals import is_compiling, is_exporting
from ..ops.autocast import without_autocast
from ..ops.dtypes import wide_dtype
from ..ops.grid import window_of_token
from ..ops.routed_window_attention.gathered import PairBias
from ..ops.sdpa import scaled_dot_product_attention
from ..positions import morton_order
from .heads import Group, over_heads

_PROBES = 64  # spread over the map
_CHUNK = 32  # of them at once, where all heads are asked together
# of the interpolation between them, over the mean square distance of their queries from the mean
_SHARPNESS = 4.0
_FARTHEST = 500.0  # in that unit; beyond it one probe has all the weight, and float16 overflows


class Probes(NamedTuple):
    """What :func:`probe` finds for n queries."""

    rows: Tensor  # (n,) raster indices
    valid: Tensor  # (B, 1 or heads, n, 1) bool, False for a masked query, or one that sees nothing
    out: Tensor  # (B, heads, n, head_dim), their full attention, float32 (float64 for float64)
    importance: Tensor  # (B, N), log


@torch.no_grad()
def probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_size: tuple[int, int],
    window_size: tuple[int, int],
    num_prefix_tokens: int = 0,
    key_mask: Tensor | None = None,
    pair_bias: PairBias | None = None,
    scale: float | None = None,
    curve: Tensor | None = None,
    group: Group = None,
) -> Probes:
    """Full attention of a few queries spread over the map; O(N).

    From it, the log of each key's importance, its root mean square part in the outputs beyond its
    own window: a query's attention times the distance of the key's value from their mean, over
    heads and queries of other windows. Sampled with probabilities in that proportion, keys make
    about the least expected squared error.

    Args:
        q, k, v: (B, heads, P + N, head_dim).
        window_size: (height, width).
        grid_size, num_prefix_tokens, key_mask, pair_bias, scale: see
            :func:`~colt5_vision.ops.routed_window_attention`.
        curve: (M,) raster indices along which the queries are spread; default: a Z-order curve.
        group: of processes that have the other heads; see :mod:`~colt5_vision.swap.heads`.

    Source: optimal allocation (Neyman 1934), to a ratio of sums.
    """
    prefix, length = num_prefix_tokens, k.shape[2]
    wide = wide_dtype(q)
    tiny = torch.finfo(wide).tiny

    # queries spread over the map, and what lies beyond their windows
    curve = morton_order(*grid_size, q.device) if curve is None else curve
    count = min(_PROBES, curve.shape[0])
    rows = curve[(torch.arange(count, device=q.device) * 2 + 1) * curve.shape[0] // (2 * count)]
    window = window_of_token(*grid_size, window_size, q.device)
    beyond = window[rows].unsqueeze(-1) != window
    at = rows + prefix
    every = torch.arange(length, device=q.device).view(1, 1, 1, 1, -1)

    # head by head, or some probes of all heads at a time
    heads = heads_at_once(q)
    by_head = len(heads) > 1
    parts = [slice(None)]  # torch 2.11 exports no parts of an open number of probes
    if not by_head and not is_exporting():
        parts = [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]

    # sums over the probes, of each slice of the heads
    squared, outs, valids = [0.0] * len(heads), [], []
    with without_autocast(q.device.type):
        query = q[:, :, at].to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
        valid = torch.ones(q.shape[0], 1, count, 1, dtype=torch.bool, device=q.device)
        key, value = (x.to(wide) for x in (k, v))
        if not by_head:  # copied at most once for all products, which take (B * heads, N, head_dim)
            key, value = (x.flatten(0, 1).unflatten(0, x.shape[:2]) for x in (key, value))
        # a masked token asks for nothing and gives nothing, whatever stands in it
        if key_mask is not None:
            valid = key_mask[:, None, at, None]
            query = query.masked_fill(~valid, 0)
            value = value.masked_fill(~key_mask[:, None, :, None], 0)

        # their attention, and what each key has in it
        every_sees = key_mask is None and pair_bias is None
        for part in parts:
            bias = None
            if pair_bias is not None:
                bias = pair_bias(at[part].view(1, 1, 1, -1, 1), every).squeeze(2)
            for i, own in enumerate(heads):
                logits = query[:, own, part] @ key[:, own].mT
                if bias is not None:
                    logits = logits + (bias if bias.shape[1] == 1 else bias[:, own])
                attention, sees = _softmax(logits, valid[:, :, part], key_mask, bias is not None)
                outs.append(attention @ value[:, own])
                valids.append(sees)
                counted = beyond[part] if every_sees else beyond[part] & sees
                own_part = attention[..., prefix:].square().mul_(counted).sum(2)
                squared[i] = squared[i] + own_part

        # times the distance of its value from their mean
        total = 0.0
        for own, square in zip(heads, squared):
            values, weight = value[:, own, prefix:], square.sqrt().unsqueeze(2)
            mean = weight @ values / weight.sum(-1, keepdim=True).clamp_min(tiny)
            apart = (values - mean).square_().sum(-1)
            total = total + (square * apart).sum(1, keepdim=True)
        importance = over_heads(total, group).clamp_min(tiny).log() / 2
    dim = 1 if by_head else 2  # of what was done apart
    return Probes(rows, torch.cat(valids, dim), torch.cat(outs, dim), importance)


def heads_at_once(q: Tensor) -> list[slice]:
    """Of (B, heads, N, head_dim): one head at a time on a CPU, whose cache then holds the logits;
    all elsewhere, and in a graph."""
    if q.device.type == "cpu" and not is_compiling():
        return [slice(head, head + 1) for head in range(q.shape[1])]
    return [slice(None)]


def _softmax(
    logits: Tensor, valid: Tensor, key_mask: Tensor | None, biased: bool
) -> tuple[Tensor, Tensor]:
    """Attention of the probes, and which of the valid ones see something."""
    lowest = torch.finfo(logits.dtype).min
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], lowest)
    if key_mask is not None or biased:
        logits = logits.clamp_min(lowest)  # a row of -inf would give NaN
        valid = valid & (logits.amax(-1, keepdim=True) > lowest / 2)
    return logits.softmax(-1), valid


@torch.no_grad()
def correction(probes: Probes, estimate: Tensor, q: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """What is missing to full attention: known at the probes, for all others the mean over probes
    with like queries.

    An estimate from one sample of keys errs alike for like queries.

    Args:
        estimate: (B, heads, n, head_dim), what the probes got.
        q: (B, heads, P + N, head_dim).

    Returns:
        (B, heads, P + N, head_dim), in the dtype of ``q``; 0 for the prefix tokens.

    Source: kernel regression (Nadaraya 1964, Watson 1964), with a Gaussian kernel.
    """
    wide, prefix = probes.out.dtype, num_prefix_tokens
    with without_autocast(q.device.type):
        error = (probes.out - estimate.to(wide)).masked_fill(~probes.valid, 0)
        query = q[:, :, probes.rows + prefix].to(wide).masked_fill(~probes.valid, 0)
        count = probes.valid.sum(2, keepdim=True).clamp_min(1)
        mean = query.sum(2, keepdim=True) / count
        key = (query - mean).masked_fill(~probes.valid, 0)
        square = key.square().sum(-1, keepdim=True)
        least = 1e-6 * mean.square().sum(-1, keepdim=True)
        spread = (square.sum(2, keepdim=True) / count).maximum(least)
        # queries that are all zero are all alike
        alike = spread < torch.finfo(wide).tiny ** 0.5
        unit = spread.masked_fill(alike, 1).rsqrt().masked_fill(alike, 0)

        # -sharpness |q - q_p|², in that unit, but for what is the same for all probes
        key = 2 * _SHARPNESS * unit * key
        bias = (-_SHARPNESS * unit.square() * square).mT
        if q.dtype == wide:
            key = unit * key
            bias = bias - mean @ key.mT
        else:  # small numbers, which few digits hold
            q = (q.to(wide) - mean) * unit
            far = q.norm(dim=-1, keepdim=True)
            q = q * (_FARTHEST / far).clamp_max(1)
        q, key, error, bias = (x.to(estimate.dtype) for x in (q, key, error, bias))
        bias = bias.masked_fill(~probes.valid.mT, torch.finfo(q.dtype).min)
        missing = scaled_dot_product_attention(q, key, error, attn_mask=bias, scale=1.0)
        if prefix:
            missing[:, :, :prefix] = 0
        return missing
