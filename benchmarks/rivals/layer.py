"""One attention of a real network, and attention by groups of queries, which most rivals share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from colt5_vision.ops.sdpa import attend

TILE = 8  # side of a rival's blocks: 64 tokens, as their kernels have


class Pooled(NamedTuple):
    """Keys that stand for several: one softmax has them beside the exact ones."""

    keys: Tensor  # (C, D)
    log_mass: Tensor  # (C,), added to their logits: log of how many keys each stands for
    values: Tensor  # (C, D)


class Result(NamedTuple):
    """What a method makes of the map's queries.

    A method that goes by groups knows the sums. Of another, ``seen`` tells which keys are exact for
    whom, and they are summed after it was timed; None for none, as where all are merged.
    """

    out: Tensor  # (heads, N, D)
    exact: Tensor | None = None  # (heads, N), log of the softmax's sum over exact keys
    pooled: Tensor | None = None  # (heads, N), share of the method's softmax on pooled keys
    seen: tuple[list[Tensor], Callable[[int, int], Tensor]] | None = None


@dataclass
class Layer:
    """q, k, v of one sample, (heads, P + N, D): P prefix tokens, then a map in raster order."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]
    prefix: int = 0

    def __post_init__(self):
        self.heads, length, self.dim = self.q.shape
        self.tokens, self.scale = length - self.prefix, self.dim**-0.5
        # of the map alone
        self.queries, self.keys, self.values = (x[:, self.prefix :] for x in self.qkv)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def _full(self) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unsqueeze(0) for x in self.qkv)
        return attend(q[:, :, self.prefix :], k, v, None, self.scale)

    @property
    def full(self) -> Tensor:
        """(heads, N, D), full attention of the map's queries."""
        return self._full[0][0]

    @property
    def lse(self) -> Tensor:
        """(heads, N), log of the sum of its softmax."""
        return self._full[1][0]

    def prepare(self) -> None:
        """Compute what is computed once, and is part of no method."""
        for name in ("_full", "tile_of", "tile_sizes"):
            getattr(self, name)

    @cached_property
    def tiles(self) -> list[Tensor]:
        """Indices of the map in each tile, row by row of tiles."""
        return balanced_cells(*self.grid, TILE)

    @cached_property
    def tile_of(self) -> Tensor:
        """(N,), the tile of each token."""
        return label(self.tiles, self.tokens)

    @cached_property
    def tile_sizes(self) -> Tensor:
        """(tiles,)"""
        return torch.tensor([float(len(tile)) for tile in self.tiles])

    def tile_means(self, x: Tensor) -> Tensor:
        """(heads, N, D) -> (heads, tiles, D)"""
        return group_sums(x, self.tile_of, len(self.tiles)) / self.tile_sizes.unsqueeze(-1)


def cuts(length: int, side: int) -> list[int]:
    """Ends of as few parts as have at most ``side``, all of about one length."""
    parts = -(-length // side)
    return [length * i // parts for i in range(parts + 1)]


def balanced_cells(height: int, width: int, side: int) -> list[Tensor]:
    """Raster indices of cells of at most side x side tokens."""
    raster = torch.arange(height * width).view(height, width)
    rows, columns = cuts(height, side), cuts(width, side)
    return [raster[a:b, c:d].reshape(-1) for a, b in pairwise(rows) for c, d in pairwise(columns)]


def label(groups: list[Tensor], tokens: int) -> Tensor:
    """(N,), the number of the group of each token."""
    of = torch.empty(tokens, dtype=torch.int64)
    for number, members in enumerate(groups):
        of[members] = number
    return of


def group_sums(x: Tensor, of: Tensor, count: int) -> Tensor:
    """Sums of (heads, N, D) over groups; ``of`` is (N,), or (heads, N): (heads, count, D)."""
    out = x.new_zeros(x.shape[0], count, x.shape[-1])
    return out.scatter_add_(1, of.expand(x.shape[:2]).unsqueeze(-1).expand_as(x), x)


def attend_group(
    layer: Layer, head: int, rows: Tensor, keys: Tensor, pooled: Pooled | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``rows`` to the prefix, exact keys and pooled ones, in one softmax.

    Returns:
        outputs (rows, D), and of each the log of the softmax's sum over exact keys, and its share
        on the pooled ones.
    """
    query = layer.queries[head, rows] * layer.scale
    key = torch.cat([layer.k[head, : layer.prefix], layer.keys[head, keys]])
    value = torch.cat([layer.v[head, : layer.prefix], layer.values[head, keys]])
    logits, exact = query @ key.T, len(key)
    if pooled is not None:
        logits = torch.cat([logits, query @ pooled.keys.T + pooled.log_mass], -1)
        value = torch.cat([value, pooled.values])

    whole = logits.logsumexp(-1, keepdim=True)
    weights = (logits - whole).exp()
    share = weights[:, :exact].sum(-1)
    return weights @ value, whole.squeeze(-1) + share.log(), 1 - share


def by_groups(
    layer: Layer,
    groups: list[list[Tensor]] | list[Tensor],
    exact: Callable[[int, int], Tensor],
    pooled: Callable[[int, int], Pooled | None] = lambda head, group: None,
) -> Result:
    """Every group of queries to its own keys.

    Args:
        groups: of query indices; of each head if they are lists of lists.
        exact: indices of the keys of (head, group).
        pooled: further keys of (head, group).
    """
    out = torch.empty_like(layer.queries)
    sums, rest = out.new_empty(out.shape[:2]), out.new_empty(out.shape[:2])
    for head in range(layer.heads):
        own = groups[head] if isinstance(groups[0], list) else groups
        for group, rows in enumerate(own):
            if len(rows):
                keys = exact(head, group)
                part = attend_group(layer, head, rows, keys, pooled(head, group))
                out[head, rows], sums[head, rows], rest[head, rows] = part
    return Result(out, sums, rest)
