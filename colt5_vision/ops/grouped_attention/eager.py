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
from ..sdpa import attend, attend_backward
from .call import Call, blank_masked, prefix_backward, prefix_bias, prefix_forward

_HELD = {"cpu": 1 << 20}  # gathered elements at once: on a CPU they stay in the cache
_HELD_ELSEWHERE = 1 << 26
_OFF = (
    -1e30
)  # bias of a key that must not be read, finite: a part without any key stays free of NaN


def _readable(call: Call) -> Call:
    """What is switched off is never read: a weight of 0 would not stop its NaN or inf."""
    call = blank_masked(call)
    if call.log_mass is not None:
        off = (call.log_mass == float("-inf")).unsqueeze(-1)
        keys, values = (x.masked_fill(off, 0) for x in (call.pooled_keys, call.pooled_values))
        call = call._replace(pooled_keys=keys, pooled_values=values)
    return call


class _Routes(NamedTuple):
    """Indices and biases that forward and backward share; Z = samples x routes."""

    routes: int
    queries: Tensor  # (Z * G, L), rows of q, a spare one where a group is not full
    slot: Tensor  # (Z, N), place of each token among the G * L of its route, G * L for none
    keys: Tensor  # (Z * G, P + M), rows of k and v, a spare one of zeros for an empty slot
    bias: Tensor  # (Z * G, 1 or heads of a route, 1, P + M + C), wide


def _routes(call: Call) -> _Routes:
    q, groups, keys, prefix = call.q, call.groups, call.keys, call.prefix
    batch, _, length, _ = q.shape
    routes, count, size = groups.shape[1:]
    wide, device = wide_dtype(q), q.device

    # rows of a route follow those of the route before, each with a spare one at its end
    start = torch.arange(batch * routes, device=device).view(batch, routes, 1, 1) * (length + 1)
    queries = torch.where(groups < 0, length, groups + prefix) + start
    used = keys >= 0
    if call.log_weights is not None:
        used = used & (call.log_weights != float("-inf"))
    used = torch.nn.functional.pad(used, (prefix, 0), value=True)
    own = torch.arange(prefix, device=device).expand(*keys.shape[:3], -1)
    at = torch.cat([own, keys.clamp_min(0) + prefix], -1)
    if call.key_mask is not None:
        used = used & call.key_mask[:, None, None].expand(-1, routes, count, -1).gather(-1, at)

    # where each token's result is found
    place = torch.arange(count * size, device=device).expand(batch, routes, -1)
    slot = groups.new_full((batch, routes, length - prefix + 1), count * size)
    token = torch.where(groups < 0, length - prefix, groups).flatten(2)
    slot = slot.scatter(-1, token, place)[..., : length - prefix]

    # what is added to the logits
    bias = torch.zeros(used.shape, dtype=wide, device=device)
    if call.log_weights is not None:
        bias = torch.nn.functional.pad(call.log_weights.to(wide).clamp_min(_OFF), (prefix, 0))
    bias = bias.masked_fill(~used, _OFF).flatten(0, 2)[:, None, None]
    if call.log_mass is not None:
        rest = _by_route(call.log_mass.to(wide).clamp_min(_OFF), routes).unsqueeze(2)
        bias = torch.cat([bias.expand(-1, rest.shape[1], -1, -1), rest], -1)
    rows = torch.where(used, at, length) + start
    return _Routes(routes, queries.flatten(0, 2), slot.flatten(0, 1), rows.flatten(0, 2), bias)


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


def _pooled(call: Call, how: _Routes) -> tuple[Tensor, ...]:
    """Pooled keys and values, (Z * G, heads of a route, C, D); nothing where there are none."""
    given = (call.pooled_keys, call.pooled_values) if call.log_mass is not None else ()
    return tuple(_by_route(x, how.routes) for x in given)


class _Part(NamedTuple):
    """A few groups of all heads of a route: what one call of SDPA takes."""

    at: slice
    query: Tensor  # (groups, heads of a route, L, D)
    key: Tensor  # (groups, heads of a route, P + M + C, D)
    value: Tensor
    bias: Tensor


def _parts(call: Call, how: _Routes) -> Iterator[_Part]:
    q, dim, total = call.q, call.q.shape[-1], how.bias.shape[-1]
    query, both = _rows(q, routes=how.routes), _rows(call.k, call.v, routes=how.routes)
    exact, share = how.keys.shape[1], both.shape[1]
    pooled = _pooled(call, how)
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


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out (B, heads, P + N, D) and lse (B, heads, P + N), +inf for a query without any key."""
    call = _readable(call)
    how = _routes(call)
    q, prefix = call.q, call.prefix

    # the groups, a few at a time
    out = torch.zeros_like(q[:, :, prefix:])
    lse = q.new_full(out.shape[:3], float("inf"), dtype=wide_dtype(q))
    if how.bias.numel():  # there are groups, and keys
        found = [
            attend(part.query, part.key, part.value, part.bias, call.scale)
            for part in _parts(call, how)
        ]
        outs, lses = zip(*found)
        out = _tokens(torch.cat(outs).to(q.dtype), how, q.shape[0], 0.0)
        lse = _tokens(torch.cat(lses), how, q.shape[0], float("inf"))
    empty = lse < _OFF / 2
    out, lse = out.masked_fill_(empty.unsqueeze(-1), 0), lse.masked_fill_(empty, float("inf"))

    # the prefix, to everything
    if prefix:
        out, lse = (torch.cat(both, 2) for both in zip(prefix_forward(call), (out, lse)))
    return out, lse


def backward(grad: Tensor, out: Tensor, lse: Tensor, call: Call) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, and (None where they are not given) of log_weights, pooled keys, pooled
    values and log_mass."""
    call, grad = _readable(call), grad.contiguous()
    how = _routes(call)
    q, prefix, scale = call.q, call.prefix, call.scale
    batch, dim = q.shape[0], q.shape[-1]
    exact, wide = how.keys.shape[1], wide_dtype(q)
    biased = call.log_weights is not None or call.log_mass is not None

    # what comes from the loss, by rows as queries and keys
    given = _rows(grad, out, routes=how.routes)
    lse_rows = torch.nn.functional.pad(lse, (0, 1), value=float("inf"))
    lse_rows = lse_rows.unflatten(1, (how.routes, -1)).transpose(2, 3).flatten(0, 2)

    # sums: of exact keys and values by rows, of queries, pooled ones and biases by groups
    rows = torch.zeros(
        batch * how.routes * (q.shape[2] + 1), given.shape[1], 2 * dim, dtype=wide, device=q.device
    )
    by_group: list[list[Tensor]] = [[], [], [], []]

    # the groups, a few at a time
    for part in _parts(call, how) if how.bias.numel() else ():
        # what they were called with, and what came out
        index = how.queries[part.at]
        own = given[index.flatten()].unflatten(0, index.shape).transpose(1, 2).to(part.query.dtype)
        own_lse = lse_rows[index.flatten()].unflatten(0, index.shape).transpose(1, 2)
        tensors = [own[..., :dim], part.query, part.key, part.value, own[..., dim:]]
        if biased:
            # one more feature, 1 in every query and 0 elsewhere, changes no logit, and its key
            # gradient is the bias's (eight of them, to keep the row alignment of the kernels)
            fill = (0.0, 1.0, 0.0, 0.0, 0.0)
            tensors = [torch.nn.functional.pad(x, (0, 8), value=y) for x, y in zip(tensors, fill)]

        # their gradients; a key may be read by several groups
        dq, dk, dv = attend_backward(*tensors, own_lse.contiguous(), part.bias, scale)
        both = torch.cat([dk[:, :, :exact, :dim], dv[:, :, :exact, :dim]], -1).transpose(1, 2)
        rows.index_add_(0, how.keys[part.at].flatten(), both.flatten(0, 1).to(wide))
        found = (dq[..., :dim], dk[:, :, exact:, :dim], dv[:, :, exact:, :dim], dk[..., -1] / scale)
        for kept, x in zip(by_group, found):
            kept.append(x)

    # keys and values, from rows back to tokens and heads
    rows = rows.unflatten(0, (batch, how.routes, q.shape[2] + 1))[:, :, :-1]
    rows = rows.transpose(2, 3).flatten(1, 2)  # (B, heads, P + N, 2 D)
    grad_k, grad_v = (x.clone() for x in rows.split(dim, -1))

    # the others, from groups; 0 where there are none
    grad_q = torch.zeros_like(q[:, :, prefix:])
    grad_weights, grad_pk, grad_pv, grad_mass = (
        None if x is None else torch.zeros_like(x) for x in call.further
    )
    if how.bias.numel():
        dq, dk, dv, dbias = (torch.cat(parts) for parts in by_group)
        grad_q = _tokens(dq.to(q.dtype), how, batch, 0.0)
        if call.log_weights is not None:
            grad_weights = dbias[:, :, prefix:exact].sum(1).view_as(call.log_weights)
        if call.log_mass is not None:
            grad_pk, grad_pv, grad_mass = (
                _by_head(x, batch, how.routes) for x in (dk, dv, dbias[:, :, exact:])
            )

    # the prefix, which reads everything
    if prefix:
        dq, dk, dv = prefix_backward(grad, out, lse, call)
        grad_q = torch.cat([dq, grad_q], 2)
        grad_k, grad_v = grad_k + dk, grad_v + dv
    grad_k, grad_v = grad_k.to(call.k.dtype), grad_v.to(call.v.dtype)
    return grad_q, grad_k, grad_v, grad_weights, grad_pk, grad_pv, grad_mass


def grouped_attention(call: Call) -> Tensor:
    """The same by public differentiable operations alone, all groups at once, logits held: for
    transforms, second derivatives and exporters."""
    call = _readable(call)
    how = _routes(call)
    q, k, v, prefix, wide = call.q, call.k, call.v, call.prefix, wide_dtype(call.q)

    def read(x: Tensor, index: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1)).unflatten(1, (how.routes, -1)).transpose(2, 3)
        return x.flatten(0, 2)[index].transpose(1, 2)

    def softmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        logits = (query @ key.mT).to(wide) * call.scale + bias
        seen = (bias > _OFF / 2).any(-1, keepdim=True)
        return (logits.softmax(-1).to(value.dtype) @ value).masked_fill(~seen, 0)

    query, key, value = read(q, how.queries), read(k, how.keys), read(v, how.keys)
    if call.log_mass is not None:
        key, value = (torch.cat([x, y], 2) for x, y in zip((key, value), _pooled(call, how)))
    out = _tokens(softmax(query, key, value, how.bias), how, q.shape[0], 0.0)
    if prefix:
        bias = prefix_bias(call)
        bias = q.new_zeros(1, 1, 1, 1, dtype=wide) if bias is None else bias
        out = torch.cat([softmax(q[:, :, :prefix], k, v, bias), out], 2)
    return out
