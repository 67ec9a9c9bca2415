"""Relative positions for the pairs of a query and its keys only: tables of distances, and SAM's
decomposed ones."""

import torch
from torch import Tensor

from colt5_vision.ops.routed_window_attention.gathered import PairBias
from colt5_vision.swap.site import Site

__all__ = ["decomposed_bias", "no_bias", "padded_bias", "table_bias"]


def no_bias() -> Tensor:
    """In place of a module's method: a mask without dimensions is none."""
    return torch.zeros(())


def decomposed_bias(q: Tensor, rows: Tensor, columns: Tensor, site: Site) -> PairBias:
    """The product of queries (B, heads, N, D) with vectors of their distance to a key.

    Args:
        rows, columns: (H, H, D) and (W, W, D), of a query's and a key's row or column.
    """
    _, height, width = site.grid
    query = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnhwc,hkc->bnhwk", query, rows.to(q.dtype)).flatten(2, 3)
    by_column = torch.einsum("bnhwc,wkc->bnhwk", query, columns.to(q.dtype)).flatten(2, 3)
    b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1, 1)

    def bias(i: Tensor, j: Tensor) -> Tensor:
        row = torch.div(j, width, rounding_mode="floor")
        return by_row[b, h, i, row] + by_column[b, h, i, j % width]

    return bias


def table_bias(
    table: Tensor, window: tuple[int, int], prefix: int, site: Site | None, device: torch.device
) -> PairBias:
    """A table (heads, distances) of the distances from a key to a query; behind them, with a class
    token in front, entries from it, to it, and of itself."""
    height, width = window
    if site is not None and site.grid[1:] != (height, width):
        raise ValueError(
            f"x: expected the {height} x {width} tokens of the relative position table, got "
            f"{site.grid[1]} x {site.grid[2]}; call model.set_input_size first"
        )
    heads = torch.arange(table.shape[0], device=device).view(1, -1, 1, 1, 1)
    last = (2 * height - 1) * (2 * width - 1)

    def bias(i: Tensor, j: Tensor) -> Tensor:
        row, column = i - prefix, j - prefix
        y = torch.div(row, width, rounding_mode="floor") - torch.div(
            column, width, rounding_mode="floor"
        )
        entry = (y + height - 1) * (2 * width - 1) + row % width - column % width + width - 1
        if prefix:
            entry = torch.where(j == 0, last + 1, torch.where(i == 0, last, entry))
            entry = torch.where((i == 0) & (j == 0), last + 2, entry)
        return table[heads, entry]

    return bias


def padded_bias(bias: PairBias, prefix: int) -> PairBias:
    """No bias from or to the prefix tokens."""

    def padded(i: Tensor, j: Tensor) -> Tensor:
        found = bias((i - prefix).clamp_min(0), (j - prefix).clamp_min(0))
        return torch.where((i < prefix) | (j < prefix), 0.0, found)

    return padded
