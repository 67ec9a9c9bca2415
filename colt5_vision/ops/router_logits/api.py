"""Logits of the learned router: checks, dispatch, registration, autograd."""

import torch
from torch import Tensor

from ..._torch_internals import has_values, is_transformed
from ...checks import check_float_tensor, check_positive
from ..autocast import without_autocast
from ..backend import takes_operator, use_triton, why_not_triton
from ..dtypes import wide_dtype
from ..registration import count_flops, laid_out_as, operator, overridable
from . import eager

NAME = "router_logits"


def _use_triton(x: Tensor, backend: str | None) -> bool:
    return use_triton(NAME, backend, why_not_triton(x))


@operator("router_logits")
def _router_logits(
    x: Tensor, tokens: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    if _use_triton(x, backend):
        from . import triton

        return triton.forward(x, tokens, eps)
    with torch.autocast(x.device.type, enabled=False):
        logits, norm = eager.forward(x, tokens, eps)
    return logits.contiguous(), norm.contiguous()


@_router_logits.register_fake
def _(x, tokens, eps, backend):
    return tokens.new_empty(x.shape[0], tokens.shape[-2], x.shape[1]), tokens.new_empty(x.shape[:2])


@operator("router_logits_backward")
def _router_logits_backward(
    grad: Tensor,
    x: Tensor,
    tokens: Tensor,
    logits: Tensor,
    norm: Tensor,
    eps: float,
    with_x: bool,
    with_tokens: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if _use_triton(x, backend):
        from . import triton

        grad_x, grad_tokens = triton.backward(
            grad, x, tokens, logits, norm, eps, with_x, with_tokens
        )
    else:
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_tokens = eager.backward(grad, x, tokens, logits, norm, eps)
        grad_x = laid_out_as(grad_x, x) if with_x else None  # as was announced
    return (
        grad_x if with_x else x.new_empty(0),
        grad_tokens.contiguous() if with_tokens else tokens.new_empty(0),
    )


@_router_logits_backward.register_fake
def _(grad, x, tokens, logits, norm, eps, with_x, with_tokens, backend):
    return (
        torch.empty_like(x) if with_x else x.new_empty(0),
        tokens.new_empty(tokens.shape) if with_tokens else tokens.new_empty(0),
    )


def _setup(ctx, inputs, output):
    x, tokens, ctx.eps, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, tokens, *output)


def _backward(ctx, grad, _):
    with_x, with_tokens = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled() or is_transformed(grad):  # to be differentiated again: plain torch
        inputs = ctx.saved_tensors[:2]
        wanted = [x for x, needed in zip(inputs, (with_x, with_tokens)) if needed]
        out = eager.router_logits(*inputs, ctx.eps)
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return next(grads) if with_x else None, next(grads) if with_tokens else None, None, None
    grads = _router_logits_backward(
        grad, *ctx.saved_tensors, ctx.eps, with_x, with_tokens, ctx.backend
    )
    return grads[0] if with_x else None, grads[1] if with_tokens else None, None, None


_router_logits.register_autograd(_backward, setup_context=_setup)


def _flops(x, tokens, *args, out_shape=None, **kwargs) -> int:
    """Of a product of tokens (R, C) and the map (B, N, C)."""
    batch, num_tokens, dim = x
    return 2 * batch * num_tokens * dim * tokens[-2]


def _flops_backward(
    grad, x, tokens, logits, norm, eps, with_x, with_tokens, *args, **kwargs
) -> int:
    return _flops(x, tokens) * (int(with_x) + int(with_tokens))


count_flops("router_logits", _flops)
count_flops("router_logits_backward", _flops_backward)


@overridable
def router_logits(
    x: Tensor, tokens: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Logits of a learned router: ``x_i · w_r / max(|x_i|, eps)``, for all routes from one read of
    ``x``.

    Args:
        x: (B, N, C), of any strides: a permuted (B, C, H, W) map is read as it lies.
        tokens: routing tokens w, (R, C) for every sample or (B, R, C).
        eps: the least norm a token is divided by, > 0, in units of ``x``.
        backend: ``"eager"``, ``"triton"`` or ``"auto"``; None: environment variable
            ``COLT5_VISION_BACKEND``, else auto.

    Returns:
        (B, R, N), float32 (float64 for float64 ``x``) whatever the input or autocast. Twice
        differentiable.

    Raises:
        TypeError, ValueError: for bad arguments.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: CoLT5 (arXiv 2303.09752) section 3.1, with normalised tokens.
    """
    check_float_tensor("x", x, ndim=3)
    check_float_tensor("tokens", tokens)
    batch, _, dim = x.shape
    routed = tokens.ndim == 2 or (tokens.ndim == 3 and tokens.shape[0] == batch)
    if not routed or tokens.shape[-1] != dim or tokens.shape[-2] < 1:
        raise ValueError(
            f"tokens: expected shape (R, {dim}) or ({batch}, R, {dim}), got {tuple(tokens.shape)}"
        )
    if tokens.device != x.device:
        raise ValueError(f"tokens: expected device {x.device}, that of x, got {tokens.device}")
    eps = check_positive("eps", eps)
    tokens = tokens.to(wide_dtype(x))
    # its backward passes over the map once; that of plain torch four times
    learns = torch.is_grad_enabled() and (x.requires_grad or tokens.requires_grad)
    learns = learns and has_values(x, tokens) and not is_transformed(x, tokens)
    if takes_operator(NAME, backend, x, tokens) or learns:
        return _router_logits(x, tokens, eps, backend)[0]
    with without_autocast(x.device.type):
        return eager.router_logits(x, tokens, eps)
