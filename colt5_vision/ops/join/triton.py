"""Joining the branches as Triton kernels: the map is written once, then only routed rows."""

import torch
from torch import Tensor

from ..routed_rows import triton as rows


def forward(
    light: Tensor, heavy: Tensor, indices: Tensor, gates: Tensor, null: Tensor | None
) -> Tensor:
    """As ``eager.forward``."""
    out = torch.empty_like(light)
    if null is None:
        out.copy_(light)
    else:
        torch.add(light, null, out=out)
    rows.gated_scatter_add_(out, heavy, indices, gates, null)
    return out


def backward(
    grad: Tensor,
    heavy: Tensor,
    indices: Tensor,
    gates: Tensor,
    with_null: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``eager.backward``; None for the null token's gradient if it is not asked for."""
    grad_heavy, grad_gates, of_rows = rows.gated_scatter_add_backward(
        grad, heavy, indices, gates, with_null
    )
    if not with_null:
        return grad_heavy, grad_gates, None
    return grad_heavy, grad_gates, grad.sum((0, 1), dtype=torch.float32) + of_rows
