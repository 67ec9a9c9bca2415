"""Tiles of a map or a volume, and in them groups of alike queries."""

import math

import torch
from torch import Tensor, nn

from ..ops.dtypes import wide_dtype
from .volume import cells_of, one_after_another
from .window import Grid, maps_of

_TILES = 25  # about, at most
_HALVINGS = 2  # of a tile, into groups of alike queries
_SKETCH = 32  # keys whose logits tell how alike queries are
_STEPS = 2  # of the power iteration for the direction of a cut
FARTHEST = 10.0
"""From a tile, in half its sides: what is farther is not told apart."""


def tiles_of(grid: Grid, window: tuple[int, ...], device) -> Tensor:
    """(tiles, S) raster indices of balanced tiles of a map or a volume, or of several, -1 where one
    is smaller.

    Args:
        window: least sides of a tile; S is a multiple of the groups that a tile is cut into.
    """
    grids = maps_of(grid)
    area, tiles = sum(map(math.prod, grids)) / _TILES, []
    for one in grids:
        sides = _sides(one, window, area)
        counts = [(length + side - 1) // side for length, side in zip(one, sides)]
        # all of about one size
        sides = [(length + count - 1) // count for length, count in zip(one, counts)]
        tiles.append(cells_of(one, sides, device))
    index = one_after_another(grids, tiles)
    return nn.functional.pad(index, (0, -index.shape[1] % 2**_HALVINGS), value=-1)


def _sides(grid: tuple[int, ...], window: tuple[int, ...], area: float) -> list[int]:
    """Of tiles: at least those of the window, and of about ``area`` tokens."""
    sides = list(window)
    for count, axis in enumerate(sorted(range(len(grid)), key=grid.__getitem__)):
        least = min(grid[axis], math.ceil(area ** (1 / (len(grid) - count))))
        sides[axis] = max(window[axis], least)
        area = max(1.0, area / least)
    return sides


def away_from(tiles: Tensor, grid_size: Grid) -> Tensor:
    """(tiles, N) float32, how far tokens are from the middle of each tile (tiles, S).

    In half its sides, along the axis where that is most: below 1 within it, and at most
    :data:`FARTHEST`, as in other maps.
    """
    where, spots = tiles.device, []
    for number, grid in enumerate(maps_of(grid_size)):
        sides = [torch.arange(n, device=where) for n in grid]
        other = torch.tensor([number * 2**20], device=where)  # far from all other maps
        spots.append(torch.cartesian_prod(other, *sides))
    away, held = torch.zeros((), device=where), tiles >= 0
    for axis in torch.cat(spots).unbind(1):
        own = axis[tiles.clamp_min(0)]
        last = own.masked_fill(~held, -1).amax(1, keepdim=True)
        first = own.masked_fill(~held, 2**40).amin(1, keepdim=True)
        half = (last - first + 1) / 2
        away = torch.maximum(away, (axis - (first + last) / 2).abs() / half)
    return away.clamp_max(FARTHEST)


def alike_groups(
    q: Tensor,
    k: Tensor,
    tiles: Tensor,
    curve: Tensor,
    prefix: int,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """(B, tiles * 4, S / 4) raster indices of alike queries, -1 for none, for all heads in common;
    those of a tile follow each other.

    Queries are alike that give alike logits, in all heads, to a few keys spread over the map. Each
    tile is cut in halves across the direction in which these vary most, and the halves again.

    Args:
        tiles: (tiles, S) raster indices, -1 for none.
    """
    # logits to a few keys, (B, N, heads * keys)
    few = min(_SKETCH, curve.shape[0])
    rows = curve[(torch.arange(few, device=q.device) * 2 + 1) * curve.shape[0] // (2 * few)]
    key = k[:, :, rows + prefix].to(wide_dtype(q)) * scale
    query = q[:, :, prefix:].to(key.dtype)
    if key_mask is not None:  # a masked token has no say, whatever stands in it
        key = key.masked_fill(~key_mask[:, None, rows + prefix, None], 0)
        query = query.masked_fill(~key_mask[:, None, prefix:, None], 0)
    logits = (query @ (key - key.mean(2, keepdim=True)).mT).transpose(1, 2).flatten(2)

    members = tiles.expand(q.shape[0], -1, -1)
    for _ in range(_HALVINGS):
        members = _halves(logits, members)
    return members


def _halves(x: Tensor, members: Tensor) -> Tensor:
    """Cut groups (B, G, S) of rows of (B, N, F) across their first principal direction: (B, 2 G,
    S / 2)."""
    there = (members >= 0).unsqueeze(-1)
    at = members.clamp_min(0).flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    rows = x.gather(1, at).unflatten(1, members.shape[1:]) * there
    mean = rows.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
    rows = (rows - mean) * there

    # power iteration, from the row farthest from the mean
    far = rows.square().sum(-1).argmax(-1)[:, :, None, None].expand(-1, -1, -1, x.shape[-1])
    direction = rows.gather(2, far)
    for _ in range(_STEPS):
        direction = (rows @ direction.mT).mT @ rows
        norm = direction.norm(dim=-1, keepdim=True)
        direction = direction / norm.clamp_min(torch.finfo(x.dtype).tiny)
    place = (rows @ direction.mT).squeeze(-1).masked_fill(~there.squeeze(-1), float("inf"))
    return members.gather(2, place.argsort(-1)).unflatten(2, (2, -1)).flatten(1, 2)


def group_of_token(groups: Tensor, tokens: int) -> Tensor:
    """(B, N), the number of the group (B, G, S) of each token."""
    number = torch.arange(groups.shape[1], device=groups.device)[:, None].expand_as(groups)
    token = torch.where(groups < 0, tokens, groups)
    found = groups.new_zeros(groups.shape[0], tokens + 1)
    return found.scatter(1, token.flatten(1), number.flatten(1))[:, :tokens]
