"""Window sizes: one number, two, or three."""

import math

from ..checks import check_int

Window = tuple[int, int] | tuple[int, int, int]


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


def check_grid(name: str, value, tokens: int) -> tuple[int, ...]:
    """``value`` as (H, W) or (T, H, W), whose product is ``tokens``."""
    if not isinstance(value, (tuple, list)) or len(value) not in (2, 3):
        raise ValueError(f"{name}: expected (H, W) or (T, H, W), got {value!r}")
    grid = tuple(check_int(f"{name}[{i}]", side) for i, side in enumerate(value))
    if math.prod(grid) != tokens:
        raise ValueError(f"{name}: expected a product of {tokens} tokens, got {value}")
    return grid


def window_of_grid(window: Window, grid_size: tuple[int, ...]) -> Window:
    """The window with as many sides as the grid: of a volume, single frames by default."""
    if len(grid_size) == 2:
        return window[-2:]
    return window if len(window) == 3 else (1, *window)
