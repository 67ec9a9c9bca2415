"""What no code around SDPA's kernel can do without: that kernel on the parts of a routed attention,
and in a forward a copy of each window in and out, for it takes no rows of two strides. A backward's
tensors lie ready."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision.ops.routed_window_attention.areas import areas_of
from colt5_vision.ops.routed_window_attention.geometry import Geometry

PROBES = 64  # queries that attend to everything, and correct all others


def _run(calls: list[Callable]) -> Callable:
    def run() -> None:
        for call in calls:
            call()

    return run


def _attention(
    what: str,
    batch: int,
    size: Map,
    queries: int,
    keys: int,
    bias: torch.Tensor | None = None,
) -> Callable:
    shapes = [(batch, size.heads, n, size.head_dim) for n in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(shape) for shape in shapes)
    return both(partial(scaled_dot_product_attention, attn_mask=bias), [q, k, v], grad)[what]


def _copies(size: Map) -> Callable:
    """q, k and v of a map as windows, and an output of windows as a map."""
    geometry = Geometry(0, size.side, size.side, (size.window, size.window), 1.0)
    shape = (size.batch, size.side, size.side, 3, size.heads, size.head_dim)
    maps = [x.permute(0, 3, 1, 2, 4) for x in torch.randn(shape).unbind(3)]
    out = torch.empty_like(maps[0])

    def run() -> None:
        with torch.inference_mode():
            for area in areas_of(geometry):
                query, *_ = [area.take(x) for x in maps]
                area.put(query, out)

    return run


def windows(size: Map, what: str) -> Callable:
    """Every token to its window; windows of one size in one call."""
    whole, rest = divmod(size.side, size.window)
    sides = Counter({size.window: whole, rest: 1} if rest else {size.window: whole})
    calls = [_copies(size)] if what == PASSES[0] else []
    for (height, down), (width, across) in product(sides.items(), repeat=2):
        tokens = height * width
        calls.append(_attention(what, size.batch * down * across, size, tokens, tokens))
    return _run(calls)


def operator(size: Map, what: str) -> Callable:
    """Windows, and every token to the routed keys with their log weights."""
    keys = size.tokens // size.share
    bias = torch.zeros(1, 1, 1, keys) if what == PASSES[0] else None
    routed = _attention(what, size.batch, size, size.tokens, keys, bias)
    return _run([windows(size, what), routed])


def sampled(size: Map, what: str) -> Callable:
    """The operator's, and a few probes to all keys, and all tokens to the probes."""
    probes = _attention(what, size.batch, size, PROBES, size.tokens)
    back = _attention(what, size.batch, size, size.tokens, PROBES)
    return _run([operator(size, what), probes, back])


def in_place_of_attention(model: Callable, parts: Callable) -> Callable:
    """A model that runs the parts where it calls SDPA."""

    def attend(query, key, value, *args, **kwargs):
        parts()
        return value

    def run():
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
            return model()

    return run
