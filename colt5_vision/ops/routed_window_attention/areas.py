"""The windows of a map as areas of windows of one size, which are cut out by views: four at most,
for those at the right and the lower border may be smaller."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry


@dataclass(frozen=True)
class Area:
    """Windows of one size, side by side.

    Attributes:
        top, left: first token.
        down, across: how many windows.
        height, width: of each.
        first, columns: number of the first window, and windows in a row of the map.
    """

    top: int
    left: int
    down: int
    across: int
    height: int
    width: int
    first: int
    columns: int

    @property
    def windows(self) -> int:
        return self.down * self.across

    def numbers(self, device) -> Tensor:
        """(windows,), as ``window_of_token`` counts them."""
        row = torch.arange(self.down, device=device).unsqueeze(1) * self.columns
        return (self.first + row + torch.arange(self.across, device=device)).flatten()

    def view(self, x: Tensor) -> Tensor:
        """(B, heads, H, W, D) -> (B, down, across, height, width, heads, D)."""
        rows = slice(self.top, self.top + self.down * self.height)
        columns = slice(self.left, self.left + self.across * self.width)
        x = x[:, :, rows, columns].unflatten(3, (self.across, self.width))
        return x.unflatten(2, (self.down, self.height)).permute(0, 2, 4, 3, 5, 1, 6)

    def take(self, x: Tensor) -> Tensor:
        """(B, heads, H, W, D) -> (B * windows, heads, height * width, D)."""
        size = (x.shape[0] * self.windows, self.height * self.width, x.shape[1], x.shape[4])
        return self.view(x).reshape(size).transpose(1, 2)

    def put(self, x: Tensor, into: Tensor) -> None:
        """The inverse of :meth:`take`, in place."""
        view = self.view(into)
        view.copy_(x.transpose(1, 2).reshape(view.shape))


def areas_of(geo: Geometry) -> list[Area]:
    """The windows of a map, from its top left: whole ones, then those that a border cuts."""
    height, width = (min(w, n) for w, n in zip(geo.window, (geo.height, geo.width)))
    down, across = geo.height // height, geo.width // width
    below, beside = geo.height - down * height, geo.width - across * width
    columns = across + (beside > 0)
    rows = [(0, down, height, 0), (down * height, 1, below, down * columns)]
    cols = [(0, across, width, 0), (across * width, 1, beside, across)]
    return [
        Area(top, left, some, more, h, w, row + column, columns)
        for top, some, h, row in rows
        for left, more, w, column in cols
        if h and w
    ]
