"""Checks of arguments that the attention operators share."""

import math
import numbers

import torch
from torch import Tensor

from .._torch_internals import has_values
from ..checks import check_float_tensor, check_mask
from .backend import HALVES, use_triton, why_not_triton


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """All of one shape (B, heads, L, head_dim) and one dtype."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(name, x, ndim=4)
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k, v: expected one shape, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[-1] < 1:
        raise ValueError(f"q, k, v: expected a head_dim of at least 1, got shape {tuple(q.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def check_indices(name: str, indices: Tensor, num_tokens: int, lowest: int) -> None:
    """int64, and on the CPU in [lowest, num_tokens)."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected a tensor of torch.int64, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {indices.dtype}")
    # elsewhere plain torch's gather checks on the device, and the kernels take a routed index out
    # of range for an empty slot
    if has_values(indices) and indices.numel() > 0:
        low, high = (int(x) for x in indices.aminmax())
        if low < lowest or high >= num_tokens:
            raise ValueError(
                f"{name}: expected entries in [{lowest}, {num_tokens}), got [{low}, {high}]"
            )


def checked_mask(key_mask: Tensor | None, q: Tensor, prefix: int) -> Tensor | None:
    """(B, P + N) or None."""
    if key_mask is None:
        return None
    batch, length = q.shape[0], q.shape[2]
    if prefix and isinstance(key_mask, Tensor) and key_mask.shape == (batch, length - prefix):
        key_mask = torch.nn.functional.pad(key_mask, (prefix, 0), value=True)
    check_mask("key_mask", key_mask, (batch, length))
    return key_mask


def checked_scale(scale, head_dim: int) -> float:
    """A positive number; None: head_dim ** -0.5."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"scale: expected a number, got {scale!r} ({type(scale).__name__})")
    if not (0 < scale < math.inf):
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return scale


def takes_attention_kernels(operator: str, q: Tensor, backend: str) -> bool:
    """Whether a call of an attention runs as Triton kernels.

    Args:
        operator: its name, for errors.
        q: (B, heads, L, head_dim), which decides on device and dtype.
        backend: as asked for in the call; "": not asked for.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run, with the reason.
    """
    why_not = why_not_triton(q, HALVES)
    if q.shape[-1] > 256:
        why_not = f"the kernels are for head_dim up to 256, got {q.shape[-1]}"
    return use_triton(operator, backend, why_not)
