"""Rivals that choose 2-D tiles of keys for 2-D tiles of queries.

A kernel that reads keys in blocks of a sequence has tiles of an image if its tokens are reordered
first, which is free here. Density: exact keys a query, of the map's.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .layer import TILE, Layer, Pooled, Result, by_groups, cuts, group_sums


def nearest_tiles(layer: Layer, density: float) -> Result:
    """The tiles nearest to a query's own, as sliding tile attention has them (STA, arXiv
    2502.04507), in a number that the density gives."""
    rows, columns = (torch.tensor(cuts(n, TILE)[:-1]).float() for n in layer.grid)
    place = torch.cartesian_prod(rows, columns)
    return _attend(layer, _top(-torch.cdist(place, place).expand(layer.heads, -1, -1), density))


def sparge(layer: Layer, density: float) -> Result:
    """Top tiles by the logits of tile means (SpargeAttn, arXiv 2502.18137), the rest dropped.

    Without its test of self-similarity, which only adds tiles beyond the budget. Without training,
    VSA (arXiv 2505.13389) is the same.
    """
    return _attend(layer, _top(_mean_logits(layer), density))


def sub_block(layer: Layer, density: float) -> Result:
    """Top tiles by the log of the sum of exponentials over the logits of quarters of tiles, query
    by key; the rest dropped (sglang's SubBlock selection)."""
    return _attend(layer, _top(_quarter_logits(layer), density))


def pisa(layer: Layer, density: float, order: int) -> Result:
    """Top tiles exact, the mean key and value for each of the rest (piecewise sparse attention,
    PISA, arXiv 2602.01077).

    Order 1 adds the first order of the rest's values in the query, with one matrix for all tiles,
    and weighs the choice by its norm, as its kernel does.
    """
    logits = _mean_logits(layer)
    if order == 0:
        return _attend(layer, _top(logits, density), pool=True)

    # sum over each tile of (key - mean key) x value
    apart = layer.keys - layer.tile_means(layer.keys)[:, layer.tile_of]
    pairs = torch.stack([apart[:, tile].mT @ layer.values[:, tile] for tile in layer.tiles], 1)
    weighted = (logits + (pairs.flatten(2).norm(dim=-1)[:, None] + 1e-5).log()).softmax(-1)
    found = _attend(layer, _top(weighted, density), pool=True)
    slope = layer.queries * layer.scale @ pairs.sum(1) / layer.k.shape[1]
    return found._replace(out=found.out + found.pooled.unsqueeze(-1) * slope)


def sol(layer: Layer, density: float) -> Result:
    """Tiles above mean + tau x standard deviation of their logits exact, as well as the own and the
    next ones, the mean key and value for the rest (Sol attention of SANA-Video's kernels).

    tau is searched for the density.
    """
    logits = _mean_logits(layer)
    spread = layer.tile_means(layer.keys).var(1, correction=0)[:, None]
    spread = ((layer.tile_means(layer.queries) * layer.scale).square() * spread).sum(-1)
    score = (logits - logits.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt().unsqueeze(-1)
    number = torch.arange(len(layer.tiles))
    near = (number.unsqueeze(1) - number).abs() <= 1

    low, high = score.min().item() - 1, score.max().item()
    for _ in range(40):
        tau = (low + high) / 2
        low, high = (tau, high) if _density(layer, (score > tau) | near) > density else (low, tau)
    return _attend(layer, (score > high) | near, pool=True)


def _mean_logits(layer: Layer) -> Tensor:
    """(heads, tiles, tiles), logits of mean query and mean key."""
    query, key = (layer.tile_means(x) for x in (layer.queries, layer.keys))
    return query @ key.mT * layer.scale


def _quarter_logits(layer: Layer) -> Tensor:
    """(heads, tiles, tiles), over all 4 x 4 pairs of quarters of tiles."""
    (rows, columns), count = (_halves(n) for n in layer.grid), 4 * len(layer.tiles)
    tile = rows.unsqueeze(1) // 2 * (columns[-1] // 2 + 1) + columns // 2
    quarter = (4 * tile + rows.unsqueeze(1) % 2 * 2 + columns % 2).flatten()
    size = torch.bincount(quarter, minlength=count).unsqueeze(-1)
    query, key = (
        group_sums(x, quarter, count) / size.clamp_min(1) for x in (layer.queries, layer.keys)
    )
    logits = query @ key.mT * layer.scale
    logits = logits.masked_fill((size == 0) | (size == 0).mT, float("-inf"))
    return (
        logits.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).transpose(2, 3).flatten(3).logsumexp(-1)
    )


def _halves(length: int) -> Tensor:
    """(length,), the half tile of each row or column; a tile of one has no first half."""
    ends = cuts(length, TILE)
    edges = [edge for a, b in pairwise(ends) for edge in ((a + b) // 2, b)]
    return torch.bucketize(torch.arange(length), torch.tensor(edges), right=True)


def _density(layer: Layer, chosen: Tensor) -> float:
    pairs = layer.tile_sizes.unsqueeze(1) * layer.tile_sizes
    return ((chosen * pairs).sum() / (layer.heads * layer.tokens**2)).item()


def _top(score: Tensor, density: float) -> Tensor:
    """(heads, tiles, tiles) bool, as many tiles of keys for every tile of queries."""
    count = max(1, round(density * score.shape[-1]))
    return torch.zeros_like(score).scatter_(-1, score.topk(count, -1).indices, 1.0).bool()


def _attend(layer: Layer, chosen: Tensor, pool: bool = False) -> Result:
    """Chosen tiles exact, the others dropped or pooled."""
    key, value = (layer.tile_means(x) for x in (layer.keys, layer.values))
    size = layer.tile_sizes.log()

    def exact(head: int, tile: int) -> Tensor:
        return chosen[head, tile][layer.tile_of].nonzero().squeeze(-1)

    def rest(head: int, tile: int) -> Pooled | None:
        left = ~chosen[head, tile]
        return Pooled(key[head, left], size[left], value[head, left]) if left.any() else None

    return by_groups(layer, layer.tiles, exact, rest if pool else lambda head, tile: None)
