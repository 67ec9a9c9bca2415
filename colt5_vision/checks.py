"""Argument checks shared by the public functions and modules.

Every error names the argument, what was expected and what came. Checks read Python values and
tensor metadata only, unless said otherwise, so they cost nothing on an accelerator and stay out of
a compiled graph.
"""

import math
import numbers
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch_internals import has_values

TokenCount = int | float
"""An int >= 1, that many tokens, or a float in (0, 1], that share of the map."""


ROUTERS = (
    "learned",
    "sampled",
    "grouped",
    "learned_grouped",
    "mean_query",
    "random",
    "grid",
    "window",
)
"""Every kind of routing there is; a layer or a swap takes some of them."""


_OF_COLT5_ATTENTION = (".gamma", ".null_kv")  # ends of names that nothing here has


def hint_at_converter(module, state_dict, prefix, *_) -> None:
    """A hook of ``load_state_dict``: beside torch's list of keys, what to do with weights of
    colt5-attention."""
    if any(n.startswith(prefix) and n.endswith(_OF_COLT5_ATTENTION) for n in state_dict):
        warnings.warn(
            f"{prefix.removesuffix('.') or 'state_dict'}: weights of colt5-attention, expected "
            "those that colt5_vision.compat.convert_colt5_attention_state_dict(state_dict, model) "
            "gives",
            stacklevel=2,
        )


def check_router(router, allowed: tuple[str, ...]) -> str:
    """``router`` as one of the kinds ``allowed``, which are among :data:`ROUTERS`."""
    if router not in allowed:
        raise ValueError(f"router: expected one of {allowed}, got {router!r}")
    return router


def check_router_kwargs(options: dict | None, routes_given_by: str) -> dict:
    """A layer's ``router_kwargs``, free of what the layer sets itself.

    Args:
        options: of :class:`~colt5_vision.CoordinateDescentRouter`, or None.
        routes_given_by: what to do in place of ``num_routing_tokens``, for the error.

    Raises:
        ValueError: for an option that the layer sets.
    """
    reserved = {
        "num_routing_tokens": routes_given_by,
        "straight_through": "give router_straight_through instead",
        "router": "give router instead",
        "learned_routing_tokens": "the module has no routing tokens to pass",
        "device": "give device instead",
        "dtype": "give dtype instead",
    }
    options = dict(options or {})
    for name, instead in reserved.items():
        if name in options:
            raise ValueError(f"router_kwargs[{name!r}]: {instead}")
    return options


def check_heads(heads_name: str, heads, routes_name: str, routes) -> None:
    """``heads`` is a number of heads that divides over ``routes``."""
    if check_int(heads_name, heads) % check_int(routes_name, routes):
        raise ValueError(
            f"{routes_name}: {heads} {heads_name} are not divisible by {routes} routes"
        )


def check_rotary(name: str, dim_head, multiple: int, rotary_emb: bool) -> int:
    """``dim_head`` as an int, which rotary positions cut into ``multiple`` parts."""
    dim_head = check_int(name, dim_head)
    if rotary_emb and dim_head % multiple:
        raise ValueError(f"{name}: rotary_emb needs a multiple of {multiple}, got {dim_head}")
    return dim_head


def check_path(name: str, value) -> Path:
    """``value`` as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
    return Path(value)


def check_int(name: str, value, *, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # a size, as torch.jit.trace has it
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(
            f"{name}: expected an integer >= {minimum}, got {value!r} ({type(value).__name__})"
        )
    if value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def check_pair(name: str, value, *, minimum: int = 1) -> tuple[int, int]:
    """``value`` (an int, or two of them) as a (height, width) pair."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"{name}: expected an integer or a (height, width) pair, got {value!r}"
            )
        return check_int(f"{name}[0]", value[0], minimum=minimum), check_int(
            f"{name}[1]", value[1], minimum=minimum
        )
    return (check_int(name, value, minimum=minimum),) * 2


def check_positive(name: str, value) -> float:
    """``value`` as a finite float above 0."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(
            f"{name}: expected a positive number, got {value!r} ({type(value).__name__})"
        )
    if (
        not 0 < value < math.inf
    ):  # NaN fails too; comparisons stay in a compiled graph, math.isfinite would not
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
    """``value`` as a token count: an int >= 1 (that many) or a float in (0, 1] (that share of the
    map)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}: expected an int >= 1 (that many tokens) or a float in (0, 1] (that share), "
            f"got {value!r} ({type(value).__name__})"
        )
    whole = isinstance(value, numbers.Integral)
    if not (value >= 1 if whole else 0 < value <= 1):  # NaN fails too
        raise ValueError(f"{name}: expected an int >= 1 or a float in (0, 1], got {value}")
    return int(value) if whole else float(value)


def token_count(name: str, value: TokenCount, num_tokens: int) -> int:
    """Resolve a token count against a map of ``num_tokens``; a count above that means every
    token."""
    value = check_token_count(name, value)
    if isinstance(num_tokens, Tensor):  # a size, as torch.jit.trace has it
        num_tokens = int(num_tokens)
    if isinstance(value, float):
        value = max(1, _part(num_tokens, round(value * _WHOLE)))
    return min(value, num_tokens)


# Shares in integers: every exporter knows their arithmetic. Exact for 1/2, 1/4, ... 2**-30.
_WHOLE = 1 << 30


def _part(total, share):
    """``total * share / _WHOLE``, rounded, half a token up."""
    return (total * share + _WHOLE // 2) // _WHOLE


class Count(NamedTuple):
    """How many tokens to route.

    Attributes:
        slots: an int, that many, or a float, that share of the tokens: the same for every sample.
        filled: (B,) how many of its slots each sample fills: integers, or floats, that share of its
            valid tokens. None: all of them.
    """

    slots: TokenCount
    filled: Tensor | None = None


def check_count(name: str, value, own: TokenCount, batch: int) -> Count:
    """A token count given with a call, against a module's own.

    Args:
        name: of the argument, for errors.
        value: None (the module's own), a token count, or a tensor (batch,), see :class:`Count`. A
            tensor leaves the slots at the module's own count, so that shapes do not hang on values.
            What exceeds them is cut.
        own: the module's count.
        batch: number of samples.
    """
    if value is None:
        return Count(own)
    if not isinstance(value, Tensor):
        return Count(check_token_count(name, value))
    check_filled(name, value, batch)
    return Count(own, value)


def check_filled(name: str, value, batch: int) -> Tensor:
    """``value`` as counts (batch,) of each sample: integers >= 1 or floats in (0, 1]."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor of shape ({batch},) or None, got {type(value).__name__}"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: expected integers or floats, got {value.dtype}")
    if tuple(value.shape) != (batch,):
        raise ValueError(
            f"{name}: expected a number or a tensor of shape ({batch},), "
            f"got shape {tuple(value.shape)}"
        )
    # reading values costs nothing on the CPU; elsewhere it would be a host sync
    if value.numel() and has_values(value):
        shares = value.is_floating_point()
        good = (value > 0) & (value <= 1) if shares else value >= 1
        if not bool(good.all()):
            expected = "shares in (0, 1]" if shares else "integers >= 1"
            raise ValueError(f"{name}: expected {expected}, got {value.tolist()}")
    return value


def filled_slots(filled: Tensor, slots: int, num_tokens: int, mask: Tensor | None) -> Tensor:
    """(B,) int64 in [1, slots]: how many slots each sample fills.

    ``filled`` is that of a :class:`Count`, ``mask`` (B, N). Shares are of the valid tokens,
    rounded, at least one.
    """
    return share_of(filled, num_tokens if mask is None else mask.sum(-1)).clamp(1, slots)


def share_of(counts: Tensor, total: int | Tensor) -> Tensor:
    """``counts`` as int64: integers as they are, floats as that share of ``total``, rounded."""
    if counts.is_floating_point():
        wide = counts if counts.dtype == torch.float64 else counts.float()
        return _part(total, (wide * _WHOLE).round().to(torch.int64))
    return counts.to(torch.int64)
