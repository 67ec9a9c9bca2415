"""Soft top-k operators: checks, dispatch and autograd around ``eager.py``."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._torch_internals import has_values, in_onnx_export, is_transformed
from ...checks import check_float_tensor, check_int, check_mask, check_positive
from ..backend import check_backend, needs_operator, takes_transform, use_triton, why_not_triton
from ..dtypes import wide_dtype
from ..registration import (
    count_flops,
    laid_out_as,
    no_flops,
    once_differentiable,
    operator,
    overridable,
)
from . import eager
from .common import eps_schedule

_ONCE = "coordinate_descent: once differentiable; soft_topk is its limit, differentiable twice"

MOST_ITERATIONS = 4096
"""Of the kernels of coordinate descent: their backward holds the iterates of a row in one
program."""


def _runs_kernels(operator: str, backend: str, scores: Tensor, n_iters: int = 1) -> bool:
    """Asked inside the registered operators: ``torch.compile`` must not trace the environment."""
    why_not = why_not_triton(scores, (torch.float32,))
    if why_not is None and n_iters > MOST_ITERATIONS:
        why_not = f"the kernels take at most {MOST_ITERATIONS} iterations, got {n_iters}"
    return use_triton(operator, backend or None, why_not)


@operator("soft_topk")
def _soft_topk(
    scores: Tensor, k: Tensor, num_valid: Tensor, eps: float, head_size: int, backend: str = ""
) -> Tensor:
    if _runs_kernels("soft_topk", backend, scores):
        from . import triton

        return triton.forward(scores, k, num_valid, eps)
    return eager.soft_topk_forward(scores, k, num_valid, eps, head_size)


@_soft_topk.register_fake
def _(scores, k, num_valid, eps, head_size, backend=""):
    return torch.empty_like(scores)


@operator("soft_topk_backward")
def _soft_topk_gradient(
    grad: Tensor, gates: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if _runs_kernels("soft_topk", backend, gates):
        from . import triton

        return triton.backward(grad, gates, eps)
    grad_scores, grad_k = eager.soft_topk_backward(grad, gates, eps)
    return laid_out_as(grad_scores, gates), grad_k


@_soft_topk_gradient.register_fake
def _(grad, gates, eps, backend):
    return torch.empty_like(gates), gates.new_empty(gates.shape[0], 1)


def _soft_topk_setup(ctx, inputs, output):
    ctx.eps, ctx.backend = inputs[3], inputs[5]
    ctx.save_for_backward(output)  # the gates alone: U and the gradient follow from them


def _soft_topk_backward(ctx, grad):
    (gates,) = ctx.saved_tensors
    # plain torch where no kernel can run, and where the gradient is to be differentiated again
    plain = torch.is_grad_enabled() or is_transformed(grad) or not needs_operator(gates)
    if plain:
        grad_scores, grad_k = eager.soft_topk_backward(grad, gates, ctx.eps)
    else:
        grad_scores, grad_k = _soft_topk_gradient(grad, gates, ctx.eps, ctx.backend)
    return grad_scores, grad_k, None, None, None, None


_soft_topk.register_autograd(_soft_topk_backward, setup_context=_soft_topk_setup)
count_flops("soft_topk", no_flops)
count_flops("soft_topk_backward", no_flops)


@operator("coordinate_descent")
def _coordinate_descent(
    scores: Tensor, k: Tensor, num_valid: Tensor, schedule: Sequence[float], backend: str = ""
) -> tuple[Tensor, Tensor]:
    if _runs_kernels("coordinate_descent", backend, scores, len(schedule) - 1):
        from . import triton_descent

        return triton_descent.forward(scores, k, num_valid, schedule)
    return eager.coordinate_descent_forward(scores, k, num_valid, schedule)


@_coordinate_descent.register_fake
def _(scores, k, num_valid, schedule, backend=""):
    return torch.empty_like(scores), scores.new_empty(scores.shape[0], len(schedule) - 1)


@operator("coordinate_descent_backward")
def _coordinate_descent_backward(
    grad: Tensor,
    scores: Tensor,
    gates: Tensor,
    iterates: Tensor,
    k: Tensor,
    num_valid: Tensor,
    schedule: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    if _runs_kernels("coordinate_descent", backend, scores, len(schedule) - 1):
        from . import triton_descent

        return triton_descent.backward(grad, scores, gates, iterates, k, schedule)
    return eager.coordinate_descent_backward(grad, scores, gates, iterates, k, num_valid, schedule)


@_coordinate_descent_backward.register_fake
def _(grad, scores, gates, iterates, k, num_valid, schedule, backend):
    return torch.empty_like(scores), torch.empty_like(k)


def _coordinate_descent_setup(ctx, inputs, output):
    scores, k, num_valid, ctx.schedule, ctx.backend = inputs
    gates, iterates = output
    ctx.mark_non_differentiable(iterates)
    ctx.save_for_backward(scores, gates, iterates, k, num_valid)


def _coordinate_descent_autograd(ctx, grad, _):
    if is_transformed(grad):
        raise NotImplementedError(_ONCE)
    grad_scores, grad_k = _coordinate_descent_backward(
        grad, *ctx.saved_tensors, ctx.schedule, ctx.backend
    )
    return grad_scores, grad_k, None, None, None


_coordinate_descent.register_autograd(
    _coordinate_descent_autograd, setup_context=_coordinate_descent_setup
)
once_differentiable(_coordinate_descent_backward, _ONCE)
count_flops("coordinate_descent", no_flops)
count_flops("coordinate_descent_backward", no_flops)


def _head_size(name: str, k, n: int, expected: str = "a number") -> int:
    """ceil(k) or n, the lower, of a checked number ``k`` > 0."""
    if isinstance(k, bool) or not isinstance(k, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected {expected}, got {k!r} ({type(k).__name__})")
    if not k > 0:
        raise ValueError(f"{name}: expected a number > 0, got {k}")
    if isinstance(k, numbers.Real) and k >= n:
        return n
    # the ceiling of a size that is open is itself: ONNX has none of integers
    return min(k if isinstance(k, torch.SymInt) else math.ceil(k), n)


def _check_row_counts(k: Tensor, shape: torch.Size, n: int, max_k: float | None) -> int:
    """The head size of rows of ``n`` scores with a ``k`` each, a number or of ``shape``."""
    # every k
    if k.ndim > 0 and k.shape != shape:
        raise ValueError(
            f"k: expected a number or a tensor of shape {tuple(shape)}, got {tuple(k.shape)}"
        )
    if k.dtype == torch.bool or k.is_complex():
        raise TypeError(f"k: expected a real number or tensor, got {k.dtype}")
    if has_values(k) and not bool((k > 0).all()):
        raise ValueError(f"k: expected every entry > 0, got {k.detach().tolist()}")

    # their bound
    if max_k is None:
        return n
    head = _head_size("max_k", max_k, n)
    if has_values(k) and not bool((k <= max_k).all()):
        raise ValueError(f"k: expected every entry <= max_k = {max_k}, got {k.detach().tolist()}")
    return head


def checked_rows(
    scores: Tensor, k, mask: Tensor | None, max_k: float | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Checked input as rows: scores (rows, n) in float32 or float64, k and num_valid (rows, 1), and
    a static head size.

    The head holds the ceil(k) largest entries of every row: ceil(k) of a number, ceil(max_k) of a
        tensor, at most n.
    """
    # checks
    check_float_tensor("scores", scores)
    if scores.ndim < 1 or scores.shape[-1] < 1:
        raise ValueError(f"scores: expected shape (..., n) with n >= 1, got {tuple(scores.shape)}")
    check_mask("mask", mask, scores.shape)

    # rows that a mask leaves
    shape, n = scores.shape, scores.shape[-1]
    dtype = wide_dtype(scores)
    rows = scores.to(dtype)
    num_valid = torch.full((*shape[:-1], 1), n, dtype=torch.int64, device=scores.device)
    if mask is not None:
        # the dtype's minimum, not -inf: differences stay free of NaN
        rows = torch.where(mask, rows, torch.finfo(dtype).min)
        num_valid = mask.sum(-1, keepdim=True)

    # k of each row, and how many entries may be capped
    if isinstance(k, Tensor):
        head = _check_row_counts(k, shape[:-1], n, max_k)
        k_rows = k.to(device=scores.device, dtype=dtype).expand(shape[:-1]).unsqueeze(-1)
    elif max_k is not None:
        raise ValueError(f"max_k: only used with a tensor k, got the number k = {k!r}")
    else:
        head = _head_size("k", k, n, "a number or a tensor")
        k_rows = torch.full((*shape[:-1], 1), k, dtype=dtype, device=scores.device)
    # over one dimension: straight to two, torch 2.11 compares strides, which an export then fixes
    rows = rows.flatten().view(-1, n)
    return rows, k_rows.reshape(-1, 1), num_valid.reshape(-1, 1), head


@overridable
def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    eps: float = 1.0,
    mask: Tensor | None = None,
    max_k: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact differentiable top-k gates: ``min(1, exp((scores + a) / eps))`` with ``a`` such that
    they sum to ``k``.

    The KL projection of ``exp(scores / eps)`` onto the capped simplex, which is the fixed point
    that coordinate descent approaches. Solved from one ``torch.topk`` (a sort for a tensor ``k``
    without ``max_k``) and one pass over the rest, no iteration, or by Triton kernels that spread a
    long row over the GPU; the gradient is closed-form (implicit function theorem) and twice
    differentiable. One tensor of the scores' size is kept for backward.

    Args:
        scores: (..., n) logits, any floating dtype.
        k: the sum of the gates of a row: a positive number, or a tensor of shape (...), fractional
            allowed, differentiable. A ``k`` of at least the number of valid entries gives gates of
            1.
        eps: temperature in units of the scores, > 0; smaller is harder.
        mask: (..., n) bool, True = valid. Masked entries get gate 0 and gradient 0.
        max_k: a number that no entry of a tensor ``k`` exceeds: only that many largest scores of a
            row are sorted, not all n. Checked on the CPU; elsewhere reading ``k`` would wait for
            the device, and plain torch gives a row above it gates of a lower sum.
        backend: ``"eager"`` (plain torch), ``"triton"`` (float32 and narrower, CUDA or ROCm), or
            ``"auto"``: Triton where it can run. Default: the environment variable
            ``COLT5_VISION_BACKEND``, else ``"auto"``.

    Returns:
        Gates (..., n) in [0, 1], float32 (float64 for float64 scores) whatever the input or
        autocast.

    Raises:
        TypeError, ValueError: on a wrong dtype or shape, ``k <= 0``, ``k > max_k``, a ``max_k``
            with a number ``k``, ``eps <= 0`` or an unknown ``backend``.
        RuntimeError: ``"triton"`` was asked for and cannot run; it says why.

    Source: Wright 2015 (arXiv 1502.04759); Qian et al. 2022 (arXiv 2211.01267); CoLT5 (arXiv
        2303.09752) section 3.
    """
    eps = check_positive("eps", eps)
    check_backend(backend)
    rows, k_rows, num_valid, head = checked_rows(scores, k, mask, max_k)
    if takes_transform("soft_topk", backend, rows, k_rows):
        gates = eager.soft_topk_by_softmax(rows, k_rows, num_valid, eps, head)
    elif in_onnx_export(rows):
        gates = eager.soft_topk_forward(rows, k_rows, num_valid, eps, head)
    else:
        gates = _soft_topk(rows, k_rows, num_valid, eps, head, backend or "")
    gates = gates.reshape(scores.shape)
    return gates if mask is None else torch.where(mask, gates, 0)


@overridable
def coordinate_descent(
    scores: Tensor,
    k: float | Tensor,
    *,
    n_iters: int = 50,
    eps: float = 1.0,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """CoLT5's iterative soft top-k, stopped after ``n_iters``: for parity with
    ``colt5_attention.coor_descent``.

    Its gates sum to ``k`` only in the limit; :func:`soft_topk` is that limit, exact and faster. The
    state is one scalar per row and iteration, forward and backward; the gradient equals autograd's
    through all iterations. Once differentiable.

    Args:
        scores: (..., n) logits, any floating dtype.
        k: a positive number, or a tensor of shape (...), differentiable.
        n_iters: iterations, >= 1.
        eps: final temperature, > 0.
        eps_init: first temperature (default ``eps``), multiplied by ``eps_decay`` each iteration
            down to ``eps``.
        eps_decay: in (0, 1].
        mask: (..., n) bool, True = valid.
        backend: as :func:`soft_topk`.

    Returns:
        Gates (..., n), float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`soft_topk`.

    Source: Wright 2015 (arXiv 1502.04759); eps scaling: Schmitzer 2016 (arXiv 1610.06519).
    """
    n_iters, eps = check_int("n_iters", n_iters), check_positive("eps", eps)
    eps_init = None if eps_init is None else check_positive("eps_init", eps_init)
    if check_positive("eps_decay", eps_decay) > 1:
        raise ValueError(f"eps_decay: expected a number in (0, 1], got {eps_decay}")
    check_backend(backend)
    rows, k_rows, num_valid, _ = checked_rows(scores, k, mask)
    schedule = eps_schedule(n_iters, eps, eps_init, eps_decay)
    if takes_transform("coordinate_descent", backend, rows, k_rows):
        gates = eager.coordinate_descent(rows, k_rows, num_valid, schedule)
    elif in_onnx_export(rows):
        gates = eager.coordinate_descent_forward(rows, k_rows, num_valid, schedule)[0]
    else:
        gates = _coordinate_descent(rows, k_rows, num_valid, schedule, backend or "")[0]
    gates = gates.reshape(scores.shape)
    return gates if mask is None else torch.where(mask, gates, 0)
