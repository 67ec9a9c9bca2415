"""Reading routed rows of a map: checks, dispatch, registration, autograd."""

import torch
from torch import Tensor

from ..._torch_internals import has_values, is_transformed
from ...checks import check_float_tensor, check_positive
from ..backend import HALVES, takes_operator, use_triton, why_not_triton
from ..dtypes import wide_dtype
from ..registration import count_flops, no_flops, operator, overridable
from . import eager

NAME = "gather_normalize"


@operator("gather_normalize")
def _gather_normalize(
    x: Tensor, indices: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    if use_triton(NAME, backend, why_not_triton(x)):
        from . import triton

        return triton.gather_normalize_forward(x, indices, weight, eps, dtype)
    out, scale = eager.gather_normalize_forward(x, indices, weight, eps, dtype)
    return out.contiguous(), scale.contiguous()


@_gather_normalize.register_fake
def _(x, indices, weight, eps, dtype, backend):
    wide = wide_dtype(x)
    return x.new_empty(*indices.shape, x.shape[-1], dtype=dtype), x.new_empty(
        indices.shape, dtype=wide
    )


@operator("gather_normalize_backward")
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
    if use_triton(NAME, backend, why_not_triton(x)):
        from . import triton

        grads = triton.gather_normalize_backward(
            grad, x, indices, weight, scale, with_x, with_weight
        )
    else:
        grads = eager.gather_normalize_backward(grad, x, indices, weight, scale)
    return grads[0] if with_x else x.new_empty(0), grads[
        1
    ].contiguous() if with_weight else weight.new_empty(0)


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
    if torch.is_grad_enabled() or is_transformed(grad):  # to be differentiated again: plain torch
        x, indices, weight, _ = ctx.saved_tensors
        wanted = [value for value, needed in ((x, with_x), (weight, with_weight)) if needed]
        out = eager.gather_normalize(x, indices, weight, ctx.eps)
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True))
        return (
            next(grads) if with_x else None,
            None,
            next(grads) if with_weight else None,
            None,
            None,
            None,
        )
    grads = _gather_normalize_backward(grad, *ctx.saved_tensors, with_x, with_weight, ctx.backend)
    return grads[0] if with_x else None, None, grads[1] if with_weight else None, None, None, None


_gather_normalize.register_autograd(_gather_backward, setup_context=_gather_setup)

count_flops("gather_normalize", no_flops)
count_flops("gather_normalize_backward", no_flops)


def _check_indices(indices: Tensor, map_name: str, x: Tensor, shapes: tuple[str, ...]) -> None:
    """``indices`` (B, K), or (B, R, K) if ``shapes`` has two entries, into the N tokens of
    ``x``."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices: expected a tensor of torch.int64, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: expected torch.int64, got {indices.dtype}")
    batch, num_tokens, _ = x.shape
    if not 2 <= indices.ndim < 2 + len(shapes) or indices.shape[0] != batch:
        expected = " or ".join(f"({batch}, {shape})" for shape in shapes)
        raise ValueError(f"indices: expected shape {expected}, got {tuple(indices.shape)}")
    _check_device("indices", indices, map_name, x)
    if has_values(indices) and indices.numel() > 0:
        low, high = (int(i) for i in indices.aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(f"indices: expected entries in [0, {num_tokens}), got [{low}, {high}]")


def _check_device(name: str, value: Tensor, map_name: str, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(
            f"{name}: expected device {x.device}, that of {map_name}, got {value.device}"
        )


def _check_shape(
    name: str, value: Tensor, shape: tuple[int, ...], map_name: str, x: Tensor
) -> None:
    check_float_tensor(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    _check_device(name, value, map_name, x)


@overridable
def gather_normalize(
    x: Tensor, indices: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """``rms_norm(x[indices]) * weight``: routed rows of a map, normalised as they are read.

    Args:
        x: (B, N, C), of any strides.
        indices: (B, K) or (B, R, K) int64 in [0, N), distinct within a row of K; routes may share
            tokens. Values are checked on the CPU; through kernels an index out of range gives a row
            of NaN.
        weight: (C,), as that of ``nn.RMSNorm``.
        eps: added to the mean square, > 0.
        backend: ``"eager"``, ``"triton"`` or ``"auto"``; None: environment variable
            ``COLT5_VISION_BACKEND``, else auto.

    Returns:
        (B, K, C) or (B, R, K, C) in the dtype that ``torch.nn.functional.rms_norm`` gives: that of
        ``x``, and under CUDA's autocast float32. The mean is taken in float32 (float64). The
        gradient of ``x`` is deterministic.

    Raises:
        TypeError, ValueError: for bad arguments.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: RMSNorm (arXiv 1910.07467), of the heavy branch of CoLT5 (arXiv 2303.09752).
    """
    check_float_tensor("x", x, ndim=3)
    _check_indices(indices, "x", x, ("K", "R, K"))
    _check_shape("weight", weight, x.shape[-1:], "x", x)
    eps = check_positive("eps", eps)
    if not takes_operator(NAME, backend, x, weight):
        return eager.gather_normalize(x, indices, weight, eps)
    # rms_norm is on CUDA's list of operators that autocast runs in float32
    widened = x.device.type == "cuda" and x.dtype in HALVES and torch.is_autocast_enabled("cuda")
    routes = indices if indices.ndim == 3 else indices.unsqueeze(1)
    out = _gather_normalize(x, routes, weight, eps, torch.float32 if widened else x.dtype, backend)[
        0
    ]
    return out if indices.ndim == 3 else out.squeeze(1)
