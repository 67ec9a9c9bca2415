"""Cutting a raster map into cells (windows) and back, by index."""

import torch
from torch import Tensor


def cell_slots(height: int, width: int, cell: tuple[int, int], device) -> tuple[Tensor, Tensor]:
    """Cut a map into cells of ``cell`` from its top left; cells at the border are what is left of
    them.

    Returns:
        (index, inside), both (cells, slots): the raster index in each slot of each cell (some valid
        index where the slot lies outside the map), and a bool, True inside. A map smaller than a
        cell is one cell of its own size.
    """
    ch, cw = min(cell[0], height), min(cell[1], width)
    # rounded up; of positive numbers: ONNX divides towards 0
    rows, cols = (height + ch - 1) // ch, (width + cw - 1) // cw
    y = torch.arange(rows * ch, device=device).view(rows, 1, ch, 1)
    x = torch.arange(cols * cw, device=device).view(1, cols, 1, cw)
    inside = (y < height) & (x < width)
    index = y.clamp_max(height - 1) * width + x.clamp_max(width - 1)
    return index.reshape(rows * cols, ch * cw), inside.reshape(rows * cols, ch * cw)


def slot_of_token(height: int, width: int, cell: tuple[int, int], device) -> Tensor:
    """(N,), the slot of each token in raster order: the inverse of the flattened ``cell_slots``."""
    ch, cw = min(cell[0], height), min(cell[1], width)
    cols = (width + cw - 1) // cw
    y = torch.arange(height, device=device).unsqueeze(1)
    x = torch.arange(width, device=device).unsqueeze(0)
    row, col = y // ch, x // cw
    # no remainder: ONNX has none by a size that is not fixed
    slot = (row * cols + col) * (ch * cw) + (y - row * ch) * cw + x - col * cw
    return slot.reshape(-1)


def window_of_token(height: int, width: int, cell: tuple[int, int], device) -> Tensor:
    """(N,), the cell of each token in raster order."""
    area = min(cell[0], height) * min(cell[1], width)
    return torch.div(slot_of_token(height, width, cell, device), area, rounding_mode="floor")
