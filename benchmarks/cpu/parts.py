"""SDPA's kernel alone on the parts of a routed attention, with tensors that lie ready: no code
around that kernel can be faster."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measure import Map, both

PROBES = 64  # queries that attend to everything, and correct all others


def _run(calls: list[Callable]) -> Callable:
    def run() -> None:
        for call in calls:
            call()

    return run


def _attention(what: str, batch: int, size: Map, queries: int, keys: int) -> Callable:
    shapes = [(batch, size.heads, n, size.head_dim) for n in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(shape) for shape in shapes)
    return both(scaled_dot_product_attention, [q, k, v], grad)[what]


def windows(size: Map, what: str) -> Callable:
    """Every token to its window; windows of one size in one call."""
    whole, rest = divmod(size.side, size.window)
    sides = Counter({size.window: whole, rest: 1} if rest else {size.window: whole})
    calls = []
    for (height, down), (width, across) in product(sides.items(), repeat=2):
        tokens = height * width
        calls.append(_attention(what, size.batch * down * across, size, tokens, tokens))
    return _run(calls)


def operator(size: Map, what: str) -> Callable:
    """Windows, and every token to the routed keys."""
    routed = _attention(what, size.batch, size, size.tokens, size.tokens // size.share)
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
