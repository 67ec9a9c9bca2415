"""Joining the light and the heavy branch: checks, choice, registration, autograd."""

import torch
from torch import Tensor

from ..._torch_internals import has_values, is_transformed
from ...checks import check_float_tensor, check_mask
from ...routing import Routing
from ..backend import takes_operator, use_triton, why_not_triton
from ..dtypes import wide_dtype
from ..registration import count_flops, no_flops, operator, overridable
from . import eager

NAME = "join"


@operator("join")
def _join(
    light: Tensor,
    heavy: Tensor,
    indices: Tensor,
    gates: Tensor,
    null: Tensor | None,
    backend: str | None,
) -> Tensor:
    if use_triton(NAME, backend, why_not_triton(light)):
        from . import triton

        return triton.forward(light, heavy, indices, gates, null)
    return eager.forward(light, heavy, indices, gates, null)


@_join.register_fake
def _(light, heavy, indices, gates, null, backend):
    return torch.empty_like(light)


@operator("join_backward")
def _join_backward(
    grad: Tensor,
    heavy: Tensor,
    indices: Tensor,
    gates: Tensor,
    with_null: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton(NAME, backend, why_not_triton(grad)):
        from . import triton

        grads = triton.backward(grad, heavy, indices, gates, with_null)
    else:
        grads = eager.backward(grad, heavy, indices, gates)
    grad_null = grads[2] if with_null else grad.new_empty(0)
    return grads[0].contiguous(), grads[1].contiguous(), grad_null


@_join_backward.register_fake
def _(grad, heavy, indices, gates, with_null, backend):
    wide = wide_dtype(grad)
    grad_null = grad.new_empty(grad.shape[-1], dtype=wide) if with_null else grad.new_empty(0)
    return heavy.new_empty(heavy.shape), gates.new_empty(gates.shape), grad_null


def _setup(ctx, inputs, output):
    _, heavy, indices, gates, null, ctx.backend = inputs
    ctx.null_dtype = None if null is None else null.dtype
    ctx.save_for_backward(heavy, indices, gates)


def _backward(ctx, grad):
    heavy, indices, gates = ctx.saved_tensors
    _, with_heavy, _, with_gates, with_null, _ = ctx.needs_input_grad
    if not (with_heavy or with_gates or with_null):
        return grad, None, None, None, None, None

    if torch.is_grad_enabled() or is_transformed(grad):  # to be differentiated again: plain torch
        grads = eager.backward(grad, heavy, indices, gates)
    else:
        grads = _join_backward(grad, heavy, indices, gates, with_null, ctx.backend)
    return (
        grad,
        grads[0] if with_heavy else None,
        None,
        grads[1] if with_gates else None,
        grads[2].to(ctx.null_dtype) if with_null else None,
        None,
    )


_join.register_autograd(_backward, setup_context=_setup)
count_flops("join", no_flops)
count_flops("join_backward", no_flops)


def _check(light: Tensor, heavy: Tensor, routing: Routing, null: Tensor | None) -> None:
    # the branches
    check_float_tensor("light", light, ndim=3)
    check_float_tensor("heavy", heavy, ndim=3)
    batch, num_tokens, dim = light.shape
    slots = heavy.shape[1]
    if heavy.shape != (batch, slots, dim):
        raise ValueError(f"heavy: expected shape ({batch}, Q, {dim}), got {tuple(heavy.shape)}")

    # the routing
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    indices, gates, _, mask = routing
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"routing.indices: expected a tensor of torch.int64, got {got}")
    check_float_tensor("routing.gates", gates)
    for name, value in (("indices", indices), ("gates", gates)):
        if value.shape != (batch, slots):
            raise ValueError(
                f"routing.{name}: expected shape ({batch}, {slots}), got {tuple(value.shape)}"
            )
    if mask is None:
        raise TypeError("routing.mask: expected a torch.bool tensor (True = filled), got None")
    check_mask("routing.mask", mask, (batch, slots))

    # the null token
    if null is not None:
        check_float_tensor("null", null)
        if null.shape != (dim,):
            raise ValueError(f"null: expected shape ({dim},), got {tuple(null.shape)}")
    _check_devices(light, heavy, routing, null)

    # indices of filled slots, where their values can be read
    if has_values(indices, mask) and indices.numel() > 0:
        low, high = (int(i) for i in torch.where(mask, indices, 0).aminmax())
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"routing.indices: expected entries in [0, {num_tokens}), got [{low}, {high}]"
            )


def _check_devices(light: Tensor, heavy: Tensor, routing: Routing, null: Tensor | None) -> None:
    named = {
        "heavy": heavy,
        "routing.indices": routing.indices,
        "routing.gates": routing.gates,
        "routing.mask": routing.mask,
        "null": null,
    }
    for name, value in named.items():
        if value is not None and value.device != light.device:
            raise ValueError(
                f"{name}: expected device {light.device}, that of light, got {value.device}"
            )


@overridable
def join(
    light: Tensor,
    heavy: Tensor,
    routing: Routing,
    null: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The light output of every token, joined by the gated heavy output of the routed ones.

    ``light + gate * heavy`` where a token is routed, ``light + null`` where it is not. The result
    is a fresh tensor.

    Args:
        light: (B, N, C), of any strides; it may be an expanded zero.
        heavy: (B, Q, C).
        routing: of one route, its fields (B, Q). Indices are distinct within the filled slots of a
            row and in [0, N), which is checked on the CPU. Empty slots change nothing, whatever
            they hold.
        null: (C,), what a token gets that is not routed; None: 0.
        backend: ``"eager"``, ``"triton"`` or ``"auto"``; None: environment variable
            ``COLT5_VISION_BACKEND``, else auto.

    Returns:
        (B, N, C) in the dtype of ``light``; ``heavy`` and ``null`` are cast to it. Differentiable
        in ``light``, ``heavy``, ``routing.gates`` and ``null``, also twice.

    Raises:
        TypeError, ValueError: for bad arguments.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: CoLT5 (arXiv 2303.09752) section 3.
    """
    _check(light, heavy, routing, null)
    indices = torch.where(routing.mask, routing.indices, -1)
    gates = torch.where(routing.mask, routing.gates, 0)
    null = None if null is None else null.to(light.dtype)
    if takes_operator(NAME, backend, light, heavy, gates, null):
        return _join(light, heavy, indices, gates, null, backend)
    return eager.join(light, heavy, indices, gates, null)
