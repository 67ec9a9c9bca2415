"""Window ∪ routed attention in plain torch: parts by SDPA, joined by their logsumexps; memory O(N).

Three parts. *Window*: every token to the keys of its window that are not routed. *Routed*: every
querying token to the prefix tokens and the routed keys, with their log weights. *Prefix*: the
prefix tokens to everything. No key counts twice for a query, so window and routed part join into
one softmax. Where the log weights do not hold within the window (``Geometry.weight_own_window``),
the window part has all keys of the window, and the routed part those beyond it: its queries then go
window by window, as each window has a bias of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtypes import wide_dtype
from ..grid import cell_slots, slot_of_token
from ..sdpa import attend, attend_backward, masked_logit
from .geometry import Geometry, free_keys, removed_keys

_PAIRS = (
    1 << 24
)  # elements held at once, of a bias or of the gradients of keys that several windows share


@dataclass
class _Plan:
    """Indices and biases that forward and backward share, made from the integer and bool inputs."""

    slots: Tensor  # (windows, w*w) raster index
    inside: Tensor  # (windows, w*w)
    slot: Tensor  # (N,) slot of each token
    window_bias: Tensor | None  # (B * windows, heads or 1, 1, w*w)
    routed: Tensor | None  # (B, heads, K, 1) index into the P + N keys
    used: Tensor | None  # (B, heads, K, 1), False for an empty slot, a masked or removed key
    routed_bias: Tensor | None  # (B, heads or 1, 1, P + K)
    routed_window: Tensor | None  # (B, heads or 1, P + K) window of a routed key, -1 for the prefix
    prefix_bias: Tensor | None  # (B, 1, 1, P + N)


def _plan(
    query: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    geo: Geometry,
) -> _Plan:
    batch, heads = query.shape[:2]
    routes, num_routed = routed.shape[1:]
    off = masked_logit(query)
    wide = wide_dtype(query)

    def bias(valid: Tensor) -> Tensor:
        return torch.zeros(valid.shape, dtype=wide, device=valid.device).masked_fill_(~valid, off)

    def per_head(x: Tensor, dim: int) -> Tensor:
        return x if routes == 1 else x.repeat_interleave(heads // routes, dim)

    # windows
    slots, inside = cell_slots(geo.height, geo.width, geo.window, query.device)
    slot = slot_of_token(geo.height, geo.width, geo.window, query.device)
    plan = _Plan(slots, inside, slot, None, None, None, None, None, None)

    # slots that hold a key
    used = routed >= 0
    if log_weights is not None:
        used = used & (log_weights != float("-inf"))

    # keys of a window: in the map, valid, and not routed for its queries already
    taken = num_routed and geo.weight_own_window
    if taken or key_mask is not None or slots.numel() != geo.tokens:
        free = free_keys(routed, key_mask, geo)
        valid = free[..., slots] & inside  # (B, R, windows, w*w)
        plan.window_bias = per_head(bias(valid.transpose(1, 2).flatten(0, 1)), 1).unsqueeze(2)

    # prefix and routed keys, each with its weight
    if num_routed or geo.prefix:
        index = routed.clamp_min(0) + geo.prefix
        if key_mask is not None:
            used = used & key_mask.unsqueeze(1).expand(-1, routes, -1).gather(-1, index)
        part = bias(used)
        if log_weights is not None:
            part = torch.where(used, log_weights.to(wide).clamp_min(off), part)
        prefix = torch.zeros(batch, routes, geo.prefix, dtype=wide, device=query.device)
        if key_mask is not None:
            prefix.masked_fill_(~key_mask[:, None, : geo.prefix], off)

        # as the kernels take them, and which windows do not read which
        plan.routed_bias = per_head(torch.cat([prefix, part], -1), 1).unsqueeze(2)
        if not geo.weight_own_window:
            window = slot[routed.clamp_min(0)] // slots.shape[1]
            window = torch.nn.functional.pad(window, (geo.prefix, 0), value=-1)
            plan.routed_window = per_head(window, 1)
        plan.routed = index.repeat_interleave(heads // routes, 1).unsqueeze(-1)
        plan.used = used.repeat_interleave(heads // routes, 1).unsqueeze(-1)

    # the prefix reads every valid key
    if geo.prefix and key_mask is not None:
        plan.prefix_bias = bias(key_mask)[:, None, None]
    return plan


def _windows(x: Tensor, plan: _Plan, geo: Geometry) -> Tensor:
    """(B, heads, P + N, D) -> (B * windows, heads, w*w, D), rows of all heads copied at once."""
    x = x.transpose(1, 2).index_select(1, plan.slots.flatten() + geo.prefix)
    return x.reshape(x.shape[0] * plan.slots.shape[0], plan.slots.shape[1], *x.shape[2:]).transpose(
        1, 2
    )


def _raster(x: Tensor, plan: _Plan, batch: int) -> Tensor:
    """(B * windows, heads, w*w, D) -> (B, heads, N, D)."""
    x = x.transpose(1, 2)
    x = x.reshape(batch, plan.slots.numel(), *x.shape[2:])
    return x.index_select(1, plan.slot).transpose(1, 2)


def _routed_keys(x: Tensor, plan: _Plan, geo: Geometry) -> Tensor:
    # an unused slot reads zeros, whatever stands in the token it points to
    routed = x.gather(2, plan.routed.expand(-1, -1, -1, x.shape[-1])).masked_fill(~plan.used, 0)
    return torch.cat([x[:, :, : geo.prefix], routed], 2) if geo.prefix else routed


def _blank_masked(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A masked key is never read: a weight of 0 would not stop its NaN or inf."""
    if key_mask is None:
        return k, v
    off = ~key_mask[:, None, :, None]
    return k.masked_fill(off, 0), v.masked_fill(off, 0)


def _blank_removed(
    k: Tensor, v: Tensor, routed: Tensor, log_weights: Tensor | None, geo: Geometry
) -> tuple[Tensor, Tensor]:
    """As :func:`_blank_masked`, for keys that a log weight of -inf takes from their own window."""
    removed = removed_keys(routed, log_weights, geo)
    if removed is None:
        return k, v
    off = removed.repeat_interleave(k.shape[1] // removed.shape[1], 1)  # (B, heads, N)
    off = torch.nn.functional.pad(off, (geo.prefix, 0)).unsqueeze(-1)
    return k.masked_fill(off, 0), v.masked_fill(off, 0)


def _beyond(plan: _Plan, window: Tensor, off: float) -> Tensor:
    """The bias of the prefix and the routed keys for queries of each window: a window's own keys
    are switched off.

    Args:
        window: (B or 1, L), of each query.

    Returns:
        (B, heads or 1, L, P + K).
    """
    own = plan.routed_window.unsqueeze(2) == window[:, None, :, None]
    return plan.routed_bias.masked_fill(own, off)


@dataclass
class _Group:
    """Queries of the routed part that go through one call, and the place of the call's results."""

    # index of the queries, (B, heads, Q, D) or, window by window, (B * windows, heads, w*w, D)
    rows: tuple
    keys: slice  # of the batch
    spread: int  # how often those keys stand side by side: the windows
    bias: Tensor


def _groups(
    query: Tensor, keys: Tensor, plan: _Plan, geo: Geometry, query_indices: Tensor | None
) -> Iterator[_Group]:
    """The routed part in calls, none with much more than ``_PAIRS`` gradients of keys or biases at
    once."""
    # one bias for all
    if geo.weight_own_window:
        yield _Group((slice(None),), slice(None), 1, plan.routed_bias)
        return

    off = masked_logit(query)
    batch, heads, length, head_dim = keys.shape

    # every token asks: some windows of one sample at a time
    if query_indices is None:
        count = plan.slots.shape[0]
        step = max(1, _PAIRS // max(1, heads * length * head_dim))
        for sample in range(batch):
            one = replace(
                plan,
                routed_bias=plan.routed_bias[sample : sample + 1],
                routed_window=plan.routed_window[sample : sample + 1],
            )
            for start in range(0, count, step):
                window = torch.arange(start, min(start + step, count), device=query.device)
                bias = _beyond(one, window.unsqueeze(0), off)[0].transpose(0, 1).unsqueeze(2)
                rows = slice(sample * count + start, sample * count + start + len(window))
                yield _Group((rows,), slice(sample, sample + 1), len(window), bias)
        return

    # routed queries: some rows of all samples at a time
    window = plan.slot[query_indices] // plan.slots.shape[1]
    step = max(1, _PAIRS // max(1, batch * plan.routed_window.shape[1] * length))
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        yield _Group(
            (slice(None), slice(None), rows), slice(None), 1, _beyond(plan, window[:, rows], off)
        )


def _spread(x: Tensor, group: _Group) -> Tensor:
    x = x[group.keys]
    return x if group.spread == 1 else x.expand(group.spread, -1, -1, -1)


def _queries(x: Tensor, geo: Geometry, query_indices: Tensor | None) -> Tensor:
    """The querying image tokens of (B, heads, P + N, ...)."""
    x = x[:, :, geo.prefix :]
    if query_indices is None:
        return x
    index = query_indices.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.gather(
        2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]) if x.ndim == 4 else index
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    query_indices: Tensor | None,
    geo: Geometry,
) -> tuple[Tensor, Tensor]:
    """out (B, heads, P + Q, D) and lse (B, heads, P + Q); lse is +inf for a query without any key
    (out 0)."""
    batch = q.shape[0]
    plan = _plan(q, routed, log_weights, key_mask, geo)
    k, v = _blank_masked(k, v, key_mask)

    # the window part; where every query has a bias of its window, the routed part is joined there
    by_window = plan.routed is not None and not geo.weight_own_window and query_indices is None
    near = _blank_removed(k, v, routed, log_weights, geo)
    query, key, value = (_windows(x, plan, geo) for x in (q, *near))
    out, lse = attend(query, key, value, plan.window_bias, geo.scale)
    if by_window:
        out, lse = _joined(out, lse, query, k, v, plan, geo, None)

    # from windows to the tokens that ask
    out, lse = _raster(out, plan, batch), _raster(lse.unsqueeze(-1), plan, batch).squeeze(-1)
    if query_indices is not None:
        whole = Geometry(0, geo.height, geo.width, geo.window, geo.scale)
        out, lse = _queries(out, whole, query_indices), _queries(lse, whole, query_indices)

    # the routed part, else
    if plan.routed is not None and not by_window:
        out, lse = _joined(
            out, lse, _queries(q, geo, query_indices), k, v, plan, geo, query_indices
        )

    # the prefix, which reads everything
    if geo.prefix:
        prefix_out, prefix_lse = attend(q[:, :, : geo.prefix], k, v, plan.prefix_bias, geo.scale)
        out, lse = torch.cat([prefix_out, out], 2), torch.cat([prefix_lse, lse], 2)
    empty = lse < masked_logit(q) / 2
    return out.masked_fill_(empty.unsqueeze(-1), 0), lse.masked_fill_(empty, float("inf"))


def _joined(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    plan: _Plan,
    geo: Geometry,
    query_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The window part, given, and the routed part as one softmax, in place."""
    keys, values = _routed_keys(k, plan, geo), _routed_keys(v, plan, geo)
    for group in _groups(query, keys, plan, geo, query_indices):
        at = group.rows  # slices: views
        part = attend(
            query[at], _spread(keys, group), _spread(values, group), group.bias, geo.scale
        )
        share = torch.sigmoid(part[1] - lse[at]).unsqueeze(
            -1
        )  # exp(part_lse - logaddexp(lse, part_lse))
        out[at].lerp_(part[0], share.to(out.dtype))
        lse[at].copy_(torch.logaddexp(lse[at], part[1]))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: Tensor,
    log_weights: Tensor | None,
    key_mask: Tensor | None,
    query_indices: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geo: Geometry,
    with_log_weights: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and (if given and asked for) log_weights."""
    batch, heads, _, dim = q.shape
    grad = grad.contiguous()
    plan = _plan(q, routed, log_weights, key_mask, geo)
    k, v = _blank_masked(k, v, key_mask)
    wide = None  # places of the queries among the tokens, (B, heads, Q, D)
    if query_indices is not None:
        wide = query_indices[:, None, :, None].expand(-1, heads, -1, dim)

    # gradient, output and logsumexp of the map's queries, and of the windows' slots
    own = (grad[:, :, geo.prefix :], out[:, :, geo.prefix :], lse[:, :, geo.prefix :])
    in_windows = g, o, l = _in_windows(own, wide, plan, geo)

    # the window part
    near = _blank_removed(k, v, routed, log_weights, geo)
    parts = attend_backward(
        g, *(_windows(x, plan, geo) for x in (q, *near)), o, l, plan.window_bias, geo.scale
    )
    grad_q, grad_k, grad_v = (_raster(x, plan, batch) for x in parts)

    # the routed part, window by window or by queries
    with_log_weights = with_log_weights and log_weights is not None
    grad_log_weights = torch.zeros_like(log_weights) if with_log_weights else None
    prefix_k = prefix_v = None
    if plan.routed is not None:
        by_window = not geo.weight_own_window and query_indices is None
        query = _windows(q, plan, geo) if by_window else _queries(q, geo, query_indices)
        given = in_windows if by_window else own
        dq, dk, dv, dlog = _joined_backward(
            *given, query, k, v, plan, geo, query_indices, with_log_weights
        )
        if with_log_weights:
            dlog = dlog.unflatten(1, (routed.shape[1], -1)).sum(2) / geo.scale
            grad_log_weights = dlog.to(log_weights.dtype)

        # its rows go where they were read
        if by_window:
            dq = _raster(dq, plan, batch)
        grad_q = grad_q + dq if wide is None else grad_q.scatter_add_(2, wide, dq)
        index = (plan.routed - geo.prefix).expand(-1, -1, -1, dim)
        prefix_k, prefix_v = dk[:, :, : geo.prefix], dv[:, :, : geo.prefix]
        grad_k = grad_k.scatter_add(2, index, dk[:, :, geo.prefix :])
        grad_v = grad_v.scatter_add(2, index, dv[:, :, geo.prefix :])

    # the prefix, which reads everything
    if geo.prefix:
        rows = slice(0, geo.prefix)
        query, bias = q[:, :, rows], plan.prefix_bias
        dq, dk, dv = attend_backward(
            grad[:, :, rows], query, k, v, out[:, :, rows], lse[:, :, rows], bias, geo.scale
        )
        grad_q = torch.cat([dq, grad_q], 2)
        grad_k = torch.cat([prefix_k, grad_k], 2) + dk
        grad_v = torch.cat([prefix_v, grad_v], 2) + dv
    return grad_q, grad_k, grad_v, grad_log_weights


def _in_windows(
    own: tuple[Tensor, Tensor, Tensor], wide: Tensor | None, plan: _Plan, geo: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, outputs and logsumexps of the queries as rows of windows.

    Switched off, by a logsumexp of +inf, are slots outside the map, and tokens that do not ask:
    all but those at ``wide`` (B, heads, Q, D), unless it is None.
    """
    grad, out, lse = own
    batch, heads, dim = grad.shape[0], grad.shape[1], grad.shape[-1]

    # every token of the map
    if wide is not None:
        shape = (batch, heads, geo.tokens)
        grad = grad.new_zeros(*shape, dim).scatter_(2, wide, grad)
        out = out.new_zeros(*shape, dim).scatter_(2, wide, out)
        lse = lse.new_full(shape, float("inf")).scatter_(2, wide[..., 0], lse)

    # every slot of the windows
    whole = Geometry(0, geo.height, geo.width, geo.window, geo.scale)
    grad, out, lse = (_windows(x, plan, whole) for x in (grad, out, lse.unsqueeze(-1)))
    lse = lse.squeeze(-1).unflatten(0, (batch, plan.slots.shape[0]))
    lse = lse.masked_fill(~plan.inside.unsqueeze(1), float("inf")).flatten(0, 1)
    return grad, out, lse


def _joined_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    plan: _Plan,
    geo: Geometry,
    query_indices: Tensor | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the routed part: of the queries, and of the prefix and routed keys and values
    (B, heads, P + K, D). The last is (B, heads, K), ``geo.scale`` times that of the routed keys'
    bias; None if not asked for."""
    dim = query.shape[-1]
    keys, values = _routed_keys(k, plan, geo), _routed_keys(v, plan, geo)
    if with_bias:
        # one more feature, 1 in every query and 0 elsewhere, changes no logit, and its key
        # gradient is the bias's (eight of them, to keep the row alignment of the CUDA kernels)
        query = torch.nn.functional.pad(query, (0, 8), value=1.0)
        keys, values, grad, out = (
            torch.nn.functional.pad(x, (0, 8)) for x in (keys, values, grad, out)
        )

    # group by group; several may read the same keys
    dq, dk, dv = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    for group in _groups(query, keys, plan, geo, query_indices):
        at = group.rows
        pair = (_spread(keys, group), _spread(values, group))
        part = attend_backward(grad[at], query[at], *pair, out[at], lse[at], group.bias, geo.scale)
        dq[at] = part[0]
        for total, each in ((dk, part[1]), (dv, part[2])):
            total[group.keys] += each if group.spread == 1 else each.sum(0, keepdim=True)

    # the feature apart from the rest
    if not with_bias:
        return dq, dk, dv, None
    dlog = dk[:, :, geo.prefix :, -1]
    return dq[..., :dim], dk[..., :dim], dv[..., :dim], dlog
