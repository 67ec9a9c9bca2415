"""Window ∪ routed attention in plain torch: parts by SDPA, joined by their logsumexps; memory O(N).

Three parts. *Window*: every token to the keys of its window that are not routed. *Routed*: every
querying token to the prefix tokens and the routed keys, with their log weights. *Prefix*: the
prefix tokens to everything. No key counts twice for a query, so window and routed part join into
one softmax. Where the log weights do not hold within the window (``Geometry.weight_own_window``),
the window part has all keys of the window, and the routed part those beyond it: its queries then go
window by window, as each window has a bias of its own. Windows at the right and the lower border
may be smaller: each of the four areas of windows of one size goes by itself, nothing is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import wide_dtype
from ..grid import window_of_token
from ..sdpa import attend, attend_backward, masked_logit
from .areas import Area, areas_of
from .geometry import Geometry, free_keys, removed_keys

_PAIRS = (
    1 << 24
)  # elements held at once, of a bias or of the gradients of keys that several windows share


@dataclass
class _Plan:
    """Indices and biases that forward and backward share, made from the integer and bool inputs."""

    areas: list[Area]
    window_bias: Tensor | None  # (B, heads or 1, H, W, 1), of keys for their own window
    routed: Tensor | None  # (B, heads, P + K, 1) index into the P + N keys, the prefix first
    used: Tensor | None  # the same shape, False for an empty slot, a masked or removed key
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

    plan = _Plan(areas_of(geo), None, None, None, None, None, None)

    # slots that hold a key
    used = routed >= 0
    if log_weights is not None:
        used = used & (log_weights != float("-inf"))

    # keys of a window: valid, and not routed for its queries already
    if (num_routed and geo.weight_own_window) or key_mask is not None:
        free = bias(free_keys(routed, key_mask, geo))  # (B, R, N)
        plan.window_bias = per_head(free, 1).unflatten(2, (geo.height, geo.width)).unsqueeze(-1)

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
            window = _window_of_token(geo, query.device)[routed.clamp_min(0)]
            window = torch.nn.functional.pad(window, (geo.prefix, 0), value=-1)
            plan.routed_window = per_head(window, 1)
        index = _with_prefix(routed.clamp_min(0), geo)
        used = torch.nn.functional.pad(used, (geo.prefix, 0), value=True)
        plan.routed = index.repeat_interleave(heads // routes, 1).unsqueeze(-1)
        plan.used = used.repeat_interleave(heads // routes, 1).unsqueeze(-1)

    # the prefix reads every valid key
    if geo.prefix and key_mask is not None:
        plan.prefix_bias = bias(key_mask)[:, None, None]
    return plan


def _window_of_token(geo: Geometry, device) -> Tensor:
    return window_of_token(geo.height, geo.width, geo.window, device)


def _map(x: Tensor, geo: Geometry) -> Tensor:
    """The image tokens of (B, heads, P + N, D) as (B, heads, H, W, D), a view."""
    return x[:, :, x.shape[2] - geo.tokens :].unflatten(2, (geo.height, geo.width))


def _new_rows(like: Tensor, geo: Geometry, width: int, dtype: torch.dtype) -> Tensor:
    """(B, heads, P + N, width), not filled; the heads of a token lie side by side, as in a
    window."""
    shape = (like.shape[0], geo.prefix + geo.tokens, like.shape[1], width)
    return torch.empty(shape, dtype=dtype, device=like.device).transpose(1, 2)


def _with_prefix(tokens: Tensor, geo: Geometry) -> Tensor:
    """Rows of the prefix tokens and of those of the map, (..., P + K)."""
    prefix = torch.arange(geo.prefix, device=tokens.device).expand(*tokens.shape[:-1], -1)
    return torch.cat([prefix, tokens + geo.prefix], -1)


def _window_bias(plan: _Plan, area: Area) -> Tensor | None:
    """(B * windows, heads or 1, 1, height * width)."""
    return None if plan.window_bias is None else area.take(plan.window_bias).mT


def _unless_zero(bias: Tensor | None) -> Tensor | None:
    """None for zeros, where looking costs nothing: the kernel is faster without a bias."""
    if bias is None or bias.device.type != "cpu" or bool(bias.any()):
        return bias
    return None


def _routed_keys(x: Tensor, plan: _Plan) -> Tensor:
    """(B, heads, P + K, D); an unused slot reads zeros, whatever stands in the token it points
    to."""
    batch, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    rows = x[batch[:, None, None], heads[:, None], plan.routed.squeeze(-1)]
    return rows.masked_fill_(~plan.used, 0)


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

    # index of the queries, (B, heads, Q, D) or, window by window, (B * windows, heads, h * w, D)
    rows: tuple
    keys: slice  # of the batch
    spread: int  # how often those keys stand side by side: the windows
    bias: Tensor | None


def _groups(
    query: Tensor, keys: Tensor, plan: _Plan, geo: Geometry, query_indices: Tensor | None
) -> Iterator[_Group]:
    """The routed part of all queries in calls, none with much more than ``_PAIRS`` biases at
    once."""
    # one bias for all
    if geo.weight_own_window:
        yield _Group((slice(None),), slice(None), 1, _unless_zero(plan.routed_bias))
        return

    # some rows of all samples at a time
    window = _window_of_token(geo, query.device)[query_indices]
    pairs = query.shape[0] * plan.routed_window.shape[1] * keys.shape[2]
    step = max(1, _PAIRS // max(1, pairs))
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        bias = _beyond(plan, window[:, rows], masked_logit(query))
        yield _Group((slice(None), slice(None), rows), slice(None), 1, bias)


def _groups_of(area: Area, query: Tensor, keys: Tensor, plan: _Plan) -> Iterator[_Group]:
    """The routed part of an area whose windows have a bias each: some windows of one sample at a
    time, none with much more than ``_PAIRS`` gradients of keys at once."""
    numbers = area.numbers(query.device)
    step = max(1, _PAIRS // max(1, keys[0].numel()))
    for sample in range(keys.shape[0]):
        one = slice(sample, sample + 1)
        bias = plan.routed_bias[one].squeeze(2)  # (1, heads or 1, P + K)
        for start in range(0, area.windows, step):
            window = numbers[start : start + step]
            own = plan.routed_window[one] == window.view(-1, 1, 1)  # (windows, heads or 1, P + K)
            beyond = bias.masked_fill(own, masked_logit(query)).unsqueeze(2)
            first = sample * area.windows + start
            yield _Group((slice(first, first + len(window)),), one, len(window), beyond)


def _spread(x: Tensor, group: _Group) -> Tensor:
    x = x[group.keys]
    return x if group.spread == 1 else x.expand(group.spread, -1, -1, -1)


def _queries(x: Tensor, query_indices: Tensor | None) -> Tensor:
    """The querying tokens of (B, heads, N, D)."""
    if query_indices is None:
        return x
    index = query_indices[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


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
    log_weights = _unless_zero(log_weights)  # as gates that go straight through are
    plan = _plan(q, routed, log_weights, key_mask, geo)
    k, v = _blank_masked(k, v, key_mask)
    keys = values = None
    if plan.routed is not None:
        keys, values = _routed_keys(k, plan), _routed_keys(v, plan)

    # the prefix, which reads everything
    out = _new_rows(q, geo, q.shape[-1], q.dtype)
    lse = _new_rows(q, geo, 1, wide_dtype(q))
    prefix = slice(0, geo.prefix)
    if geo.prefix:
        out[:, :, prefix], first = attend(q[:, :, prefix], k, v, plan.prefix_bias, geo.scale)
        lse[:, :, prefix] = first.unsqueeze(-1)

    # the window part; where every window has a bias of its own, the routed part is joined there
    by_window = keys is not None and not geo.weight_own_window and query_indices is None
    near = [_map(x, geo) for x in (q, *_blank_removed(k, v, routed, log_weights, geo))]
    for area in plan.areas:
        query, key, value = (area.take(x) for x in near)
        part = attend(query, key, value, _window_bias(plan, area), geo.scale)
        if by_window:
            groups = _groups_of(area, query, keys, plan)
            _join(*part, query, keys, values, groups, geo.scale)
        area.put(part[0], _map(out, geo))
        area.put(part[1].unsqueeze(-1), _map(lse, geo))

    # the routed part, else, of the tokens that ask
    rows = None if query_indices is None else _with_prefix(query_indices, geo)
    out, lse = _queries(out, rows), _queries(lse, rows).squeeze(-1)
    if keys is not None and not by_window:
        query = _queries(q[:, :, geo.prefix :], query_indices)
        groups = _groups(query, keys, plan, geo, query_indices)
        far = slice(geo.prefix, None)
        _join(out[:, :, far], lse[:, :, far], query, keys, values, groups, geo.scale)

    # no key at all
    if key_mask is None and (log_weights is None or not geo.weight_own_window):
        return out, lse  # each query sees itself
    empty = lse < masked_logit(q) / 2
    return out.masked_fill_(empty.unsqueeze(-1), 0), lse.masked_fill_(empty, float("inf"))


def _join(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: Iterator[_Group],
    scale: float,
) -> None:
    """The window part, given, and the routed part as one softmax, in place."""
    for group in groups:
        at = group.rows  # slices: views
        part = attend(query[at], _spread(keys, group), _spread(values, group), group.bias, scale)
        share = torch.sigmoid(part[1] - lse[at])  # exp(part_lse - logaddexp(lse, part_lse))
        out[at].lerp_(part[0], share.unsqueeze(-1).to(out.dtype))
        lse[at].copy_(torch.logaddexp(lse[at], part[1]))


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
    heads, dim = q.shape[1], q.shape[-1]
    plan = _plan(q, routed, log_weights, key_mask, geo)
    k, v = _blank_masked(k, v, key_mask)
    wide = None  # places of the queries among the tokens, (B, heads, Q, D)
    if query_indices is not None:
        wide = query_indices[:, None, :, None].expand(-1, heads, -1, dim)
    with_log_weights = with_log_weights and log_weights is not None
    far = None if plan.routed is None else _Far(k, v, plan, geo, with_log_weights)

    # the window part, and where every window has a bias of its own, the routed part
    own = (grad[:, :, geo.prefix :], out[:, :, geo.prefix :], lse[:, :, geo.prefix :])
    near = [_map(x, geo) for x in (q, *_blank_removed(k, v, routed, log_weights, geo))]
    asking = [_map(x, geo) for x in _of_every_token(*own, wide, geo)]
    grad_q, grad_k, grad_v = grads = [_new_rows(x, geo, dim, x.dtype) for x in (q, k, v)]
    by_window = far is not None and not geo.weight_own_window and wide is None
    for area in plan.areas:
        query, key, value = (area.take(x) for x in near)
        g, o, l = (area.take(x) for x in asking)
        l, bias = l.squeeze(-1), _window_bias(plan, area)
        parts = attend_backward(g, query, key, value, o, l, bias, geo.scale)
        if by_window:
            groups = _groups_of(area, query, far.k, plan)
            parts = (parts[0] + far.backward(g, query, o, l, groups), *parts[1:])
        for part, whole in zip(parts, grads):
            area.put(part, _map(whole, geo))

    # the prefix, which reads everything
    if geo.prefix:
        rows = slice(0, geo.prefix)
        own_rows = (grad[:, :, rows], q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows])
        parts = attend_backward(*own_rows, plan.prefix_bias, geo.scale)
        for whole in (grad_k, grad_v):
            whole[:, :, rows] = 0
        grad_q[:, :, rows] = parts[0]
        grad_k += parts[1]
        grad_v += parts[2]

    # the routed part, else
    if far is not None and not by_window:
        query = _queries(q[:, :, geo.prefix :], query_indices)
        g, o, l = own
        dq = far.backward(g, query, o, l, _groups(query, far.k, plan, geo, query_indices))
        tokens = grad_q[:, :, geo.prefix :]
        if wide is None:
            tokens += dq
        else:
            tokens.scatter_add_(2, wide, dq)

    # its keys' gradients go where they were read
    grad_log_weights = torch.zeros_like(log_weights) if with_log_weights else None
    if far is not None:
        index = plan.routed.expand(-1, -1, -1, dim)
        grad_k.scatter_add_(2, index, far.dk[..., :dim])
        grad_v.scatter_add_(2, index, far.dv[..., :dim])
        if with_log_weights:
            dlog = far.dk[:, :, geo.prefix :, -1].unflatten(1, (routed.shape[1], -1)).sum(2)
            grad_log_weights = (dlog / geo.scale).to(log_weights.dtype)
    return grad_q, grad_k, grad_v, grad_log_weights


def _of_every_token(
    grad: Tensor, out: Tensor, lse: Tensor, wide: Tensor | None, geo: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, outputs and logsumexps (a last axis of 1) of the map's tokens.

    Those that do not ask, all but those at ``wide`` (B, heads, Q, D) unless it is None, are
    switched off by a logsumexp of +inf.
    """
    lse = lse.unsqueeze(-1)
    if wide is None:
        return grad, out, lse
    shape = (*grad.shape[:2], geo.tokens)
    grad = grad.new_zeros(*shape, grad.shape[-1]).scatter_(2, wide, grad)
    out = out.new_zeros(*shape, out.shape[-1]).scatter_(2, wide, out)
    lse = lse.new_full((*shape, 1), float("inf")).scatter_(2, wide[..., :1], lse)
    return grad, out, lse


class _Far:
    """Prefix and routed keys, and the gradients of all who read them.

    With the bias's gradient rows have eight more features: 1 in every query and 0 elsewhere changes
    no logit, and the gradient of a key's feature is that of its bias, over ``scale``. Eight keep
    the row alignment of the CUDA kernels.
    """

    def __init__(self, k: Tensor, v: Tensor, plan: _Plan, geo: Geometry, with_bias: bool):
        self.scale, self.with_bias = geo.scale, with_bias
        self.k, self.v = (self._widened(_routed_keys(x, plan)) for x in (k, v))
        self.dk, self.dv = torch.zeros_like(self.k), torch.zeros_like(self.v)

    def _widened(self, x: Tensor, value: float = 0.0) -> Tensor:
        return torch.nn.functional.pad(x, (0, 8), value=value) if self.with_bias else x

    def backward(
        self, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, groups: Iterator[_Group]
    ) -> Tensor:
        """The queries' gradient; that of the keys and values is added up."""
        dim = query.shape[-1]
        query = self._widened(query, 1.0)
        grad, out = self._widened(grad), self._widened(out)
        dq = torch.empty_like(query)
        for group in groups:  # several may read the same keys
            at, pair = group.rows, (_spread(self.k, group), _spread(self.v, group))
            part = attend_backward(
                grad[at], query[at], *pair, out[at], lse[at], group.bias, self.scale
            )
            dq[at] = part[0]
            for total, each in ((self.dk, part[1]), (self.dv, part[2])):
                total[group.keys] += each if group.spread == 1 else each.sum(0, keepdim=True)
        return dq[..., :dim]
