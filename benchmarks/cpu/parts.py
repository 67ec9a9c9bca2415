"""What no code around SDPA's kernel can do without: that kernel on the parts of a routed attention,
and in a forward a copy of each window in and out, for it takes no rows of two strides. A backward's
tensors lie ready."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision.ops.routed_window_attention.areas import areas_of
from colt5_vision.ops.routed_window_attention.geometry import Geometry
from colt5_vision.swap.tiles import tiles_of

GROUPS = 4  # of a tile, each with a probe
PROBES = 64  # queries that attend to everything, and correct all others


def _run(calls: list[Callable]) -> Callable:
    def run() -> None:
        for call in calls:
            call()

    return run


def _attention(
    what: str, batch: int, size: Map, queries: int, keys: int, *, biased: bool = False
) -> Callable:
    """SDPA; biased: the same keys for all of the batch, with log weights."""
    shapes = [(batch, size.heads, n, size.head_dim) for n in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(shape) for shape in shapes)
    if not biased or what != PASSES[0]:
        return both(scaled_dot_product_attention, [q, k, v], grad)[what]
    k, v = (x[:1].expand_as(x) for x in (k, v))
    attend = partial(scaled_dot_product_attention, attn_mask=torch.zeros(batch, 1, 1, keys))
    return both(attend, [q, k, v], grad)[what]


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


def _areas(size: Map) -> list[tuple[int, int]]:
    """Of windows of one size: how many of all samples, and tokens of each."""
    whole, rest = divmod(size.side, size.window)
    sides = [(size.window, whole), (rest, 1)] if rest else [(size.window, whole)]
    return [(size.batch * m * n, a * b) for (a, m), (b, n) in product(sides, repeat=2)]


def windows(size: Map, what: str) -> Callable:
    """Every token to its window; windows of one size in one call."""
    calls = [_copies(size)] if what == PASSES[0] else []
    calls += [_attention(what, count, size, area, area) for count, area in _areas(size)]
    return _run(calls)


def operator(size: Map, what: str) -> Callable:
    """Windows, and every token to the routed keys, whose weights are 1."""
    routed = _attention(what, size.batch, size, size.tokens, size.tokens // size.share)
    return _run([windows(size, what), routed])


def layer(size: Map, what: str) -> Callable:
    """As the operator, with log weights that want gradients: SDPA has none for a bias, so in a
    backward rows have features more, of which the kernels want eight."""
    if what == PASSES[0]:
        return operator(size, what)
    wider, keys = replace(size, head_dim=size.head_dim + 8), size.tokens // size.share
    routed = _attention(what, size.batch, wider, size.tokens, keys)
    return _run([windows(size, what), routed])


def sampled(size: Map, what: str) -> Callable:
    """Windows, and each of them to the routed keys: which of them it does not count twice is its
    own. A few probes to all keys, and all tokens to the probes."""
    keys = size.tokens // size.share
    calls = [windows(size, what)]
    calls += [
        _attention(what, count, size, area, keys, biased=True) for count, area in _areas(size)
    ]
    calls.append(_attention(what, size.batch, size, PROBES, size.tokens))
    calls.append(_attention(what, size.batch, size, size.tokens, PROBES))
    return _run(calls)


def grouped(size: Map, what: str) -> Callable:
    """Every tile to its keys, and the probes to all keys."""
    side = (size.side, size.side)
    tiles, area = tiles_of(side, (size.window, size.window), None).shape
    return _run(
        [
            _attention(what, size.batch * tiles, size, area, size.tokens // size.share),
            _attention(what, size.batch, size, GROUPS * tiles, size.tokens),
        ]
    )


def in_place_of_attention(model: Callable, parts: Callable) -> Callable:
    """A model that runs the parts where it calls SDPA."""

    def attend(query, key, value, *args, **kwargs):
        parts()
        return value

    def run():
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
            return model()

    return run
