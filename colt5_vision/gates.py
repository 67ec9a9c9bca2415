"""What a router does to its soft gates: cell by cell, and straight through."""

import torch
from torch import Tensor

from ._torch_internals import without_tangent
from .ops.grid import cell_slots, slot_of_token


def log_gates(gates: Tensor) -> Tensor:
    """The logarithm of gates in [0, 1], finite."""
    return gates.clamp_min(torch.finfo(gates.dtype).tiny).log()


def only_gradient(x: Tensor) -> Tensor:
    """0 with the gradient of x; in forward mode a constant, which is what it is."""
    x = without_tangent(x)
    return x - x.detach()


def pass_straight(gates: Tensor, log_gradient: bool = False) -> Tensor:
    """Gates of exactly 1, with the gradient of ``gates``, or with that of their logarithm."""
    return 1 + only_gradient(log_gates(gates) if log_gradient else gates)


def gate_budget(slots: int, ratio: float, num_tokens: int) -> float:
    """The sum of the soft gates of a row: ``ratio`` times its slots, at most one a token."""
    return min(slots * ratio, num_tokens)


def cut_into_cells(
    logits: Tensor,
    k: float | Tensor,
    max_k: float,
    grid_size: tuple[int, int],
    cell_size: tuple[int, int],
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of logits, one a cell, each with its share of ``k`` by valid tokens.

    Args:
        logits: (..., N).
        k: a number, or one of each row (...).
        max_k: a number that no entry of ``k`` exceeds.
        mask: (..., N), True = valid.

    Returns:
        Logits (..., cells, slots), shares (..., cells), and which slots are valid.
    """
    index, inside = cell_slots(*grid_size, cell_size, logits.device)
    valid = inside if mask is None else inside & mask[..., index]
    valid = valid.expand(*logits.shape[:-1], *inside.shape)
    count = valid.sum(-1).to(logits.dtype)
    k = k.to(logits.dtype).unsqueeze(-1) if isinstance(k, Tensor) else k
    share = k * count / count.sum(-1, keepdim=True).clamp_min(1)
    # an empty cell has a budget, if none to speak of; rounding must not lift one above the bound
    share = share.clamp_min(torch.finfo(logits.dtype).tiny).clamp_max(max_k)
    return logits[..., index], share, valid


def join_cells(gates: Tensor, grid_size: tuple[int, int], cell_size: tuple[int, int]) -> Tensor:
    """Gates (..., cells, slots) of :func:`cut_into_cells` in raster order, (..., N)."""
    slots = slot_of_token(*grid_size, cell_size, gates.device)
    return gates.flatten(-2).index_select(-1, slots)
