"""Pictures for the tasks, with the truth that comes with them: two views of one scene, and mosaics
whose regions are known."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from support.dinov2 import MEAN, PATCH, STD, open_photo
from support.photos import skimage_photo

MOSAIC = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "coffee": "coffee.png",
    "retina": "retina.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "moon": "moon.png",
}
"""Pictures of scikit-image that a mosaic is made of."""
_REGIONS = 24  # of a mosaic
_TURN, _ZOOM = math.radians(12), 1.25  # of the second view of a photograph


@dataclass
class Views:
    """Two pictures of one scene.

    Attributes:
        first, second: (1, 3, side, side), normalised.
        truth: (N, 2), in ``first`` the (row, column), in patches, of the centre of each patch of
            ``second``; NaN where it is not known, or not in ``first``.
    """

    first: Tensor
    second: Tensor
    truth: Tensor


def centres(side: int) -> Tensor:
    """(N, 2), row and column of the patches' centres, in patches; the first is at (0, 0)."""
    count = torch.arange(side // PATCH).double()
    return torch.cartesian_prod(count, count)


def turned(photo: Path, side: int) -> Views:
    """A photograph, and its middle turned and enlarged."""
    first = open_photo(photo, side)
    turn = torch.tensor(
        [[math.cos(_TURN), -math.sin(_TURN)], [math.sin(_TURN), math.cos(_TURN)]],
        dtype=torch.float64,
    )
    theta = torch.cat([turn / _ZOOM, torch.zeros(2, 1, dtype=torch.float64)], 1)
    grid = affine_grid(theta.float()[None], [1, 3, side, side], align_corners=False)
    second = grid_sample(
        first, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )

    # grid_sample counts (x, y) from -1 to 1
    middle = (side // PATCH - 1) / 2
    place = (centres(side) - middle).flip(-1) @ theta[:, :2].T
    return Views(first, second, _within(place.flip(-1) + middle, side))


def stereo(side: int) -> Views:
    """Both pictures of scikit-image's motorcycle, with their measured disparity.

    Source: Scharstein et al. 2014, Middlebury.
    """
    disparity = np.load(skimage_photo("motorcycle_disp.npz"))["arr_0"]
    paths = (skimage_photo(f"motorcycle_{which}.png") for which in ("right", "left"))
    first, second = (open_photo(path, side) for path in paths)

    # a point of the left picture lies so many pixels further left in the right one
    height, width = disparity.shape
    left = (width - height) // 2  # of the square that open_photo cuts
    place = centres(side)
    row, column = (((place + 0.5) * PATCH * height / side).long()).unbind(-1)
    shift = torch.from_numpy(disparity)[row, column + left].double()
    shift[~shift.isfinite()] = float("nan")
    place[:, 1] -= shift * side / height / PATCH
    return Views(first, second, _within(place, side))


def _within(place: Tensor, side: int) -> Tensor:
    """NaN for places outside of a picture."""
    outside = ((place < -0.5) | (place > side // PATCH - 0.5)).any(-1)
    return place.masked_fill(outside.unsqueeze(-1), float("nan"))


def mosaic(side: int, seed: int, half: int) -> tuple[Tensor, Tensor]:
    """Regions around random places, each a piece of one of the pictures.

    Args:
        half: of every picture that is used, 0 the left and 1 the right one: what is trained on one
            is tested on what it has not seen.

    Returns:
        The mosaic (1, 3, side, side), normalised, and (N,) the number of the picture under each
        patch, -1 where there are several.
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(_REGIONS, 2, generator=generator) * side
    kinds = torch.randperm(_REGIONS, generator=generator) % len(MOSAIC)
    pixels = torch.cartesian_prod(*[torch.arange(side).float()] * 2)
    kind = kinds[torch.cdist(pixels, places).argmin(-1)].view(side, side)

    image = torch.zeros(3, side, side)
    for number, name in enumerate(MOSAIC.values()):
        image = torch.where(kind == number, _half(skimage_photo(name), side, half), image)
    tiles = kind.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).flatten(0, 1)
    labels = torch.where((tiles == tiles[:, :1]).all(-1), tiles[:, 0], -1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return ((image - mean) / std).unsqueeze(0), labels


def _half(photo: Path, side: int, half: int) -> Tensor:
    """(3, side, side) in [0, 1], a square of the left or right half of a picture, mirrored and
    repeated."""
    from PIL import Image

    with Image.open(photo) as opened:
        pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1).float() / 255
    short, width = min(pixels.shape[1], pixels.shape[2] // 2), pixels.shape[2]
    left = 0 if half == 0 else width - short
    square = pixels[None, :, :short, left : left + short]
    size = -(-side // 2)
    square = interpolate(square, size=size, mode="bicubic", antialias=True).clamp(0, 1)[0]
    return torch.cat([torch.cat([square, square.flip(-1)], 2)] * 2, 1)[:, :side, :side]
