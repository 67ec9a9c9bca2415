"""Ways to choose, weigh or pool the keys beyond a query's window without training, for
``benchmarks.training_free``.

All are subclasses of the library's own routing, with one recipe each, so that they swap into whole
networks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from colt5_vision.ops import routed_window_attention, soft_topk
from colt5_vision.ops.grid import cell_slots, window_of_token
from colt5_vision.positions import morton_order
from colt5_vision.swap.probes import Probes, correction
from colt5_vision.swap.sampled import SampledAttention

_STRATA = 32


class Chosen(NamedTuple):
    """Keys that stand for the map beyond a window: routed ones (1, R, K), and pooled ones that are
    no token's own."""

    indices: Tensor
    log_weights: Tensor
    probe: "_Probe | None" = None
    keys: Tensor | None = None  # (heads, M, head_dim)
    values: Tensor | None = None
    pooled_weights: Tensor | None = None  # (heads, M), -inf for an empty cell
    windows: Tensor | None = None  # (heads or 1, M), the only window that a cell has tokens of


@dataclass(frozen=True)
class Recipe:
    """What a variant does; the defaults are the library's own choices, computed here once more."""

    routes: int | None = 1  # None: one for each head
    beyond: bool = True  # importance to queries of other windows only
    # importance times the value's "norm", distance to the "mean" or each query's "output"; "none"
    value: str = "mean"
    probes: int = 64
    uniform: float = 0.1
    order: str = (
        "map"  # strata: places along the Z-order curve, alike "values" or "keys", "shuffled": none
    )
    correct: str = (
        "alike"  # what the probes miss is added to "alike" queries, its mean to "all"; "none"
    )
    count_probes: bool = False  # among the keys, so that fewer are routed
    calibrate: float | None = None  # ridge of weights that are exact for the probes
    pool: str | None = (
        None  # "rest": cells of all but the top keys; "half": of the less important half; "runs"
    )
    cell: int = 2  # cells a side of a window
    second_order: bool = False  # log-mean-exp of a cell's keys in place of its mean key's logit
    shift: bool = False  # windows of every second layer lie half a window off
    budget: str | None = None  # tokens of a layer by measured "error" or "entropy", equal in total


class Variant(SampledAttention):
    """Routing by a recipe, for one sample without masks."""

    def __init__(self, recipe: Recipe, *, layer: int = 0, **how):
        super().__init__(**how)
        self.recipe, self.layer = recipe, layer

    def forward(
        self,
        q,
        k,
        v,
        *,
        grid_size,
        num_prefix_tokens=0,
        scale=None,
        key_mask=None,
        pair_bias=None,
        **_,
    ):
        if key_mask is not None or pair_bias is not None:
            raise ValueError(
                "key_mask, pair_bias: expected None, the variants are for whole maps without biases"
            )

        # keys
        call = {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens, "scale": scale}
        shift = tuple(-(side // 2) for side in self.window_size)
        shifted = self.recipe.shift and self.layer % 2 == 1
        if shifted:
            q, k, v = (_roll(x, grid_size, num_prefix_tokens, shift) for x in (q, k, v))
        chosen = self.choose(q, k, v, **call)

        # attention, and what is known to be wrong with it
        call["window_size"] = self.window_size
        if chosen.keys is not None:
            out = attend_windows(q, k, v, chosen, **call)
        else:
            routed = {
                "routed_indices": chosen.indices,
                "log_weights": chosen.log_weights,
                "weight_own_window": False,
            }
            out = routed_window_attention(q, k, v, **routed, **call)
        if self.recipe.correct != "none":
            out = out + pad(
                self.missing(q, k, v, out, chosen, num_prefix_tokens), (0, 0, num_prefix_tokens, 0)
            )
        return (
            _roll(out, grid_size, num_prefix_tokens, tuple(-s for s in shift)) if shifted else out
        )

    def missing(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, chosen: Chosen, prefix: int
    ) -> Tensor:
        """(1, heads, N, head_dim), to be added to the map."""
        probe = chosen.probe
        exact, estimate = probe.p @ v, out[:, :, probe.rows + prefix]
        if self.recipe.correct == "all":
            return (exact - estimate).mean(2, keepdim=True).expand(-1, -1, q.shape[2] - prefix, -1)
        valid = torch.ones(1, 1, len(probe.rows), 1, dtype=torch.bool)
        known = Probes(probe.rows, valid, exact, torch.empty(0))
        return correction(known, estimate, q, prefix)[:, :, prefix:]

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid_size, num_prefix_tokens: int, scale=None
    ) -> Chosen:
        # how many, the probes among them where they count
        recipe, prefix, heads = self.recipe, num_prefix_tokens, q.shape[1]
        tokens = grid_size[0] * grid_size[1]
        count = self.num_heavy_tokens_kv
        count = count if isinstance(count, int) else max(1, round(count * tokens))
        count = (
            count - recipe.probes if recipe.count_probes and count > 2 * recipe.probes else count
        )

        # importance, by probes
        window = window_of_token(*grid_size, self.window_size, q.device)
        probe = _Probe(q, k, recipe.probes, grid_size, window, prefix, scale)
        squared = probe.importance(v[:, :, prefix:], v, recipe)

        # of each route, as a share
        routes = recipe.routes or heads
        while heads % routes:  # a network of fewer heads
            routes -= 1
        squared = squared.unflatten(1, (routes, -1)).sum(2)
        importance = squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()
        share = (1 - recipe.uniform) * importance / importance.sum(
            -1, keepdim=True
        ) + recipe.uniform / tokens

        # with pooled keys for the others
        if recipe.pool is not None:
            where = (grid_size, self.window_size, prefix)
            return _pooled(recipe, share, count, probe, k, v, *where, self.generator)

        # a sample along an order
        gates = soft_topk(share.log(), count)
        order = recipe.order
        strata = None
        if order in ("values", "keys"):
            x = (
                (v if order == "values" else k)[:, :, prefix:]
                .unflatten(1, (routes, -1))
                .transpose(2, 3)
                .flatten(3)
            )
            strata = _alike(x, grid_size)
        elif order == "shuffled":
            seed = torch.Generator().manual_seed(self.layer)
            strata = torch.rand(1, routes, tokens, generator=seed).argsort(-1)
        indices, _ = sample_tokens(gates, count, grid_size, generator=self.generator, strata=strata)

        # its weights
        kept = gates.gather(-1, indices).clamp_min(torch.finfo(gates.dtype).tiny)
        if recipe.calibrate is None:
            return Chosen(indices, -kept.log(), probe)
        repeat = heads // routes
        indices, kept = (x.repeat_interleave(repeat, 1) for x in (indices, kept))
        return Chosen(indices, probe.calibrated(indices, kept, recipe.calibrate), probe)


def _spread(count: int, grid_size: tuple[int, int], device) -> Tensor:
    tokens = grid_size[0] * grid_size[1]
    place = (
        (torch.arange(min(count, tokens), device=device) * 2 + 1)
        * tokens
        // (2 * min(count, tokens))
    )
    return morton_order(*grid_size, device)[place]


def _alike(x: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """(1, R, N), strata of (1, R, N, dim): the nearest of a few tokens."""
    seeds = x[:, :, _spread(_STRATA, grid_size, x.device)]
    return (x @ seeds.mT - seeds.square().sum(-1).unsqueeze(2) / 2).argmax(-1)


def sample_tokens(
    gates: Tensor, k: int, grid_size, generator=None, strata: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The library's systematic sampling, each stratum's share drawn from it."""
    tokens = gates.shape[-1]
    order = morton_order(*grid_size, gates.device)
    if strata is None:
        order = order.expand(gates.shape)
    else:
        order = order[(strata[..., order] * tokens + torch.arange(tokens)).argsort(-1)]
    mass = gates.gather(-1, order).double().cumsum(-1)
    offset = 0.5 if generator is None else torch.rand(1, generator=generator)
    teeth = (pad(mass * (k / mass[..., -1:]), (1, 0)) - offset).floor()
    place = (torch.arange(tokens, 0, -1) + tokens * (teeth.diff(dim=-1) > 0)).topk(k, -1).indices
    return order.gather(-1, place), teeth


class _Probe:
    """Logits of a few queries, spread over the map, to all keys."""

    def __init__(self, q, k, count, grid_size, window, prefix, scale):
        rows = _spread(count, grid_size, q.device)
        self.prefix, self.rows, self.window = prefix, rows, window
        self.beyond = window[rows].unsqueeze(-1) != window  # (P, N)
        self.query = q[:, :, rows + prefix] * (q.shape[-1] ** -0.5 if scale is None else scale)
        self.logits = self.query @ k.mT
        self.p = self.logits.softmax(-1)

    def importance(self, value: Tensor, v: Tensor, recipe: Recipe) -> Tensor:
        """(1, heads, N), squared."""
        p = self.p[..., self.prefix :]
        squared = (p * self.beyond if recipe.beyond else p).square()
        if recipe.value == "output":
            out = self.p @ v
            distance = (
                value.square().sum(-1).unsqueeze(2)
                + out.square().sum(-1, keepdim=True)
                - 2 * out @ value.mT
            )
            return (squared * distance.clamp_min(0)).sum(2)
        squared = squared.sum(2)
        if recipe.value == "none":
            return squared
        if recipe.value == "mean":
            weight = squared.sqrt().unsqueeze(2)
            value = value - weight @ value / weight.sum(-1, keepdim=True).clamp_min(
                torch.finfo(p.dtype).tiny
            )
        return squared * value.square().sum(-1)

    def calibrated(self, indices: Tensor, gates: Tensor, ridge: float) -> Tensor:
        """Log weights next to 1 / gates whose estimates of the probes' sums are right (Deville and
        Särndal 1992)."""
        a = self.p[..., self.prefix :] * self.beyond
        a = a / a.sum(-1, keepdim=True).clamp_min(1e-6)
        a = a.gather(-1, indices.unsqueeze(2).expand(-1, -1, a.shape[2], -1))
        weight, free = (
            1 / gates.unsqueeze(2),
            1 - gates.unsqueeze(2),
        )  # what is certain keeps its weight
        gram = (a * weight * free) @ a.mT
        ridge = (
            ridge
            * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            * torch.eye(a.shape[2])
        )
        missing = 1 - (a * weight).sum(-1, keepdim=True)
        factor = torch.linalg.solve(gram + ridge + 1e-9 * torch.eye(a.shape[2]), missing)
        return (weight * (1 + free * (factor.mT @ a)).clamp(0.2, 5)).log().squeeze(2)


def _pooled(recipe, share, count, probe, k, v, grid_size, window_size, prefix, generator) -> Chosen:
    """Top keys or samples and means of cells, ``count`` in total; every cell lies within one
    window."""
    heads, tokens = k.shape[1], share.shape[-1]
    window, share = probe.window, share.expand(-1, heads, -1)
    key, value = k[0, :, prefix:], v[0, :, prefix:]

    # which tokens are taken, and the cell of each other
    if recipe.pool == "runs":
        # neighbours on a curve through each window, until their importance adds up to one key's
        sides = [-(-side // w) for side, w in zip(grid_size, window_size, strict=True)]
        gates = soft_topk(share.log(), count - sides[0] * sides[1])[0]
        certain = gates > 1 - 1e-6
        rank = morton_order(*grid_size, k.device).argsort()
        along = (window * tokens + rank).argsort()
        run = gates.masked_fill(certain, 0)[:, along].double().cumsum(-1).floor()
        new = (run.diff(dim=-1) > 0) | (window[along].diff() != 0)
        cell = torch.empty(heads, tokens, dtype=torch.int64).scatter_(
            1, along.expand(heads, -1), pad(new, (1, 0)).cumsum(-1)
        )
        cells = int(cell.max()) + 1

        # those that are certain, as they are
        top = [row.nonzero().flatten() for row in certain]
        slots = max(1, *(len(row) for row in top))
        indices = torch.stack([pad(row, (0, slots - len(row)), value=-1) for row in top])[None]
        weights = torch.zeros(1, heads, slots)
        pooled = ~certain
        average = (probe.p[0, :, :, prefix:] * probe.beyond).sum(1) + 1e-9
    else:
        # cells of one size
        side = tuple(-(-w // recipe.cell) for w in window_size)
        index, _ = cell_slots(*grid_size, side, k.device)
        cells = index.shape[0]
        cell = window_of_token(*grid_size, side, k.device).expand(heads, -1)
        slots = max(1, count - cells)
        average = torch.ones(heads, tokens)

        # the top keys as they are, or a sample of the upper half
        if recipe.pool == "rest":
            indices = share.topk(slots, -1).indices
            weights = torch.zeros(1, heads, slots)
            pooled = torch.ones(heads, tokens, dtype=torch.bool).scatter_(1, indices[0], False)
        else:
            upper = share >= share.median(-1, keepdim=True).values
            gates = soft_topk(share.log().masked_fill(~upper, -1e4), slots)
            indices, _ = sample_tokens(
                gates, slots, grid_size, generator=generator, strata=_alike(value[None], grid_size)
            )
            weights = -gates.gather(-1, indices).clamp_min(1e-30).log()
            pooled = ~upper[0]

    # sums over the cells
    cell = torch.where(pooled, cell, cells)

    def total(x: Tensor) -> Tensor:
        """Sums over cells, (heads, ..., N) -> (heads, ..., cells)."""
        at = cell.unflatten(1, (*(1,) * (x.ndim - 2), -1)).expand_as(x)
        return torch.zeros(*x.shape[:-1], cells + 1).scatter_add_(-1, at, x)[..., :cells]

    # means of what is left in a cell, and their weights
    size, weight = total(torch.ones(heads, tokens)), total(average).clamp_min(1e-30).unsqueeze(1)
    mean_key, mean_value = (total(x.mT * average.unsqueeze(1)) / weight for x in (key, value))
    log_weight = size.log()
    if recipe.second_order:
        # half the variance of the logits within the cell, on average over the probes
        logits = probe.logits[0, :, :, prefix:]
        first, second = (
            total(x) / size.clamp_min(1).unsqueeze(1) for x in (logits, logits.square())
        )
        log_weight = log_weight + (second - first.square()).clamp(0, 8).mean(1) / 2

    # the window of each cell
    own = torch.zeros(heads, cells + 1, dtype=torch.int64).scatter_(
        1, cell, window.expand(heads, -1)
    )[:, :cells]
    return Chosen(indices, weights, probe, mean_key.mT, mean_value.mT, log_weight, own)


def attend_windows(
    q, k, v, chosen, *, grid_size, window_size, num_prefix_tokens, scale=None
) -> Tensor:
    """Attention to prefix, window, routed and pooled keys, window by window in plain torch.

    Returns:
        As ``routed_window_attention``.
    """
    prefix, heads = num_prefix_tokens, q.shape[1]
    window = window_of_token(*grid_size, window_size, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # what every window sees besides itself
    indices, weights = (
        x[0].repeat_interleave(heads // x.shape[1], 0) for x in (chosen.indices, chosen.log_weights)
    )
    at = indices.clamp_min(0)
    gather = (at + prefix).unsqueeze(-1).expand(-1, -1, q.shape[-1])

    # of keys, values, weights, and windows that do not need them
    far = [
        (
            k[0].gather(1, gather),
            v[0].gather(1, gather),
            weights.masked_fill(indices < 0, -torch.inf),
            window[at],
        )
    ]
    if chosen.keys is not None:
        far.append(
            (chosen.keys, chosen.values, chosen.pooled_weights, chosen.windows.expand(heads, -1))
        )
    far_key, far_value, far_weight, far_window = (
        torch.cat(parts, 1) for parts in zip(*far, strict=True)
    )

    # window by window
    outs, places = [], []
    for number in range(int(window.max()) + 1):
        rows = (window == number).nonzero().flatten() + prefix
        near = torch.cat([torch.arange(prefix), rows])
        key, value = (
            torch.cat([k[0, :, near], far_key], 1),
            torch.cat([v[0, :, near], far_value], 1),
        )
        bias = pad(
            far_weight.masked_fill(far_window == number, -torch.inf), (len(near), 0)
        ).unsqueeze(1)
        outs.append(((q[0, :, rows] * scale) @ key.mT + bias).softmax(-1) @ value)
        places.append(rows)

    # prefix tokens, and all in the order of the map
    head = ((q[0, :, :prefix] * scale) @ k[0].mT).softmax(-1) @ v[0]
    out = torch.cat([head, *outs], 1)
    return out[:, torch.cat([torch.arange(prefix), *places]).argsort()].unsqueeze(0)


def _roll(x: Tensor, grid_size, prefix: int, shift: tuple[int, int]) -> Tensor:
    image = x[:, :, prefix:].unflatten(2, grid_size).roll(shift, (2, 3)).flatten(2, 3)
    return torch.cat([x[:, :, :prefix], image], 2)
