"""What a registered operator tells torch: strides, FLOPs, refusals, overrides."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .._torch_internals import registered_operator
from ..routing import Routing

_P = ParamSpec("_P")
_T = TypeVar("_T")


def operator(name: str) -> Callable:
    """Register a function as the operator ``colt5_vision::name``, which has no alias and no write.

    Where it is registered already, by an earlier import in this process, it gets this function:
    torch would free an operator that is registered again, and crash where the earlier import, or a
    graph compiled with it, calls it.
    """
    name = f"colt5_vision::{name}"

    def register(function: Callable):
        schema = torch.library.infer_schema(function, mutates_args=())
        known = registered_operator(name, schema)
        if known is None:
            return torch.library.custom_op(name, function, mutates_args=())
        known.register_kernel(None, function)
        return known

    return register


def overridable(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Hand a call to the class of an argument that asks for it by ``__torch_function__``.

    As torch's own functions do. ``torch.fx`` records one call then, and looks at no size or value.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        given = (*args, *kwargs.values())
        routings = (x for x in given if isinstance(x, Routing))
        given = (*given, *(field for routing in routings for field in routing))
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with the strides of ``empty_like(other)``, which is what the fake kernels promise."""
    if x.is_contiguous() and other.is_contiguous():
        return x
    out = torch.empty_like(other)
    return x if out.stride() == x.stride() else out.copy_(x)


def count_flops(name: str, formula: Callable[..., int]) -> None:
    """Let ``FlopCounterMode`` count the operator ``colt5_vision::name``.

    Args:
        formula: of the arguments, tensors given as their shapes, and of ``out_shape``.
    """
    operator = getattr(torch.ops.colt5_vision, name)
    flop_registry.pop(operator, None)  # of an earlier import in this process
    register_flop_formula(operator)(formula)


def no_flops(*args, **kwargs) -> int:
    """Of an operator without matrix products; torch counts no others."""
    return 0


def once_differentiable(operator, message: str) -> None:
    """Refuse to differentiate ``operator``, itself a gradient, and say why."""

    def backward(ctx, *grads):
        raise RuntimeError(message)

    operator.register_autograd(backward)
