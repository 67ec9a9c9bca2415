"""A task that needs the whole map: white squares on a large canvas, to be labelled with the class
of its one digit.

Real MNIST digits (:func:`support.digits.load_digits`), 4,000 for training and 1,000 held
out, also as clutter.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.digits import DIGIT, FRAGMENT, MEAN, STD, load_digits

CELL, WINDOW = 8, 8  # pixels of a token, and of a square; tokens of a window
TRAINING = 4000


class Batch(NamedTuple):
    """What a model is given, and what it should say.

    Attributes:
        images: (B, 1, size, size) float32, standardised.
        squares: (B, S) int64, raster tokens of the squares.
        labels: (B,) int64, class of the digit.
        near: (B, N) bool, tokens of the windows that the digit touches.
    """

    images: Tensor
    squares: Tensor
    labels: Tensor
    near: Tensor


class NeedleTask:
    """Canvases of one whole digit, fragments of others, and white squares in windows that the digit
    does not touch.

    A canvas is a function of (seed, split, number) alone, so all models of a seed see the same ones
    in the same order. Squares and windows keep to the grid of tokens; a window that the digit is
    within a token of has no square, so a stem that looks a token over the edge gives nothing away.

    Args:
        size: side of the canvas in pixels, a multiple of 64 (whole windows), at least 192.
        seed: of the split, the positions and the clutter.
        fragments, squares: how many per 192x192 pixels.

    Raises:
        ValueError: for an argument that does not fit.
    """

    def __init__(self, size: int = 192, seed: int = 0, fragments: int = 8, squares: int = 6):
        side = CELL * WINDOW
        if size % side or size < 3 * side:
            raise ValueError(
                f"size: expected a multiple of {side}, at least {3 * side}, got {size}"
            )
        self.size, self.seed = size, seed
        self.fragments, self.squares = (
            round(count * (size / 192) ** 2) for count in (fragments, squares)
        )
        self.images, self.labels = load_digits()
        order = np.random.default_rng(seed).permutation(len(self.images))
        self.digits, self.held = order[:TRAINING], order[TRAINING:]

    def train(self, step: int, batch: int) -> Batch:
        """The batch of a training step; every digit comes once before any comes again, never on the
        same canvas."""
        numbers = np.arange(step * batch, (step + 1) * batch)
        chosen = [self._epoch(number // TRAINING)[number % TRAINING] for number in numbers]
        return self._batch(np.array(chosen), self.digits, numbers)

    def held_out(self, start: int, stop: int) -> Batch:
        """Canvases of the held-out digits ``start`` to ``stop``, always the same."""
        numbers = np.arange(start, min(stop, len(self.held)))
        return self._batch(self.held[numbers], self.held, numbers)

    def _epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.digits)

    def _batch(self, chosen: np.ndarray, donors: np.ndarray, numbers: np.ndarray) -> Batch:
        drawn = [self._canvas(digit, donors, number) for digit, number in zip(chosen, numbers)]
        canvases, squares, near = (torch.from_numpy(np.stack(part)) for part in zip(*drawn))
        images = (canvases.unsqueeze(1).float() / 255 - MEAN) / STD
        return Batch(images, squares, torch.from_numpy(self.labels[chosen]), near.flatten(1))

    def _canvas(
        self, digit: int, donors: np.ndarray, number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, donors is self.digits, number))
        canvas = np.zeros((self.size, self.size), np.uint8)
        for donor in rng.choice(donors, self.fragments):
            y, x = rng.integers(5, 15, size=2)  # where the ink is
            _paste(canvas, self.images[donor, y : y + FRAGMENT, x : x + FRAGMENT], rng)
        corner = _paste(canvas, self.images[digit], rng)
        near, spoilt = (np.zeros((self.size // CELL,) * 2, bool) for _ in range(2))
        near[_windows(corner, 0)] = spoilt[_windows(corner, 1)] = True
        return canvas, self._draw_squares(canvas, ~spoilt, rng), near

    def _draw_squares(
        self, canvas: np.ndarray, free: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Squares on free tokens, each amid black ones, so that what is near a square tells
        nothing."""
        side, squares = len(free), []
        free[[0, -1]] = free[:, [0, -1]] = False
        for token in rng.permutation(np.flatnonzero(free)):
            y, x = divmod(int(token), side)
            if len(squares) < self.squares and free[y, x]:
                squares.append(token)
                free[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = False
                canvas[(y - 1) * CELL : (y + 2) * CELL, (x - 1) * CELL : (x + 2) * CELL] = 0
                canvas[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = 255
        return np.array(squares)


def _paste(canvas: np.ndarray, patch: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    side = len(patch)
    y, x = rng.integers(0, len(canvas) - side + 1, size=2)
    np.maximum(canvas[y : y + side, x : x + side], patch, out=canvas[y : y + side, x : x + side])
    return y, x


def _windows(corner: tuple[int, int], margin: int) -> tuple[slice, slice]:
    """The block of tokens of all windows within ``margin`` tokens of a digit whose corner is at
    this pixel."""

    def along(start: int) -> slice:
        first, last = max(0, start // CELL - margin), (start + DIGIT - 1) // CELL + margin
        return slice(first // WINDOW * WINDOW, (last // WINDOW + 1) * WINDOW)

    return along(corner[0]), along(corner[1])
