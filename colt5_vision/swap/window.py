"""Sizes of windows and of grids."""

import math

from ..checks import check_int

Window = tuple[int, int] | tuple[int, int, int]
Grid = tuple[int, ...] | tuple[tuple[int, int, int], ...]
"""(H, W) of a map, (T, H, W) of a volume, or several (T, H, W), one after the other."""


def check_window(name: str, value) -> Window:
    """``value`` (a side, (height, width) or (frames, height, width)) as two or three integers."""
    if not isinstance(value, (tuple, list)):
        return (check_int(name, value),) * 2
    if len(value) not in (2, 3):
        raise ValueError(
            f"{name}: expected an integer, (height, width) or (frames, height, width), got "
            f"{value!r}"
        )
    return tuple(check_int(f"{name}[{i}]", side) for i, side in enumerate(value))


def check_grid(name: str, value, tokens: int) -> Grid:
    """``value`` as (H, W), (T, H, W) or several (T, H, W), that have ``tokens``."""
    if several(value):
        grids = tuple(_check_sides(f"{name}[{i}]", one, (3,)) for i, one in enumerate(value))
        if sum(map(math.prod, grids)) != tokens:
            raise ValueError(f"{name}: expected {tokens} tokens together, got {value}")
        return grids
    grid = _check_sides(name, value, (2, 3))
    if math.prod(grid) != tokens:
        raise ValueError(f"{name}: expected a product of {tokens} tokens, got {value}")
    return grid


def _check_sides(name: str, value, counts: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) not in counts:
        expected = "(H, W) or (T, H, W)" if 2 in counts else "(T, H, W)"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return tuple(check_int(f"{name}[{i}]", side) for i, side in enumerate(value))


def several(grid_size: Grid) -> bool:
    """Whether it is that of several maps."""
    sequence = (tuple, list)
    return isinstance(grid_size, sequence) and any(isinstance(one, sequence) for one in grid_size)


def maps_of(grid_size: Grid) -> tuple[tuple[int, ...], ...]:
    """The grids of one map or of several."""
    return tuple(grid_size) if several(grid_size) else (grid_size,)


def window_of_grid(window: Window, grid_size: Grid) -> Window:
    """The window with as many sides as the grid: of a volume, single frames by default."""
    if len(grid_size) == 2 and not several(grid_size):
        return window[-2:]
    return window if len(window) == 3 else (1, *window)
