"""Argument checks shared by the public functions and modules.

Every error names the argument, what was expected and what came. Checks read Python values and tensor metadata
only, unless said otherwise, so they cost nothing on an accelerator and stay out of a compiled graph.
"""

import math
import numbers

import torch
from torch import Tensor

TokenCount = int | float
"""An int >= 1, that many tokens, or a float in (0, 1], that share of the map."""


def check_int(name: str, value, *, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer >= {minimum}, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def check_pair(name: str, value, *, minimum: int = 1) -> tuple[int, int]:
    """``value`` (an int, or two of them) as a (height, width) pair."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an integer or a (height, width) pair, got {value!r}")
        return check_int(f"{name}[0]", value[0], minimum=minimum), check_int(f"{name}[1]", value[1], minimum=minimum)
    return (check_int(name, value, minimum=minimum),) * 2


def check_positive(name: str, value) -> float:
    """``value`` as a finite float above 0."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a positive number, got {value!r} ({type(value).__name__})")
    if not 0 < value < math.inf:  # NaN fails too; comparisons stay in a compiled graph, math.isfinite would not
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return value


def check_float_tensor(name: str, value, *, ndim: int | None = None) -> Tensor:
    """``value`` as a floating-point tensor, of ``ndim`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(value.shape)}")
    return value


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """``mask`` is None or a bool tensor of exactly ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a torch.bool tensor (True = valid), got {got}")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(mask.shape)}")


def check_token_count(name: str, value) -> TokenCount:
    """``value`` as a token count: an int >= 1 (that many) or a float in (0, 1] (that share of the map)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}: expected an int >= 1 (that many tokens) or a float in (0, 1] (that share), "
            f"got {value!r} ({type(value).__name__})"
        )
    if isinstance(value, numbers.Integral):
        return check_int(name, value)
    if not 0 < value <= 1:  # NaN fails too
        raise ValueError(f"{name}: expected an int >= 1 or a float in (0, 1], got {value}")
    return float(value)


def token_count(name: str, value: TokenCount, num_tokens: int) -> int:
    """Resolve a token count against a map of ``num_tokens``; a count above that means every token."""
    value = check_token_count(name, value)
    if isinstance(value, float):
        value = max(1, round(value * num_tokens))
    return min(value, num_tokens)


def slots_and_counts(name: str, value, own: TokenCount, batch: int) -> tuple[TokenCount, Tensor | None]:
    """A token count given with a call, against a module's own: the number of slots, and each sample's number or None.

    Args:
        name: of the argument, for errors.
        value: None (the module's own), a token count, or a tensor (batch,): integers, that many tokens of each sample,
            or floats in (0, 1], that share of its valid tokens. A tensor leaves the slots at the module's own count,
            so that shapes do not hang on values; what exceeds them is cut.
        own: the module's count.
        batch: number of samples.
    """
    if value is None:
        return own, None
    if not isinstance(value, Tensor):
        return check_token_count(name, value), None
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected integers or floats, got {value.dtype}")
    if tuple(value.shape) != (batch,):
        raise ValueError(f"{name}: expected a number or a tensor of shape ({batch},), got shape {tuple(value.shape)}")
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        if value.is_floating_point():
            good, expected = (value > 0) & (value <= 1), "shares in (0, 1]"
        else:
            good, expected = value >= 1, "integers >= 1"
        if not bool(good.all()):
            raise ValueError(f"{name}: expected {expected}, got {value.tolist()}")
    return own, value


def filled_slots(name: str, counts, slots: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) int64 in [1, slots]: how many slots each sample of x (B, N, C) fills, of checked x and mask (B, N).

    ``counts`` is the second part of :func:`slots_and_counts`; shares are of the valid tokens, rounded, at least one.
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({x.shape[0]},) or None, got {type(counts).__name__}")
    counts = slots_and_counts(name, counts, slots, x.shape[0])[1].to(x.device)
    return share_of(counts, x.shape[1] if mask is None else mask.sum(-1)).clamp(1, slots)


def share_of(counts: Tensor, total: int | Tensor) -> Tensor:
    """``counts`` as int64: integers as they are, floats as that share of ``total``, rounded."""
    if counts.is_floating_point():
        counts = ((counts if counts.dtype == torch.float64 else counts.float()) * total).round()
    return counts.to(torch.int64)
