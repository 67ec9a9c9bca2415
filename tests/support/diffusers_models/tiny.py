"""What a tiny model is, and noise for its inputs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()
Grid = tuple[int, int, int]
TEXT = 5  # tokens of a text


class Tiny(NamedTuple):
    """A model.

    Attributes:
        make: it, with the weights of its class.
        call: arguments of its forward for a map of (T, H, W) tokens, and so many samples.
        layout: axes of the argument that holds the map, ``"BNC"`` of packed tokens; ``""``: other
            layers than attention mix tokens before it, so that no single one can be changed.
        argument: its name.
        grid, others: that it is tried with.
        batch: it takes several samples, independent of each other (ControlNetUnionModel's attend
            to each other).
    """

    make: Callable[[], torch.nn.Module]
    call: Callable[[Grid, int], dict[str, Any]]
    layout: str = "BCHW"
    argument: str = "hidden_states"
    grid: Grid = (1, 4, 6)
    others: tuple[Grid, ...] = ((1, 6, 4), (1, 3, 5), (1, 4, 6))
    batch: bool = True


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator)


def image(grid: Grid, batch: int, channels: int, patch: int = 2) -> torch.Tensor:
    """Latents (B, C, H, W)."""
    return noise(batch, channels, grid[1] * patch, grid[2] * patch)


def video(grid: Grid, batch: int, channels: int, patch: int = 2, frames: int = 1) -> torch.Tensor:
    """Latents (B, C, T, H, W)."""
    t, height, width = grid
    return noise(batch, channels, t * frames, height * patch, width * patch)


def tokens(grid: Grid, batch: int, channels: int) -> torch.Tensor:
    return noise(batch, math.prod(grid), channels)


def text(batch: int, width: int, seed: int = 7, length: int = TEXT) -> torch.Tensor:
    return noise(batch, length, width, seed=seed)


def steps(batch: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((batch,), value)


def valid(batch: int, length: int = TEXT, dtype=torch.bool) -> torch.Tensor:
    """Of several texts, all but the first are two tokens shorter."""
    mask = torch.ones(batch, length, dtype=dtype)
    mask[1:, -2:] = 0
    return mask


def places(grid: Grid, columns: int = 3) -> torch.Tensor:
    """Positions of packed tokens, as Flux's pipelines make them."""
    _, height, width = grid
    ids = torch.zeros(height, width, columns)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.flatten(0, 1)


VIDEO = {"grid": (2, 4, 6), "others": ((2, 6, 4), (3, 3, 5), (1, 4, 6), (2, 4, 6))}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
VOLUME = {"layout": "BCTHW"} | VIDEO
PACKED = {"layout": "BNC"}
