"""Checks of the autoregressive attention's windows and counts."""

from torch import Tensor

from ..checks import (
    Count,
    TokenCount,
    check_count,
    check_int,
    check_router_kwargs,
    check_token_count,
    share_of,
    token_count,
)


def check_windows(light_window_size, heavy_window_size) -> tuple[int, int]:
    """The windows of the light and of the heavy branch, in tokens."""
    light = check_int("light_window_size", light_window_size)
    heavy = light if heavy_window_size is None else heavy_window_size
    heavy = check_int("heavy_window_size", heavy)
    if heavy > light and heavy != 2 * light:
        raise ValueError(
            f"heavy_window_size: expected at most light_window_size = {light} or twice that, or "
            f"tokens of its window would be seen by neither branch; got {heavy}"
        )
    return light, heavy


def check_key_count(value) -> int | Tensor:
    """``num_heavy_tokens_kv`` is a number of tokens, or a tensor with a call."""
    if isinstance(value, float):
        raise TypeError(
            "num_heavy_tokens_kv: expected a number of tokens; a share of a sequence whose length "
            "is not known has no bound, with a call a tensor of shares (B,) is taken up to the "
            f"module's number, got {value}"
        )
    return value if isinstance(value, Tensor) else check_int("num_heavy_tokens_kv", value)


def check_query_count(value, width: int, multiply_queries_by_score: bool) -> TokenCount | None:
    """``num_heavy_tokens_q`` of windows of ``width`` tokens; None: every token is a query."""
    if value is None and multiply_queries_by_score:
        raise ValueError(
            "multiply_queries_by_score: needs num_heavy_tokens_q, every token is a query"
        )
    # a router that lets all pass would have parameters without a gradient
    if value is None or token_count("num_heavy_tokens_q", value, width) == width:
        return None
    return value


def check_causal_options(router_kwargs: dict | None) -> dict:
    """``router_kwargs`` of a layer, free of what the layer sets and of what looks ahead."""
    options = check_router_kwargs(router_kwargs, "give num_routed_kv instead")
    if options.get("cell_size") is not None:
        raise ValueError(
            "router_kwargs['cell_size']: needs the whole sequence, which a causal router "
            "cannot know"
        )
    return options


def count_keys(value, own: int, batch: int) -> Count:
    """How many keys each sample routes: ``value`` of the call, else the module's ``own``."""
    if value is not None:
        check_key_count(value)
    return check_count("num_heavy_tokens_kv", value, own, batch)


def count_queries(value, own: TokenCount, width: int, batch: int) -> Count | None:
    """How many queries each sample routes in a window of ``width``; None: all of its tokens."""
    name = "num_heavy_tokens_q"
    count = check_count(name, value, own, batch)
    slots = token_count(name, check_token_count(name, count.slots), width)
    if count.filled is not None:
        return Count(slots, share_of(count.filled, width).clamp(1, slots))
    return None if slots == width else Count(slots)
