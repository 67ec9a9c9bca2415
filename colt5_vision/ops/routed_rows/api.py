"""Reading and writing routed rows of a map: checks, dispatch, registration, autograd."""

import torch
from torch import Tensor

from ...checks import check_float_tensor, check_positive
from ..backend import HALVES, takes_operator, use_triton, why_not_triton
from . import reference

GATHER, SCATTER = "gather_normalize", "gated_scatter_add_"


@torch.library.custom_op("colt5_vision::gather_normalize", mutates_args=())
def _gather_normalize(
    x: Tensor, indices: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    if use_triton(GATHER, backend, why_not_triton(x)):
        from . import triton

        return triton.gather_normalize_forward(x, indices, weight, eps, dtype)
    out, scale = reference.gather_normalize_forward(x, indices, weight, eps, dtype)
    return out.contiguous(), scale.contiguous()


@_gather_normalize.register_fake
def _(x, indices, weight, eps, dtype, backend):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(*indices.shape, x.shape[-1], dtype=dtype), x.new_empty(indices.shape, dtype=wide)


@torch.library.custom_op("colt5_vision::gather_normalize_backward", mutates_args=())
def _gather_normalize_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    with_x: bool,
    with_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if use_triton(GATHER, backend, why_not_triton(x)):
        from . import triton

        grads = triton.gather_normalize_backward(grad, x, indices, weight, scale, with_x, with_weight)
    else:
        grads = reference.gather_normalize_backward(grad, x, indices, weight, scale)
    return grads[0] if with_x else x.new_empty(0), grads[1].contiguous() if with_weight else weight.new_empty(0)


@_gather_normalize_backward.register_fake
def _(grad, x, indices, weight, scale, with_x, with_weight, backend):
    return (
        torch.empty_like(x) if with_x else x.new_empty(0),
        weight.new_empty(weight.shape) if with_weight else weight.new_empty(0),
    )


def _gather_setup(ctx, inputs, output):
    x, indices, weight, ctx.eps, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, indices, weight, output[1])


def _gather_backward(ctx, grad, _):
    with_x, with_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    if torch.is_grad_enabled():  # to be differentiated again: plain torch
        x, indices, weight, _ = ctx.saved_tensors
        wanted = [value for value, needed in ((x, with_x), (weight, with_weight)) if needed]
        out = reference.gather_normalize(x, indices, weight, ctx.eps)
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True))
        return next(grads) if with_x else None, None, next(grads) if with_weight else None, None, None, None
    grads = _gather_normalize_backward(grad, *ctx.saved_tensors, with_x, with_weight, ctx.backend)
    return grads[0] if with_x else None, None, grads[1] if with_weight else None, None, None, None


_gather_normalize.register_autograd(_gather_backward, setup_context=_gather_setup)


# custom_op refuses the autograd of an operator that mutates, and Dynamo an autograd.Function that does (mark_dirty):
# an operator with its own kernel for the autograd key is opaque to the one and free of the other
_library = torch.library.Library("colt5_vision", "FRAGMENT")
_library.define(
    f"{SCATTER}(Tensor(a!) out, Tensor rows, Tensor indices, Tensor? gates, Tensor? null, str? backend) -> ()"
)


def _scatter(out, rows, indices, gates, null, backend):
    if use_triton(SCATTER, backend, why_not_triton(out)):
        from . import triton

        triton.gated_scatter_add_(out, rows, indices, gates, null)
    else:
        reference.gated_scatter_add_(out, rows, indices, gates, null)


@torch.library.custom_op("colt5_vision::gated_scatter_add_backward", mutates_args=())
def _scatter_backward(
    grad: Tensor, rows: Tensor, indices: Tensor, gates: Tensor | None, with_null: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton(SCATTER, backend, why_not_triton(grad)):
        from . import triton

        grads = triton.gated_scatter_add_backward(grad, rows, indices, gates, with_null)
    else:
        grads = reference.gated_scatter_add_backward(grad, rows, indices, gates)
    return (
        grads[0].contiguous(),
        grad.new_empty(0) if gates is None else grads[1].contiguous(),
        grads[2] if with_null else grad.new_empty(0),
    )


@_scatter_backward.register_fake
def _(grad, rows, indices, gates, with_null, backend):
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return (
        rows.new_empty(rows.shape),
        grad.new_empty(0) if gates is None else gates.new_empty(gates.shape),
        grad.new_empty(grad.shape[-1], dtype=wide) if with_null else grad.new_empty(0),
    )


class _GatedScatterAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, rows, indices, gates, null, backend):
        ctx.backend, ctx.null_dtype = backend, None if null is None else null.dtype
        ctx.save_for_backward(rows, indices, gates)
        ctx.mark_dirty(out)
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.colt5_vision.gated_scatter_add_(out, rows, indices, gates, null, backend)
        return out

    @staticmethod
    def backward(ctx, grad):
        _, with_rows, _, with_gates, with_null, _ = ctx.needs_input_grad
        if not (with_rows or with_gates or with_null):
            return grad, None, None, None, None, None
        if torch.is_grad_enabled():  # to be differentiated again: plain torch
            grads = reference.gated_scatter_add_backward(grad, *ctx.saved_tensors)
        else:
            grads = _scatter_backward(grad, *ctx.saved_tensors, with_null, ctx.backend)
        return (
            grad,
            grads[0] if with_rows else None,
            None,
            grads[1] if with_gates else None,
            grads[2].to(ctx.null_dtype) if with_null else None,
            None,
        )


def _scatter_autograd(out, rows, indices, gates, null, backend):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (out, rows, gates, null)):
        _GatedScatterAdd.apply(out, rows, indices, gates, null, backend)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            torch.ops.colt5_vision.gated_scatter_add_(out, rows, indices, gates, null, backend)
        if not out.is_inference():  # a kernel's writes go unnoticed otherwise
            torch.autograd.graph.increment_version(out)


_library.impl(SCATTER, _scatter, "CompositeExplicitAutograd")
_library.impl(SCATTER, _scatter_autograd, "Autograd")
torch.library.register_fake(
    f"colt5_vision::{SCATTER}", lambda out, rows, indices, gates, null, backend: None, lib=_library
)


def _check_indices(indices: Tensor, map_name: str, x: Tensor, shapes: tuple[str, ...]) -> None:
    """``indices`` (B, K), or (B, R, K) if ``shapes`` has two entries, into the N tokens of ``x``."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices: expected a tensor of torch.int64, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected torch.int64, got {indices.dtype}")
    batch, num_tokens, _ = x.shape
    if not 2 <= indices.ndim < 2 + len(shapes) or indices.shape[0] != batch:
        expected = " or ".join(f"({batch}, {shape})" for shape in shapes)
        raise ValueError(f"indices: expected shape {expected}, got {tuple(indices.shape)}")
    _check_device("indices", indices, map_name, x)
    # reading values costs nothing on the CPU; elsewhere it would be a host sync
    if indices.device.type == "cpu" and indices.numel() > 0 and not torch.compiler.is_compiling():
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"indices: expected entries in [0, {num_tokens}), got [{low}, {high}]")


def _check_device(name: str, value: Tensor, map_name: str, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, that of {map_name}, got {value.device}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], map_name: str, x: Tensor) -> None:
    check_float_tensor(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    _check_device(name, value, map_name, x)


def gather_normalize(
    x: Tensor, indices: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """``rms_norm(x[indices]) * weight``: routed rows of a map, normalised as they are read.

    Args:
        x: (B, N, C), of any strides.
        indices: (B, K) or (B, R, K) int64 in [0, N), distinct within a row of K; routes may share tokens. Values are
            checked on the CPU; through kernels an index out of range gives a row of NaN.
        weight: (C,), as that of ``nn.RMSNorm``.
        eps: added to the mean square, > 0.
        backend: ``"eager"``, ``"triton"`` or ``"auto"``; None: environment variable ``COLT5_VISION_BACKEND``, else auto.

    Returns:
        (B, K, C) or (B, R, K, C) in the dtype that ``torch.nn.functional.rms_norm`` gives: that of ``x``, and under
        CUDA's autocast float32. The mean is taken in float32 (float64). The gradient of ``x`` is deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: RMSNorm (arXiv 1910.07467), of the heavy branch of CoLT5 (arXiv 2303.09752).
    """
    check_float_tensor("x", x, ndim=3)
    _check_indices(indices, "x", x, ("K", "R, K"))
    _check_shape("weight", weight, x.shape[-1:], "x", x)
    eps = check_positive("eps", eps)
    if not takes_operator(GATHER, backend, x):
        return reference.gather_normalize(x, indices, weight, eps)
    # rms_norm is on CUDA's list of operators that autocast runs in float32
    widened = x.device.type == "cuda" and x.dtype in HALVES and torch.is_autocast_enabled("cuda")
    routes = indices if indices.ndim == 3 else indices.unsqueeze(1)
    out = _gather_normalize(x, routes, weight, eps, torch.float32 if widened else x.dtype, backend)[0]
    return out if indices.ndim == 3 else out.squeeze(1)


def gated_scatter_add_(
    out: Tensor,
    rows: Tensor,
    indices: Tensor,
    *,
    gates: Tensor | None = None,
    null: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``out[indices] += gates * rows - null``, in place: only the routed rows of the map are touched.

    With ``null`` already in every row of ``out`` (as the bias of the layer that made it), a routed row trades it for
    its gated heavy output.

    Args:
        out: (B, N, C), of any strides, changed in place; autograd must not need its old values, as with every in-place
            operator.
        rows: (B, K, C).
        indices: (B, K) int64 in [0, N), distinct within a row. Values are checked on the CPU; kernels pass over an
            index out of range.
        gates: (B, K); None: 1.
        null: (C,), rounded to the dtype of ``out``; None: 0.
        backend: ``"eager"``, ``"triton"`` or ``"auto"``; None: environment variable ``COLT5_VISION_BACKEND``, else auto.

    Returns:
        ``out`` itself, differentiable in all four.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: CoLT5 (arXiv 2303.09752) section 3: light output for all, gated heavy output for the routed.
    """
    check_float_tensor("out", out, ndim=3)
    batch, _, dim = out.shape
    _check_indices(indices, "out", out, ("K",))
    _check_shape("rows", rows, (batch, indices.shape[1], dim), "out", out)
    if gates is not None:
        _check_shape("gates", gates, (batch, indices.shape[1]), "out", out)
    if null is not None:
        _check_shape("null", null, (dim,), "out", out)
        null = null.to(out.dtype)  # as it was added
    if not takes_operator(SCATTER, backend, out):
        return reference.gated_scatter_add_(out, rows, indices, gates, null)
    torch.ops.colt5_vision.gated_scatter_add_(out, rows, indices, gates, null, backend)
    return out
