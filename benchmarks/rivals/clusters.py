"""Rivals that group alike queries and alike keys by k-means."""

import torch
from torch import Tensor

from .layer import Layer, Pooled, Result, by_groups, group_sums


def k_means(x: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    """(heads, N), the cluster of each of (heads, N, D), from a random start (Lloyd 1982)."""
    generator = torch.Generator().manual_seed(seed)
    centre = x[:, torch.randperm(x.shape[1], generator=generator)[:count]]
    for _ in range(iterations):
        of = _nearest(x, centre)
        size = _sizes(of, count).unsqueeze(-1)
        centre = torch.where(size > 0, group_sums(x, of, count) / size.clamp_min(1), centre)
    return _nearest(x, centre)


def _nearest(x: Tensor, centre: Tensor) -> Tensor:
    return (centre.square().sum(-1).unsqueeze(1) - 2 * x @ centre.mT).argmin(-1)


def _sizes(of: Tensor, count: int) -> Tensor:
    one = torch.ones(of.shape)
    return one.new_zeros(of.shape[0], count).scatter_add_(1, of, one)


def svg_ear(
    layer: Layer, density: float, iterations: int = 10, cells: int = 1, draw: int = 0
) -> Result:
    """Clusters of keys are exact for a cluster of queries where the mean key and value would err
    most, at the mean query, for what they cost; the others are pooled (SVG2, arXiv 2505.18875, with
    the error-aware choice of SVG-EAR, arXiv 2603.08982).

    As many clusters of queries as there are tiles, ``cells`` times as many of keys. The error is
    that of the mean query's output: our reading, its code was not at hand.
    """
    # clusters
    groups = len(layer.tiles)
    count = min(cells * groups, layer.tokens)
    query_of = k_means(layer.queries, groups, iterations, draw)
    key_of = k_means(layer.keys, count, iterations, draw + 1)

    # their sizes and means
    query_size, key_size = _sizes(query_of, groups), _sizes(key_of, count)
    one = key_size.clamp_min(1).unsqueeze(-1)
    mean_query = group_sums(layer.queries, query_of, groups)
    mean_query = mean_query / query_size.clamp_min(1).unsqueeze(-1) * layer.scale
    mean_key, mean_value = (group_sums(x, key_of, count) / one for x in (layer.keys, layer.values))

    # which clusters of keys are exact for which of queries
    chosen = []
    for head in range(layer.heads):
        error = _errors(layer, head, key_of[head], mean_query[head], mean_key[head])
        chosen.append(_best(error, query_size[head], key_size[head], density))
    members = [
        [(query_of[head] == group).nonzero().squeeze(-1) for group in range(groups)]
        for head in range(layer.heads)
    ]

    def exact(head: int, group: int) -> Tensor:
        return chosen[head][group][key_of[head]].nonzero().squeeze(-1)

    def rest(head: int, group: int) -> Pooled | None:
        left = ~chosen[head][group] & (key_size[head] > 0)
        if not left.any():
            return None
        size = key_size[head, left].log()
        return Pooled(mean_key[head, left], size, mean_value[head, left])

    return by_groups(layer, members, exact, rest)


def _errors(layer: Layer, head: int, of: Tensor, query: Tensor, mean_key: Tensor) -> Tensor:
    """(query clusters, key clusters), squared change of the mean query's output if pooled."""
    count = len(mean_key)
    order, value = of.argsort(stable=True), layer.values[head]
    ends = torch.bincount(of, minlength=count).tolist()
    logits = query @ layer.keys[head].T
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()

    # exact sums of weights and weighted values, and those of the pooled keys
    mass, sums, pooled = [], [], (query @ mean_key.T - top).exp()
    sizes, totals = torch.tensor(ends).float(), group_sums(value[None], of, count)[0]
    for part in order.split(ends):
        mass.append(weights[:, part].sum(-1))
        sums.append(weights[:, part] @ value[part])
    mass, sums = torch.stack(mass, 1), torch.stack(sums, 1)  # (groups, C), (groups, C, D)
    whole = mass.sum(-1, keepdim=True)
    out = sums.sum(1) / whole
    change = sums - pooled.unsqueeze(-1) * totals
    change = change - (mass - pooled * sizes).unsqueeze(-1) * out.unsqueeze(1)
    return change.square().sum(-1) / whole.square()


def _best(error: Tensor, query_size: Tensor, key_size: Tensor, density: float) -> Tensor:
    """The pairs of clusters with the most error for a key, as many as the budget of the head."""
    pairs = (query_size.unsqueeze(1) * key_size).flatten().double()
    order = (error / key_size.clamp_min(1)).flatten().argsort(descending=True)
    within = pairs[order].cumsum(0) <= density * query_size.sum().double() * key_size.sum()
    return torch.zeros(len(pairs), dtype=torch.bool).scatter_(0, order, within).view_as(error)
