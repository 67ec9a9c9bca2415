"""How every attention is laid out in memory, whatever computes it: (B, L, heads, D) underneath, so
that merging heads later is a view."""

from torch import Tensor


def head_last(x: Tensor) -> Tensor:
    """(B, heads, L, D) in that layout, copied if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_head_last(x: Tensor, length: int | None = None) -> Tensor:
    """(B, heads, length, D) for ``x`` (B, heads, L, D), uninitialised; None: L."""
    length = x.shape[2] if length is None else length
    return x.new_empty(x.shape[0], length, x.shape[1], x.shape[3]).transpose(1, 2)
