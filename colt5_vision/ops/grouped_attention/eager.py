"""Attention of groups of queries to their own keys in plain torch: a few groups at a time, their
keys gathered, through SDPA's fused kernels; memory O(N).

Heads that share their groups are read together: a row holds key and value of all of them, and a
gather copies whole rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import HALVES
from ..dtypes import wide_dtype
from ..sdpa import attend, attend_backward, masked_logit

_HELD = {"cpu": 1 << 20}  # gathered elements at once: on a CPU they stay in the cache
_HELD_ELSEWHERE = 1 << 26
_OFF = (
    -1e30
)  # bias of a key that must not be read, finite: a part without any key stays free of NaN


class _Routes(NamedTuple):
    """Indices and biases that forward and backward share; Z = samples x routes."""

    routes: int
    queries: Tensor  # (Z * G, L), rows of q, a spare one where a group is not full
    slot: Tensor  # (Z, N), place of each token among the G * L of its route, G * L for none
    keys: Tensor  # (Z * G, P + M), rows of k and v, a spare one of zeros for an empty slot
    bias: Tensor  # (Z * G, 1 or heads of a route, 1, P + M + C), wide
    prefix_bias: Tensor | None  # (B, 1, 1, P + N)


def _routes(
    q: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    prefix: int,
) -> _Routes:
    batch, _, length, _ = q.shape
    routes, count, size = groups.shape[1:]
    wide, device = wide_dtype(q), q.device

    # rows of a route follow those of the route before, each with a spare one at its end
    start = torch.arange(batch * routes, device=device).view(batch, routes, 1, 1) * (length + 1)
    queries = torch.where(groups < 0, length, groups + prefix) + start
    used = torch.nn.functional.pad(keys >= 0, (prefix, 0), value=True)
    own = torch.arange(prefix, device=device).expand(*keys.shape[:3], -1)
    at = torch.cat([own, keys.clamp_min(0) + prefix], -1)
    if key_mask is not None:
        used = used & key_mask[:, None, None].expand(-1, routes, count, -1).gather(-1, at)

    # where each token's result is found
    place = torch.arange(count * size, device=device).expand(batch, routes, -1)
    slot = groups.new_full((batch, routes, length - prefix + 1), count * size)
    token = torch.where(groups < 0, length - prefix, groups).flatten(2)
    slot = slot.scatter(-1, token, place)[..., : length - prefix]

    # what is added to the logits
    bias = torch.zeros(used.shape, dtype=wide, device=device)
    if log_weights is not None:
        bias = torch.nn.functional.pad(log_weights.to(wide).clamp_min(_OFF), (prefix, 0))
    bias = bias.masked_fill(~used, _OFF).flatten(0, 2)[:, None, None]
    if log_mass is not None:
        rest = _by_route(log_mass.to(wide).clamp_min(_OFF), routes).unsqueeze(2)
        bias = torch.cat([bias.expand(-1, rest.shape[1], -1, -1), rest], -1)
    prefix_bias = None
    if prefix and key_mask is not None:
        prefix_bias = torch.zeros(key_mask.shape, dtype=wide, device=device)
        prefix_bias = prefix_bias.masked_fill(~key_mask, masked_logit(q))[:, None, None]
    rows = torch.where(used, at, length) + start
    return _Routes(
        routes, queries.flatten(0, 2), slot.flatten(0, 1), rows.flatten(0, 2), bias, prefix_bias
    )


def _by_route(x: Tensor, routes: int) -> Tensor:
    """(B, heads, G, ...) -> (Z * G, heads of a route, ...)"""
    return x.unflatten(1, (routes, -1)).transpose(2, 3).flatten(0, 2)


def _by_head(x: Tensor, batch: int, routes: int) -> Tensor:
    """The inverse of ``_by_route``."""
    return x.unflatten(0, (batch, routes, -1)).transpose(2, 3).flatten(1, 2)


def _rows(*parts: Tensor, routes: int) -> Tensor:
    """(B, heads, P + N, D) each -> (Z * (P + N + 1), heads of a route, their D side by side), a row
    of zeros at the end of each route."""
    batch, heads, length, _ = parts[0].shape
    width = sum(part.shape[-1] for part in parts)
    shape = (batch, routes, length + 1, heads // routes, width)
    rows, start = parts[0].new_empty(shape), 0
    rows[:, :, length:] = 0
    for part in parts:
        end = start + part.shape[-1]
        rows[:, :, :length, :, start:end] = part.unflatten(1, (routes, -1)).transpose(2, 3)
        start = end
    return rows.flatten(0, 2)


def _tokens(x: Tensor, how: _Routes, batch: int, spare: float) -> Tensor:
    """(Z * G, heads of a route, L, ...) -> (B, heads, N, ...); ``spare`` for those in no group."""
    x = x.unflatten(0, (how.slot.shape[0], -1)).transpose(2, 3).flatten(1, 2)
    x = torch.cat([x, x.new_full((x.shape[0], 1, *x.shape[2:]), spare)], 1)
    index = how.slot.view(*how.slot.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    x = x.gather(1, index)
    return x.unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)


class _Part(NamedTuple):
    """A few groups of all heads of a route: what one call of SDPA takes."""

    at: slice
    query: Tensor  # (groups, heads of a route, L, D)
    key: Tensor  # (groups, heads of a route, P + M + C, D)
    value: Tensor
    bias: Tensor


def _parts(
    q: Tensor, k: Tensor, v: Tensor, pooled: tuple[Tensor, Tensor] | None, how: _Routes
) -> Iterator[_Part]:
    dim, total = q.shape[-1], how.bias.shape[-1]
    query, both = _rows(q, routes=how.routes), _rows(k, v, routes=how.routes)
    exact, share = how.keys.shape[1], both.shape[1]
    if pooled is not None:
        pooled = tuple(_by_route(x, how.routes) for x in pooled)
    held = _HELD.get(q.device.type, _HELD_ELSEWHERE)
    step = max(1, held // max(1, share * dim * (2 * total + how.queries.shape[1])))
    widen = q.device.type != "cpu" and q.dtype in HALVES  # kernels there take a bias as the query

    for start in range(0, how.queries.shape[0], step):
        at = slice(start, start + step)
        rows, index = how.keys[at], how.queries[at]
        own = query[index.flatten()].unflatten(0, index.shape).transpose(1, 2)
        seen = both[rows.flatten()].unflatten(0, rows.shape).transpose(1, 2)
        key, value = seen[..., :dim], seen[..., dim:]
        if total > exact:
            key, value = (torch.cat([x, y[at]], 2) for x, y in zip((key, value), pooled))
        if widen:
            own, key, value = own.float(), key.float(), value.float()
        yield _Part(at, own, key, value, how.bias[at])


def _blank_masked(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A masked key is never read: a weight of 0 would not stop its NaN or inf."""
    if key_mask is None:
        return k, v
    off = ~key_mask[:, None, :, None]
    return k.masked_fill(off, 0), v.masked_fill(off, 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out (B, heads, P + N, D) and lse (B, heads, P + N), +inf for a query without any key.

    Args:
        groups, keys, log_weights: (B, R, G, L), (B, R, G, M), (B, R, G, M); -1 for an empty slot.
        pooled: keys and values, (B, heads, G, C, D); ``log_mass`` (B, heads, G, C).
        key_mask: (B, P + N).
    """
    k, v = _blank_masked(k, v, key_mask)
    how = _routes(q, groups, keys, log_weights, log_mass, key_mask, prefix)
    out = torch.zeros_like(q[:, :, prefix:])
    lse = q.new_full(out.shape[:3], float("inf"), dtype=wide_dtype(q))
    if how.bias.numel():  # there are groups, and keys
        found = [
            attend(part.query, part.key, part.value, part.bias, scale)
            for part in _parts(q, k, v, pooled, how)
        ]
        outs, lses = zip(*found)
        out = _tokens(torch.cat(outs).to(q.dtype), how, q.shape[0], 0.0)
        lse = _tokens(torch.cat(lses), how, q.shape[0], float("inf"))
    empty = lse < _OFF / 2
    if prefix:
        own = attend(q[:, :, :prefix], k, v, how.prefix_bias, scale)
        out, lse = torch.cat([own[0], out], 2), torch.cat([own[1], lse], 2)
        empty = torch.cat([own[1] < masked_logit(q) / 2, empty], 2)
    return out.masked_fill_(empty.unsqueeze(-1), 0), lse.masked_fill_(empty, float("inf"))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    prefix: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, and (None where they are not given) of log_weights, pooled keys, pooled
    values and log_mass."""
    batch, dim, grad = q.shape[0], q.shape[-1], grad.contiguous()
    k, v = _blank_masked(k, v, key_mask)
    how = _routes(q, groups, keys, log_weights, log_mass, key_mask, prefix)
    exact, wide = how.keys.shape[1], wide_dtype(q)
    biased = log_weights is not None or log_mass is not None
    given = _rows(grad, out, routes=how.routes)
    lse_rows = torch.nn.functional.pad(lse, (0, 1), value=float("inf"))
    lse_rows = lse_rows.unflatten(1, (how.routes, -1)).transpose(2, 3).flatten(0, 2)

    # of exact keys and values, by rows; of queries, pooled ones and biases, by groups
    rows = torch.zeros(
        batch * how.routes * (q.shape[2] + 1), given.shape[1], 2 * dim, dtype=wide, device=q.device
    )
    by_group: list[list[Tensor]] = [[], [], [], []]
    for part in _parts(q, k, v, pooled, how) if how.bias.numel() else ():
        index = how.queries[part.at]
        own = given[index.flatten()].unflatten(0, index.shape).transpose(1, 2).to(part.query.dtype)
        tensors = [own[..., :dim], part.query, part.key, part.value, own[..., dim:]]
        if biased:
            # one more feature, 1 in every query and 0 elsewhere, changes no logit, and its key
            # gradient is the bias's (eight of them, to keep the row alignment of the kernels)
            fill = (0.0, 1.0, 0.0, 0.0, 0.0)
            tensors = [torch.nn.functional.pad(x, (0, 8), value=y) for x, y in zip(tensors, fill)]
        own_lse = lse_rows[index.flatten()].unflatten(0, index.shape).transpose(1, 2)
        dq, dk, dv = attend_backward(*tensors, own_lse.contiguous(), part.bias, scale)
        both = torch.cat([dk[:, :, :exact, :dim], dv[:, :, :exact, :dim]], -1).transpose(1, 2)
        rows.index_add_(0, how.keys[part.at].flatten(), both.flatten(0, 1).to(wide))
        found = (dq[..., :dim], dk[:, :, exact:, :dim], dv[:, :, exact:, :dim], dk[..., -1] / scale)
        for kept, x in zip(by_group, found):
            kept.append(x)

    rows = rows.unflatten(0, (batch, how.routes, q.shape[2] + 1))[:, :, :-1]
    rows = rows.transpose(2, 3).flatten(1, 2)  # (B, heads, P + N, 2 D)
    grad_k, grad_v = (x.clone() for x in rows.split(dim, -1))
    grad_q = torch.zeros_like(q[:, :, prefix:])
    further = (log_weights, *(pooled or (None, None)), log_mass)
    grad_weights, grad_pk, grad_pv, grad_mass = (
        None if x is None else torch.zeros_like(x) for x in further
    )
    if how.bias.numel():
        dq, dk, dv, dbias = (torch.cat(parts) for parts in by_group)
        grad_q = _tokens(dq.to(q.dtype), how, batch, 0.0)
        if log_weights is not None:
            grad_weights = dbias[:, :, prefix:exact].sum(1).view_as(log_weights)
        if pooled is not None:
            grad_pk, grad_pv, grad_mass = (
                _by_head(x, batch, how.routes) for x in (dk, dv, dbias[:, :, exact:])
            )
    if prefix:
        own = (grad[:, :, :prefix], q[:, :, :prefix], k, v, out[:, :, :prefix], lse[:, :, :prefix])
        dq, dk, dv = attend_backward(*own, how.prefix_bias, scale)
        grad_q = torch.cat([dq, grad_q], 2)
        grad_k, grad_v = grad_k + dk, grad_v + dv
    if key_mask is not None:
        off = ~key_mask[:, None, :, None]
        grad_k, grad_v = grad_k.masked_fill(off, 0), grad_v.masked_fill(off, 0)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_weights, grad_pk, grad_pv, grad_mass


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    keys: Tensor,
    log_weights: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    log_mass: Tensor | None,
    key_mask: Tensor | None,
    prefix: int,
    scale: float,
) -> Tensor:
    """The same by public differentiable operations alone, all groups at once, logits held: for
    transforms, second derivatives and exporters."""
    k, v = _blank_masked(k, v, key_mask)
    how = _routes(q, groups, keys, log_weights, log_mass, key_mask, prefix)
    wide = wide_dtype(q)

    def read(x: Tensor, index: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1)).unflatten(1, (how.routes, -1)).transpose(2, 3)
        return x.flatten(0, 2)[index].transpose(1, 2)

    def softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        logits = (query @ key.mT).to(wide) * scale + bias
        seen = (bias > _OFF / 2).any(-1, keepdim=True)
        return (logits.softmax(-1).to(value.dtype) @ value).masked_fill(~seen, 0)

    query, key, value = read(q, how.queries), read(k, how.keys), read(v, how.keys)
    if pooled is not None:
        own = (_by_route(x, how.routes) for x in pooled)
        key, value = (torch.cat([x, y], 2) for x, y in zip((key, value), own))
    out = _tokens(softmax(query, key, value, how.bias), how, q.shape[0], 0.0)
    if prefix:
        bias = q.new_zeros(1, 1, 1, 1, dtype=wide) if how.prefix_bias is None else how.prefix_bias
        out = torch.cat([softmax(q[:, :, :prefix], k, v, bias), out], 2)
    return out
