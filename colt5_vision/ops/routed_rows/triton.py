"""Reading routed rows of a map as Triton kernels: a row is read once, and only routed rows are
touched.

Gradients are added without atomics. Indices are distinct within a route, so the rows of one route
are added by one launch, the next route's by the next: a token that several routes picked gets its
sum in a fixed order. An inverse index of the map would save those launches, a few, and cost a pass
over all tokens.
"""

import torch
import triton
from torch import Tensor

from .. import backend
from .kernels import gather_normalize_backward_kernel, gather_normalize_kernel

TILE = 2048  # elements of a map that a program holds


def _tile(dim: int, widest: int) -> tuple[int, int]:
    """Rows and channels of a program: all channels of a row where they fit, so that a row stays in
    registers."""
    block_c = min(triton.next_power_of_2(dim), widest)
    return min(32, max(1, TILE // block_c)), block_c


def gather_normalize_forward(
    x: Tensor, indices: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As ``eager.gather_normalize_forward``."""
    batch, num_tokens, dim = x.shape
    slots = indices.shape[1] * indices.shape[2]
    out = x.new_empty(*indices.shape, dim, dtype=dtype)
    scale = x.new_empty(indices.shape, dtype=torch.float32)
    block, block_c = _tile(dim, 2048)
    backend.launch(
        gather_normalize_kernel,
        (batch * triton.cdiv(slots, block),),
        x,
        indices.contiguous(),
        weight.contiguous(),
        out,
        scale,
        num_tokens,
        slots,
        dim,
        *x.stride(),
        eps,
        BLOCK_Q=block,
        BLOCK_C=block_c,
        WHOLE=dim <= block_c,
        num_warps=4,
        **backend.no_spills(x.device),
    )
    return out, scale


def gather_normalize_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    with_x: bool = True,
    with_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """As ``eager.gather_normalize_backward``; None for what is not asked for."""
    batch, num_tokens, dim = x.shape
    _, routes, slots = indices.shape
    grad, indices, weight = grad.contiguous(), indices.contiguous(), weight.contiguous()

    # a program's partial sums of the weight's gradient are added up at the end
    block, block_c = _tile(dim, 1024)
    programs = batch * triton.cdiv(slots, block)
    grad_x = torch.zeros_like(x) if with_x else None
    partial = scale.new_empty(programs * routes, dim) if with_weight else None

    # one route after the other: two may hold the same token
    for route in range(routes):
        backend.launch(
            gather_normalize_backward_kernel,
            (programs,),
            grad,
            x,
            indices,
            weight,
            scale,
            grad_x,
            partial,
            num_tokens,
            slots,
            routes,
            route,
            dim,
            *x.stride(),
            *(grad_x.stride() if with_x else (0, 0, 0)),
            BLOCK_K=block,
            BLOCK_C=block_c,
            FIRST=route == 0,
            WITH_X=with_x,
            WITH_WEIGHT=with_weight,
            num_warps=8,
            **backend.no_spills(x.device),
        )

    # the weight's, of all programs and routes
    return grad_x, partial.sum(0).to(weight.dtype) if with_weight else None
