"""Rivals that keep one set of keys for all queries, the bound by single keys, and ours."""

import torch
from torch import Tensor

from colt5_vision.ops import window_attention
from colt5_vision.ops.grid import window_of_token
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import SampledAttention
from colt5_vision.swap.tiles import tiles_of
from support.peers import merged_keys, subsampled_keys

from .layer import Layer, Result

PROBES = 64  # of the sampled router


def window_only(layer: Layer, density: float) -> Result:
    """Square windows (Swin, arXiv 2103.14030) of as many tokens as the density gives."""
    side = max(1, round((density * layer.tokens) ** 0.5)) if density < 1 else max(layer.grid)
    call = {"grid_size": layer.grid, "num_prefix_tokens": layer.prefix, "window_size": side}
    out = window_attention(*_batch(layer), **call)[0, :, layer.prefix :]
    groups = _windows(layer, side)
    return Result(out, seen=(groups, lambda head, group: groups[group]))


def todo(layer: Layer, density: float) -> Result:
    """ToDo (arXiv 2402.13573): keys and values of every n-th row and column."""
    out = subsampled_keys(*_batch(layer), layer.grid, layer.prefix, density, offset=0)
    step, (height, width) = round(density**-0.5), layer.grid
    kept = torch.arange(height * width).view(height, width)[::step, ::step].reshape(-1)
    every = [torch.arange(layer.tokens)]
    return Result(out[0, :, layer.prefix :], seen=(every, lambda head, group: kept))


def tome(layer: Layer, density: float) -> Result:
    """ToMe-style (arXiv 2210.09461): keys averaged into the most like one of a strided grid, and
    weighed by how many they stand for. No key is exact."""
    out = merged_keys(*_batch(layer), layer.grid, layer.prefix, density)
    return Result(out[0, :, layer.prefix :])


def oracle(layer: Layer, density: float) -> Result:
    """Each query's own top keys by full attention, the rest dropped: what no choice of keys can
    beat in softmax kept. It costs more than full attention."""
    count = max(1, round(density * layer.tokens))
    out, exact = torch.empty_like(layer.queries), layer.queries.new_empty(layer.queries.shape[:2])
    for head in range(layer.heads):
        for rows in torch.arange(layer.tokens).split(512):
            logits = layer.queries[head, rows] * layer.scale @ layer.k[head].T
            score = logits[:, layer.prefix :]
            least = score.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
            score.masked_fill_(score < least, float("-inf"))
            exact[head, rows] = logits.logsumexp(-1)
            out[head, rows] = logits.softmax(-1) @ layer.v[head]
    return Result(out, exact)


def sampled(layer: Layer, density: float, window: int, draw: int = 0) -> Result:
    """``route_attention``'s default: a window and keys drawn by importance, corrected by probes.

    Window, routed keys and probes together are the density. Draw 0 is the fixed sample.
    """
    groups = _windows(layer, window)
    own = sum(len(group) ** 2 for group in groups) / layer.tokens
    count = layer.tokens if density == 1 else int(density * layer.tokens - own - PROBES)
    if count < 1:
        raise ValueError(f"density: expected more than a window of {window}, got {density}")
    attention = SampledAttention(window_size=window, num_heavy_tokens_kv=count)
    attention.generator = torch.Generator().manual_seed(draw) if draw else None
    found = []
    attention.recorder = lambda indices, weights, grid: found.append(indices[0])
    out = attention(*_batch(layer), grid_size=layer.grid, num_prefix_tokens=layer.prefix)
    routed = found[0][found[0] >= 0]

    def keys(head: int, group: int) -> Tensor:
        return torch.cat([groups[group], routed]).unique()

    return Result(out[0, :, layer.prefix :], seen=(groups, keys))


def grouped(layer: Layer, density: float, window: int = 16, draw: int = 0) -> Result:
    """``router="grouped"``: keys of each tile drawn by what its own probes attend to, corrected by
    them.

    Keys of a tile and all probes together are the density. Draw 0 is the fixed sample.
    """
    tiles = tiles_of(layer.grid, (window, window), "cpu")
    count = layer.tokens if density == 1 else int(density * layer.tokens - 4 * len(tiles))
    if count < 1:
        raise ValueError(f"density: expected more than {4 * len(tiles)} probes, got {density}")
    attention = GroupedAttention(window_size=window, num_heavy_tokens_kv=count)
    attention.generator = torch.Generator().manual_seed(draw) if draw else None
    found = []
    attention.recorder = lambda indices, weights, grid: found.append(indices[0])
    out = attention(*_batch(layer), grid_size=layer.grid, num_prefix_tokens=layer.prefix)
    keys = found[0].unflatten(0, (len(tiles), -1))
    groups = [tile[tile >= 0] for tile in tiles]
    seen = (groups, lambda head, group: keys[group][keys[group] >= 0])
    return Result(out[0, :, layer.prefix :], seen=seen)


def _batch(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.unsqueeze(0) for x in layer.qkv)


def _windows(layer: Layer, side: int) -> list[Tensor]:
    of = window_of_token(*layer.grid, (side, side), "cpu")
    return [(of == number).nonzero().squeeze(-1) for number in range(int(of.max()) + 1)]
