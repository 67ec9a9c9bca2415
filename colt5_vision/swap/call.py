"""One call of ``scaled_dot_product_attention`` as the routed attention takes it: the map last,
other tokens in front, as many heads of keys as of queries."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch_internals import has_autocast
from ..ops.routed_window_attention.gathered import PairBias
from .adapter import Masks, Place
from .heads import gather_mask, gather_tokens, part_lengths, shard_order
from .site import Site

_OFF = -1e4 / 2  # below it, an additive mask of keys masks


class Call(NamedTuple):
    """The arguments of ``scaled_dot_product_attention``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def with_heads(call: Call, heads: int | None) -> Call:
    """A call on (B * heads, L, head_dim) as one on (B, heads, L, head_dim)."""
    if heads is None or call.query.ndim != 3:
        return call
    mask = call.attn_mask
    if mask is not None and mask.ndim == 3 and mask.shape[0] == call.query.shape[0]:
        mask = mask.unflatten(0, (-1, heads))
    q, k, v = (x.unflatten(0, (-1, heads)) for x in call[:3])
    return call._replace(query=q, key=k, value=v, attn_mask=mask)


@torch.compiler.disable
def whole_sequence(call: Call, site: Site) -> tuple[Call, list[int]]:
    """A call on this process's part of the tokens as one on all of them, for some of the heads; and
    the lengths of the processes' parts."""
    group, device = site.group, call.query.device
    own, keys = call.query.shape[2], call.key.shape[2]
    lengths = part_lengths(own, site.shards.uneven, group, device)
    of_keys = lengths if keys == own else part_lengths(keys, site.shards.uneven, group, device)
    q = gather_tokens(call.query, lengths, group)
    k, v = (gather_tokens(x, of_keys, group) for x in (call.key, call.value))
    mask = call.attn_mask
    if mask is not None and mask.ndim > 0 and mask.shape[-1] == keys:
        mask = gather_mask(mask, of_keys, group)
    return call._replace(query=q, key=k, value=v, attn_mask=mask), lengths


class Arranged(NamedTuple):
    """A call over P other tokens and the N of the map, in this order."""

    q: Tensor  # (B, heads, P + N, head_dim)
    k: Tensor
    v: Tensor
    features: Tensor  # (B, N, heads * head_dim) of the keys, before they are repeated
    key_mask: Tensor | None  # (B, P + N)
    pair_bias: PairBias | None
    rows: Tensor | None  # (B, P + N) bool, False for a query that sees nothing; None: none such
    num_others: int  # P
    before: int  # of the others, in front of the map
    queries: str  # "all", or "map": the queries were those of the map alone
    order: Tensor | None  # of the site
    shards: Tensor | None  # (P + N,), which token each of the call's is; None: they are in order


def arrange(
    call: Call, site: Site, place: Place, masks: Masks, own_bias: PairBias | None
) -> Arranged | str:
    """A call with the map where the routed attention expects it, or why it cannot be routed.

    Args:
        place, masks: of the layer.
        own_bias: the layer's own, for positions in the order of the call.
    """
    q, k, v = autocast_like(call.query, call.key, call.value)
    if q.ndim != 4 or k.shape[:1] != q.shape[:1] or v.shape[-1] != q.shape[-1]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        return f"queries, keys and values of shapes {shapes} are no self-attention"

    # the map among the keys, and which of the tokens ask
    sides = other_tokens(site, place, k.shape[2])
    if sides is None:
        return f"{k.shape[2]} keys are not a map of {_named(site)} and its other tokens"
    before, behind = sides
    others = before + behind
    if q.shape[2] not in (k.shape[2], site.tokens):
        return f"{q.shape[2]} queries are neither all of the {k.shape[2]} tokens nor their map"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads of queries do not divide among {k.shape[1]} of keys"
    queries = "all" if q.shape[2] == k.shape[2] else "map"

    # the mask and the bias, for positions in the order of the call
    key_mask, given, rows = read_mask(call.attn_mask, q, k, masks)
    pair_bias = _sum_of(own_bias, given)

    # parts of several processes into one sequence
    shards = None
    if site.shards is not None and site.shards.apart and before:
        if pair_bias is not None or queries == "map":
            return "a bias of pairs, or queries of the map alone, in parts of several processes"
        shards = shard_order(before, k.shape[2] - before, site.group.size(), q.device)
        back = shards.argsort()
        q, k, v = (x[:, :, back] for x in (q, k, v))
        key_mask = None if key_mask is None else key_mask[:, back]
        rows = None if rows is None else rows[:, back]

    # the map to the end
    if behind:
        k, v = (_others_first(x, before, others) for x in (k, v))
        q = _others_first(q, before, others) if queries == "all" else q
        key_mask = None if key_mask is None else _others_first(key_mask, before, others, dim=1)
        rows = None if rows is None else _others_first(rows, before, others, dim=1)
    if queries == "map":  # empty queries for the others
        q = nn.functional.pad(q, (0, 0, others, 0))
    if pair_bias is not None and (behind or queries == "map"):
        pair_bias = _rearranged(pair_bias, before, others, site.tokens, queries, q.device)

    # the map into raster order
    if site.order is not None:
        if pair_bias is not None:
            return "a bias of pairs, of tokens that are not in raster order"
        q, k, v = (_ordered(x, site.order, others) for x in (q, k, v))
        key_mask = None if key_mask is None else _ordered(key_mask, site.order, others)
        rows = None if rows is None else _ordered(rows, site.order, others)

    # what a router may read, before heads of keys are repeated for those of queries
    features = k[:, :, others:].transpose(1, 2).flatten(2)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return Arranged(
        q, k, v, features, key_mask, pair_bias, rows, others, before, queries, site.order, shards
    )


def restore(out: Tensor, how: Arranged) -> Tensor:
    """The output (B, heads, P + N, head_dim) in the order of the call."""
    if how.rows is not None:
        out = out.masked_fill(~how.rows[:, None, :, None], 0)
    if how.order is not None:
        out = _ordered(out, how.order.argsort(-1), how.num_others)
    if how.queries == "map":
        return out[:, :, how.num_others :]
    if how.before != how.num_others:
        front, behind = out[:, :, : how.before], out[:, :, how.before : how.num_others]
        out = torch.cat([front, out[:, :, how.num_others :], behind], 2)
    return out if how.shards is None else out[:, :, how.shards]


def other_tokens(site: Site, place: Place, length: int) -> tuple[int, int] | None:
    """How many tokens of a sequence stand before and behind the map; None if it does not fit."""
    rest = length - site.tokens
    if place == "site":
        before, behind = site.before, site.behind
    else:
        before, behind = (rest if place == side else 0 for side in ("before", "behind"))
    return (before, behind) if rest >= 0 and before + behind == rest else None


def _named(site: Site) -> str:
    frames, height, width = site.grid
    volume = "" if frames == 1 else f"{frames} x "
    more = f" with {len(site.more)} other images" if site.more else ""
    return f"{volume}{height} x {width} tokens{more}"


def _others_first(x: Tensor, before: int, others: int, dim: int = 2) -> Tensor:
    end = x.shape[dim] - (others - before)
    front, middle = x.narrow(dim, 0, before), x.narrow(dim, before, end - before)
    return torch.cat([front, x.narrow(dim, end, others - before), middle], dim)


def _ordered(x: Tensor, order: Tensor, others: int) -> Tensor:
    """The map's tokens of (B, heads, P + N, D) or (B, P + N) in an order (B or 1, N)."""
    place = order.expand(x.shape[0], -1) + others
    own = torch.arange(others, device=x.device).expand(x.shape[0], -1)
    place = torch.cat([own, place], 1)
    if x.ndim == 2:
        return x.gather(1, place)
    return x.gather(2, place[:, None, :, None].expand_as(x))


def _rearranged(
    bias: PairBias, before: int, others: int, tokens: int, queries: str, device
) -> PairBias:
    """A bias of positions in the order of the call, for positions with the others in front."""
    place = torch.arange(others + tokens, device=device)
    place = torch.cat([place[:before], place[before + tokens :], place[before : before + tokens]])
    row = place
    if queries == "map":
        row = (torch.arange(others + tokens, device=device) - others).clamp_min(0)
    return lambda i, j: bias(row[i], place[j])


def _sum_of(first: PairBias | None, second: PairBias | None) -> PairBias | None:
    if first is None or second is None:
        return second if first is None else first
    return lambda i, j: first(i, j) + second(i, j)


def read_mask(
    attn_mask: Tensor | None, q: Tensor, k: Tensor, masks: Masks = "given"
) -> tuple[Tensor | None, PairBias | None, Tensor | None]:
    """The mask of a call as (key mask, pair bias, query mask), each None where it says nothing.

    Args:
        attn_mask: broadcasts to (B, heads, queries, keys), bool (True = attends) or additive.
        q, k: (B, heads, L, head_dim) of the call.
        masks: how to read it, see :data:`Masks`.
    """
    if attn_mask is None or attn_mask.ndim == 0:
        return None, None, None
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    mask = attn_mask.reshape(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
    mask = _narrowed(mask)
    if masks == "keys":
        mask = mask[:, :1, :1]
        mask = mask if mask.dtype == torch.bool else mask > _OFF
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(batch, keys), None, None
    if masks == "outer" and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]:
        valid = mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(batch, keys)
        valid = valid if valid.dtype == torch.bool else valid > _OFF
        return valid, None, valid

    mask = mask.expand(batch, heads, queries, keys)
    b = torch.arange(batch, device=q.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=q.device).view(1, -1, 1, 1, 1)

    def bias(i: Tensor, j: Tensor) -> Tensor:
        chosen = mask[b, h, i, j]
        return chosen if chosen.dtype != torch.bool else torch.where(chosen, 0.0, -math.inf)

    return None, bias, None


def _narrowed(mask: Tensor) -> Tensor:
    """A mask without the heads and queries it was merely expanded over."""
    for dim in (1, 2):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def dense_bias(pair_bias: PairBias, queries: int, keys: int, device) -> Tensor:
    """(B or 1, heads or 1, queries, keys): a bias for attention that is not routed."""
    i = torch.arange(queries, device=device).view(1, 1, 1, -1, 1)
    j = torch.arange(keys, device=device).view(1, 1, 1, 1, -1)
    return pair_bias(i, j).squeeze(2)


def autocast_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast would give scaled dot-product attention."""
    device = tensors[0].device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
