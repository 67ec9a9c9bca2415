"""3-D windows over a volume (T, H, W), and windows over several maps in one sequence, by regrouping
the tokens into one map for 2-D windows.

Of a volume, two axes become the rows of the map and one its columns. A window's rows lie together,
so a 2-D window of as many rows holds the same tokens:

    windows of 2 x 2 over the axes (T, H)        rows of the map
        t0: a a b b                               a a a a | b b b b | c c ...
        t1: a a b b                               `-- one 2-D window of 4 rows

Where a window does not divide an axis, rows that hold nothing complete the last one; they are
masked. Columns need none: windows of the operator are ragged there by themselves.

Of several maps, each row holds one window:

    windows of 2 x 2 over two maps               rows of the map
        a a b   e e                               a a a a
        a a b   e e                               b b - -   (- holds nothing)
        c c d   f f                               c c - -
                                                  ...
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..positions import morton_order
from .window import Grid, maps_of, several


class Volume(NamedTuple):
    """A volume, or several maps, of N tokens in all as one map of M places, M >= N."""

    grid: tuple[int, int]  # rows and columns of the map
    window: tuple[int, int]  # its 2-D windows
    token: Tensor  # (M,) raster index of the token in each place, any where it is empty
    filled: Tensor | None  # (M,) bool, False for an empty place; None: all are filled
    place: Tensor  # (N,) place of each token
    curve: Tensor  # (N,) places along a curve through the volume that keeps neighbours together


def fold_grid(grid_size: Grid, window: tuple[int, ...], device: torch.device) -> Volume | None:
    """Lay a volume or several maps out as one map; None for what is one.

    Args:
        grid_size: (H, W), (T, H, W), or several (T, H, W).
        window: as many sides as a grid has.
    """
    if several(grid_size):
        return fold_maps(grid_size, window, device)
    return fold_volume(grid_size, window, device) if len(grid_size) == 3 else None


def fold_maps(
    grids: tuple[tuple[int, int, int], ...],
    window: tuple[int, int, int],
    device: torch.device | None = None,
) -> Volume:
    """Lay several maps or volumes out as one map, each window of theirs in a row of its own.

    Args:
        grids: (T, H, W) of each.
        window: (frames, height, width); at the far borders windows are what is left of them.
    """
    # windows of all maps in common; comparisons, as a graph of open sizes has no use for a minimum
    sides = [
        side if any(n >= side for n in lengths) else max(lengths)
        for side, lengths in zip(window, zip(*grids))
    ]
    rows = one_after_another(grids, [cells_of(grid, sides, device) for grid in grids])
    token, tokens = rows.flatten(), sum(map(math.prod, grids))
    place = torch.where(token < 0, tokens, token).argsort()[:tokens]
    return Volume(
        tuple(rows.shape),
        (1, rows.shape[1]),
        token.clamp_min(0),
        None if token.shape[0] == tokens else token >= 0,
        place,
        place[curve_of(grids, device)],
    )


def fold_volume(
    grid: tuple[int, int, int], window: tuple[int, int, int], device: torch.device | None = None
) -> Volume:
    """Lay a volume out as a map whose 2-D windows are the volume's 3-D windows.

    Args:
        grid: (T, H, W).
        window: (frames, height, width); at the far borders windows are what is left of them.
    """
    window = tuple(min(w, n) for w, n in zip(window, grid))

    # the axis that becomes columns needs no filling: take the one that saves most
    free = 2
    for axis in (1, 0):
        if _places(grid, window, axis) < _places(grid, window, free):
            free = axis
    first, second = (axis for axis in range(3) if axis != free)
    # rounded up; of positive numbers: ONNX divides towards 0
    counts = [(grid[axis] + window[axis] - 1) // window[axis] for axis in (first, second)]

    # each place: which window of the two axes, and where in it
    shape = (counts[0], counts[1], window[first], window[second], grid[free])
    i, j, a, b, column = (
        torch.arange(n, device=device).view([-1 if k == axis else 1 for k in range(5)])
        for axis, n in enumerate(shape)
    )
    at = {first: i * window[first] + a, second: j * window[second] + b, free: column}
    filled = (at[first] < grid[first]) & (at[second] < grid[second])
    inside = [at[axis].clamp_max(grid[axis] - 1) for axis in range(3)]
    token = (inside[0] * grid[1] + inside[1]) * grid[2] + inside[2]

    # each token: its place
    spot = [
        torch.arange(n, device=device).view([-1 if k == axis else 1 for k in range(3)])
        for axis, n in enumerate(grid)
    ]
    x, y = spot[first], spot[second]
    row = (x // window[first] * counts[1] + y // window[second]) * window[first]
    row = (row + x % window[first]) * window[second] + y % window[second]
    place = (row * grid[free] + spot[free]).expand(grid).flatten()

    # as a map; which places are filled matters only if some are not
    rows = counts[0] * counts[1] * window[first] * window[second]
    everywhere = rows * grid[free] == math.prod(grid)
    return Volume(
        (rows, grid[free]),
        (window[first] * window[second], window[free]),
        token.expand(shape).flatten(),
        None if everywhere else filled.expand(shape).flatten(),
        place,
        place[curve_order(spot).flatten()],
    )


def _places(grid, window, free: int) -> int:
    """Places of the map when ``free`` is the axis of its columns."""
    sides = [
        (n + w - 1) // w * w if axis != free else n for axis, (n, w) in enumerate(zip(grid, window))
    ]
    return math.prod(sides)


def curve_order(spot: list[Tensor]) -> Tensor:
    """Raster indices along the Z-order curve, for coordinates of three axes that broadcast.

    Source: Morton (IBM 1966).
    """
    code = 0
    for axis, x in enumerate(spot):  # bits of the axes alternate; sides up to 1024
        bit = torch.arange(10, device=x.device)
        code = code + (((x.unsqueeze(-1) >> bit) & 1) << (3 * bit + 2 - axis)).sum(-1)
    return code.flatten().argsort()


def curve_of(grid_size: Grid, device) -> Tensor:
    """(N,) raster indices along a Z-order curve through a map or a volume, or through several, one
    after the other."""
    grids, curves = maps_of(grid_size), []
    for grid in grids:
        if len(grid) == 2:
            curve = morton_order(*grid, device)
        else:
            shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
            curve = curve_order(
                [torch.arange(n, device=device).view(s) for n, s in zip(grid, shapes)]
            )
        curves.append(curve.unsqueeze(1))
    return one_after_another(grids, curves).squeeze(1)


def cells_of(grid: tuple[int, ...], sides: Sequence[int], device) -> Tensor:
    """(cells, S) raster indices of cells of a map or a volume, -1 where one at a far border is
    smaller."""
    axes, index = len(grid), torch.zeros((), dtype=torch.int64, device=device)
    inside = torch.ones((), dtype=torch.bool, device=device)
    for axis, (length, side) in enumerate(zip(grid, sides)):
        # rounded up; of positive numbers: ONNX divides towards 0
        count = (length + side - 1) // side
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = count, side
        at = torch.arange(count * side, device=device).view(shape)
        index = index * length + at.clamp_max(length - 1)
        inside = inside & (at < length)
    return torch.where(inside, index, -1).flatten(axes).flatten(0, axes - 1)


def one_after_another(grids: Sequence[tuple[int, ...]], rows: Sequence[Tensor]) -> Tensor:
    """Rows (n, S) of raster indices of each map as rows of all of them, for tokens of which one map
    follows the other; -1 for none."""
    width, start, found = max(own.shape[1] for own in rows), 0, []
    for grid, own in zip(grids, rows):
        own = torch.where(own < 0, -1, own + start)
        found.append(nn.functional.pad(own, (0, width - own.shape[1]), value=-1))
        start = start + math.prod(grid)
    return torch.cat(found)


def window_of_token(grid: Grid, window: tuple[int, ...], device) -> Tensor:
    """(N,), the number of the window of each token of a map or a volume, or of several, in raster
    order."""
    if several(grid):
        folded = fold_maps(grid, window, device)
        return folded.place // folded.grid[1]
    number = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (n, w) in enumerate(zip(grid, window)):
        shape = [-1 if k == axis else 1 for k in range(len(grid))]
        number = number * ((n + w - 1) // w) + (torch.arange(n, device=device) // w).view(shape)
    return number.flatten()
