"""Hard selection of the tokens to route: checks and dispatch around ``eager.py``."""

import math
import numbers

import torch
from torch import Tensor

from ..._torch_internals import has_values, in_onnx_export, is_traced, is_transformed
from ...checks import check_float_tensor, check_int, check_mask, check_pair
from ..backend import (
    check_backend,
    needs_operator,
    requested_backend,
    takes_transform,
    use_triton,
    why_not_triton,
)
from ..dtypes import wide_dtype
from ..registration import count_flops, no_flops, operator, overridable
from . import eager


@operator("top_indices")
def _top_indices(scores: Tensor, k: int, backend: str) -> Tensor:
    # "auto" stays with torch.topk: no measurement on a GPU has shown the kernels to be faster yet
    if requested_backend(backend) == "triton":
        use_triton("route_topk", "triton", why_not_triton(scores, (torch.float32,)))  # says why not
        from . import triton

        return triton.top_indices(scores, k)
    return eager.top_indices(scores, k).contiguous()


@_top_indices.register_fake
def _(scores, k, backend):
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


count_flops("top_indices", no_flops)


def _select(scores: Tensor, k: int, backend: str | None) -> Tensor:
    """Indices (..., k); through the registered operator only where it may find the kernels asked
    for."""
    if in_onnx_export(scores) or takes_transform("route_topk", backend, scores):
        return eager.top_indices(scores, k)
    if backend is None and not is_traced(scores):  # a graph asks when it runs
        backend = requested_backend()
    if backend == "triton" or (backend is None and needs_operator(scores)):
        return _top_indices(scores, k, backend or "")
    return eager.top_indices(scores, k)


@overridable
def route_topk(
    scores: Tensor,
    k: int | Tensor,
    *,
    mask: Tensor | None = None,
    num_slots: int | None = None,
    grid_size: tuple[int, int] | None = None,
    cell_size: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices of the ``k`` largest scores of each row, a total order: ties go to the lower index.

    Masked tokens are never taken while a valid one is left. With ``cell_size`` the selection is
    stratified: the map is cut into cells and each gets its share of ``k`` (in proportion to its
    valid tokens, rounded up or down by largest remainder), the best of the cell; cells at the
    border are smaller, nothing is dropped.

    Args:
        scores: (..., n) logits. Their values are only compared, so gates saturated at 1 are never
            ranked.
        k: tokens to take, an int >= 1 (above n: every token) or an integer tensor (...), one count
            a row.
        mask: (..., n) bool, True = valid.
        num_slots: width of the result for a tensor ``k`` (default: its largest entry, which reads
            the tensor; give it under ``torch.compile``). Larger entries of ``k`` are cut to it.
        grid_size: (H, W) with H * W = n in raster order; needed by ``cell_size``.
        cell_size: height and width of the cells of a stratified selection.
        backend: ``"eager"`` and ``"auto"`` run ``torch.topk``; ``"triton"`` a radix select that
            spreads a long row over the GPU (float32 and narrower, CUDA or ROCm), the same result.
            Default: the environment variable ``COLT5_VISION_BACKEND``, else ``"auto"``.

    Returns:
        ``(indices, valid)``, both (..., K), K = min(k, n): int64 indices in falling order of score,
        and a bool that is False where a slot is empty (fewer valid tokens than slots, or beyond a
        row's own ``k``). Indices of empty slots are in range.

    Raises:
        TypeError, ValueError: on a wrong dtype or shape, ``k`` < 1, a grid that does not match n,
            an unknown ``backend``.
        RuntimeError: ``"triton"`` was asked for and cannot run; it says why.
    """
    # checks
    check_backend(backend)
    check_float_tensor("scores", scores)
    if scores.ndim < 1 or scores.shape[-1] < 1:
        raise ValueError(f"scores: expected shape (..., n) with n >= 1, got {tuple(scores.shape)}")
    check_mask("mask", mask, scores.shape)
    size = isinstance(k, Tensor) and k.ndim == 0 and (scores.ndim > 1 or num_slots is None)
    if size and torch.jit.is_tracing():
        k = int(k)  # a size, as torch.jit.trace has it
    slots = _checked_slots(k, num_slots, scores)
    cells = _checked_cells(grid_size, cell_size, scores.shape[-1])

    # scores by which to rank: of each cell in turn, the masked ones last
    scores = scores.detach().to(wide_dtype(scores))
    if mask is not None or cells is not None:
        # -inf now means "not to be taken": a valid -inf, or a NaN of either sign, stays above it
        scores = scores.nan_to_num(math.inf, math.inf, torch.finfo(scores.dtype).min)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if cells is not None:
        count = k.unsqueeze(-1) if isinstance(k, Tensor) else slots
        scores = eager.stratified_scores(scores, count, *cells)

    # the top of them, and which slots are filled
    indices = _select(scores, slots, backend)
    valid = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask.gather(-1, indices)
    if isinstance(k, Tensor):
        valid = valid & (torch.arange(slots, device=indices.device) < k.unsqueeze(-1))
    return indices, valid


def _checked_slots(k, num_slots, scores: Tensor) -> int:
    """The width of the result."""
    n = scores.shape[-1]
    if not isinstance(k, Tensor):
        if num_slots is not None:
            raise ValueError("num_slots: only used with a tensor k, got an int k")
        if not isinstance(k, (numbers.Integral, torch.SymInt)) or isinstance(k, bool):
            raise TypeError(
                f"k: expected an int or an integer tensor, got {k!r} ({type(k).__name__})"
            )
        return min(check_int("k", k), n)

    if k.is_floating_point() or k.dtype == torch.bool or k.shape != scores.shape[:-1]:
        raise ValueError(
            f"k: expected an int or an integer tensor of shape {tuple(scores.shape[:-1])}, "
            f"got {k.dtype} of shape {tuple(k.shape)}"
        )
    if has_values(k) and bool((k < 1).any()):
        raise ValueError(f"k: expected every entry >= 1, got {k.tolist()}")
    if num_slots is None and (k.is_meta or is_traced(k) or is_transformed()):
        raise ValueError("num_slots: needed with a tensor k whose values cannot be read, got None")
    if num_slots is None:
        num_slots = int(k.max()) if k.numel() else 1
    return min(check_int("num_slots", num_slots), n)


def _checked_cells(grid_size, cell_size, n: int) -> tuple[tuple, tuple] | None:
    """Grid and cell, both (height, width)."""
    if cell_size is None:
        if grid_size is not None:
            raise ValueError("grid_size: only used with cell_size, got no cell_size")
        return None
    cell = check_pair("cell_size", cell_size)
    if grid_size is None:
        raise ValueError("grid_size: needed with cell_size, got None")
    height, width = check_pair("grid_size", grid_size)
    if height * width != n:
        raise ValueError(f"grid_size: expected H * W = {n}, got {height} * {width}")
    return (height, width), cell
