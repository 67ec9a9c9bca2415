"""Joining the branches as Triton kernels: the map is written once, then only routed rows.

Nothing is added atomically: indices are distinct within a sample. An index out of range is passed
over.
"""

import torch
import triton
from torch import Tensor

from .. import backend
from .kernels import join_backward_kernel, join_kernel

TILE = 2048  # elements of a map that a program holds in backward


def forward(
    light: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor, null: Tensor | None
) -> Tensor:
    """As ``eager.forward``."""
    batch, num_tokens, dim = light.shape
    slots = indices.shape[1]

    # every token as if it were not routed
    out = torch.empty_like(light)
    if null is None:
        out.copy_(light)
    else:
        torch.add(light, null, out=out)

    # routed rows: the gated heavy output in place of the null token
    block_k, block_c = 8, min(triton.next_power_of_2(dim), 256)
    backend.launch(
        join_kernel,
        (batch * triton.cdiv(slots, block_k) * triton.cdiv(dim, block_c),),
        out,
        heavy.contiguous(),
        indices.contiguous(),
        gates.contiguous(),
        None if null is None else null.contiguous(),
        num_tokens,
        slots,
        dim,
        *out.stride(),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=8,
        **backend.no_spills(out.device),
    )
    return out


def backward(
    grad: Tensor,
    heavy: Tensor,
    indices: Tensor,
    gates: Tensor,
    with_null: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``eager.backward``; None for the null token's gradient if it is not asked for."""
    batch, num_tokens, dim = grad.shape
    slots = indices.shape[1]

    # some slots and, if it can be, all channels a program
    block_c = min(triton.next_power_of_2(dim), 1024)
    block_k = min(32, max(1, TILE // block_c))
    programs = batch * triton.cdiv(slots, block_k)

    # what is written; of the null token each program's part, which is added up at the end
    gates = gates.contiguous()
    grad_heavy, grad_gates = heavy.new_empty(heavy.shape), torch.empty_like(gates)
    partial = grad.new_empty(programs, dim, dtype=torch.float32) if with_null else None

    # gradients of the routed rows
    backend.launch(
        join_backward_kernel,
        (programs,),
        grad,
        heavy.contiguous(),
        indices.contiguous(),
        gates,
        grad_heavy,
        grad_gates,
        partial,
        num_tokens,
        slots,
        dim,
        *grad.stride(),
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=8,
        **backend.no_spills(grad.device),
    )

    # the null token stands in all other rows: the sum of all, less the routed ones
    if not with_null:
        return grad_heavy, grad_gates, None
    return grad_heavy, grad_gates, grad.sum((0, 1), dtype=torch.float32) + partial.sum(0)
