"""3-D windows over a volume (T, H, W), by regrouping its tokens into a map for 2-D windows.

Two axes become the rows of the map and one its columns. A window's rows lie together, so a 2-D
window of as many rows holds the same tokens:

    windows of 2 x 2 over the axes (T, H)        rows of the map
        t0: a a b b                               a a a a | b b b b | c c ...
        t1: a a b b                               `-- one 2-D window of 4 rows

Where a window does not divide an axis, rows that hold nothing complete the last one; they are
masked. Columns need none: windows of the operator are ragged there by themselves.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Volume(NamedTuple):
    """A volume of N tokens as a map of M places, M >= N."""

    grid: tuple[int, int]  # rows and columns of the map
    window: tuple[int, int]  # its 2-D windows
    token: Tensor  # (M,) raster index of the token in each place, any where it is empty
    filled: Tensor | None  # (M,) bool, False for an empty place; None: all are filled
    place: Tensor  # (N,) place of each token
    curve: Tensor  # (N,) places along a curve through the volume that keeps neighbours together


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


def window_of_token(grid: tuple[int, ...], window: tuple[int, ...], device) -> Tensor:
    """(N,), the number of the window of each token of a map or a volume, in raster order."""
    number = torch.zeros(grid, dtype=torch.int64, device=device)
    for axis, (n, w) in enumerate(zip(grid, window)):
        shape = [-1 if k == axis else 1 for k in range(len(grid))]
        number = number * ((n + w - 1) // w) + (torch.arange(n, device=device) // w).view(shape)
    return number.flatten()
