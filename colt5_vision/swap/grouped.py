"""Routed attention whose keys are chosen per tile of the map, for ``router="grouped"``.

The map is cut into at most about 25 tiles, and the queries of each tile, by content, into four
groups of alike ones. The mean query of a group is its *probe*: it attends to everything.

    tile of queries -> 4 groups -> 4 probes --importance--> keys of the tile, sampled
                                      |                          |
                                      +-- output - estimate      v
                                              |            attention of the tile
                                              +----------------> + correction, per group

Keys are sampled as :class:`~colt5_vision.swap.sampled.SampledAttention` does it, with a Horvitz-
Thompson weight each, but by what the tile's own probes attend to. What the estimate gets wrong at a
probe is known, and added for all queries of its group. The number of probes does not grow with the
map, so time and memory are O(N).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch_internals import is_exporting
from ..checks import TokenCount, check_token_count, token_count
from ..ops import grouped_attention
from ..ops.attention_checks import check_qkv, checked_mask, checked_scale
from ..ops.autocast import without_autocast
from ..ops.dtypes import wide_dtype
from .sampling import inclusion_gates, sample_tokens
from .volume import cells_of, curve_of, one_after_another
from .window import Grid, check_grid, check_window, maps_of, window_of_grid

__all__ = ["GroupedAttention"]

_TILES = 25  # about, at most
_HALVINGS = 2  # of a tile, into groups of alike queries
_SKETCH = 32  # keys whose logits tell how alike queries are
_STEPS = 2  # of the power iteration for the direction of a cut
_AT_ONCE = 8  # tiles whose probes are asked together: only their attention is kept of all
# of the importance, the share that all tiles have in common: a few keys that every query attends to
# matter to queries that no probe stands for
_COMMON = 0.3


class _Probes(NamedTuple):
    """What the mean queries of G groups tell, in float32 (float64 for float64)."""

    attention: list[Tensor]  # (B, heads, groups of some tiles, P + N) each
    out: Tensor  # (B, heads, G, head_dim)
    importance: Tensor  # (B, tiles, N), squared, summed over the groups of a tile


class GroupedAttention(nn.Module):
    """A stand-in for ``scaled_dot_product_attention`` over the tokens of a map or a volume.

    Args:
        window_size: least side of the tiles in tokens, (height, width), or (frames, height, width).
            Large maps have larger tiles.
        num_heavy_tokens_kv: keys of each tile, an int or a float in (0, 1], that share of the map.

    Attributes:
        generator: draws the samples where a call gives no generator; None: the same input gives the
            same sample.
        recorder: gets the keys of all tiles, (B, tiles * K) raster indices (-1: empty) and log
            weights, and the grid; None: nobody looks.

    Raises:
        TypeError, ValueError: for an argument that does not fit.

    Source: Horvitz-Thompson weights (JASA 1952); a query for a cluster of alike ones as in
        clustered attention (arXiv 2007.04825).
    """

    router = "grouped"

    def __init__(self, *, window_size: int | tuple[int, ...], num_heavy_tokens_kv: TokenCount):
        super().__init__()
        self.window_size = check_window("window_size", window_size)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)
        self.generator: torch.Generator | None = None
        self.recorder: Callable[[Tensor, Tensor, Grid], None] | None = None

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heavy_tokens_kv={self.num_heavy_tokens_kv}, "
            f"router={self.router!r}"
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid_size: Grid,
        num_prefix_tokens: int = 0,
        features: None = None,
        key_mask: Tensor | None = None,
        pair_bias: None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        window_size: int | tuple[int, ...] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        num_heavy_tokens_q: None = None,
        group: None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: (B, heads, P + N, head_dim), positions applied; P prefix tokens, then the map
                in raster order.
            grid_size: (H, W), or (T, H, W), whose product is N; or several (T, H, W), of maps that
                follow each other.
            num_prefix_tokens: P.
            key_mask: (B, N) or (B, P + N) bool, True = may be attended to.
            scale: factor of the logits, default head_dim ** -0.5.
            generator: draws the sample; default: the module's.
            window_size, num_heavy_tokens_kv: of this call; default: the module's.
            features, pair_bias, num_heavy_tokens_q, group: None, they are for other routers.

        Returns:
            (B, heads, P + N, head_dim).

        Raises:
            TypeError, ValueError: for an argument that does not fit.
        """
        # checks
        check_qkv(q, k, v)
        further = {"features": features, "pair_bias": pair_bias, "group": group}
        for name, value in (further | {"num_heavy_tokens_q": num_heavy_tokens_q}).items():
            if value is not None:
                raise ValueError(f"{name}: expected None with router='grouped', got {value!r}")
        prefix = num_prefix_tokens
        grid_size = check_grid("grid_size", grid_size, q.shape[2] - prefix)
        if is_exporting() and any(isinstance(side, torch.SymInt) for side in grid_size):
            raise ValueError(
                "grid_size: torch.export holds router='grouped' of one size alone, expected fixed "
                "height and width, or router='sampled'"
            )
        key_mask = checked_mask(key_mask, q, prefix)
        window = self.window_size if window_size is None else window_size
        window = window_of_grid(check_window("window_size", window), grid_size)
        count = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        slots = token_count("num_heavy_tokens_kv", count, q.shape[2] - prefix)

        # groups of alike queries, and what their means tell
        tiles = tiles_of(grid_size, window, q.device)
        curve = curve_of(grid_size, q.device)
        with torch.no_grad(), without_autocast(q.device.type):
            by = checked_scale(scale, q.shape[-1])
            groups = alike_groups(q, k, tiles, curve, prefix, key_mask, by)
            probes = _probe(q, k, v, groups, tiles.shape[0], prefix, key_mask, by)

            # keys of each tile, and what they get wrong at the probes
            mask = None if key_mask is None else key_mask[:, prefix:]
            generator = generator or self.generator
            keys, log_weights = _draw(probes, slots, curve, mask, generator)
            missing = probes.out - _estimate(probes, v, keys, log_weights, prefix, key_mask)
        if self.recorder is not None:
            self.recorder(keys.flatten(1), log_weights.flatten(1), tuple(grid_size))

        # attention of the groups, and what is missing by their probes
        out = grouped_attention(
            q,
            k,
            v,
            groups.unflatten(1, (tiles.shape[0], -1)).flatten(2).unsqueeze(1),
            keys.unsqueeze(1),
            log_weights=log_weights.unsqueeze(1),
            key_mask=key_mask,
            num_prefix_tokens=prefix,
            scale=scale,
        )
        correction = _by_token(missing, groups, q.shape[2] - prefix)
        return out + nn.functional.pad(correction, (0, 0, prefix, 0)).to(out.dtype)


def tiles_of(grid: Grid, window: tuple[int, ...], device) -> Tensor:
    """(tiles, S) raster indices of balanced tiles of a map or a volume, or of several, -1 where one
    is smaller.

    Args:
        window: least sides of a tile; S is a multiple of the groups that a tile is cut into.
    """
    grids = maps_of(grid)
    area, tiles = sum(map(math.prod, grids)) / _TILES, []
    for one in grids:
        sides = _sides(one, window, area)
        counts = [(length + side - 1) // side for length, side in zip(one, sides)]
        # all of about one size
        sides = [(length + count - 1) // count for length, count in zip(one, counts)]
        tiles.append(cells_of(one, sides, device))
    index = one_after_another(grids, tiles)
    return nn.functional.pad(index, (0, -index.shape[1] % 2**_HALVINGS), value=-1)


def _sides(grid: tuple[int, ...], window: tuple[int, ...], area: float) -> list[int]:
    """Of tiles: at least those of the window, and of about ``area`` tokens."""
    sides = list(window)
    for count, axis in enumerate(sorted(range(len(grid)), key=grid.__getitem__)):
        least = min(grid[axis], math.ceil(area ** (1 / (len(grid) - count))))
        sides[axis] = max(window[axis], least)
        area = max(1.0, area / least)
    return sides


def alike_groups(
    q: Tensor,
    k: Tensor,
    tiles: Tensor,
    curve: Tensor,
    prefix: int,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """(B, tiles * 4, S / 4) raster indices of alike queries, -1 for none, for all heads in common;
    those of a tile follow each other.

    Queries are alike that give alike logits, in all heads, to a few keys spread over the map. Each
    tile is cut in halves across the direction in which these vary most, and the halves again.

    Args:
        tiles: (tiles, S) raster indices, -1 for none.
    """
    # logits to a few keys, (B, N, heads * keys)
    few = min(_SKETCH, curve.shape[0])
    rows = curve[(torch.arange(few, device=q.device) * 2 + 1) * curve.shape[0] // (2 * few)]
    key = k[:, :, rows + prefix].to(wide_dtype(q)) * scale
    query = q[:, :, prefix:].to(key.dtype)
    if key_mask is not None:  # a masked token has no say, whatever stands in it
        key = key.masked_fill(~key_mask[:, None, rows + prefix, None], 0)
        query = query.masked_fill(~key_mask[:, None, prefix:, None], 0)
    logits = (query @ (key - key.mean(2, keepdim=True)).mT).transpose(1, 2).flatten(2)

    members = tiles.expand(q.shape[0], -1, -1)
    for _ in range(_HALVINGS):
        members = _halves(logits, members)
    return members


def _halves(x: Tensor, members: Tensor) -> Tensor:
    """Cut groups (B, G, S) of rows of (B, N, F) across their first principal direction: (B, 2 G,
    S / 2)."""
    there = (members >= 0).unsqueeze(-1)
    at = members.clamp_min(0).flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    rows = x.gather(1, at).unflatten(1, members.shape[1:]) * there
    mean = rows.sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
    rows = (rows - mean) * there

    # power iteration, from the row farthest from the mean
    far = rows.square().sum(-1).argmax(-1)[:, :, None, None].expand(-1, -1, -1, x.shape[-1])
    direction = rows.gather(2, far)
    for _ in range(_STEPS):
        direction = (rows @ direction.mT).mT @ rows
        norm = direction.norm(dim=-1, keepdim=True)
        direction = direction / norm.clamp_min(torch.finfo(x.dtype).tiny)
    place = (rows @ direction.mT).squeeze(-1).masked_fill(~there.squeeze(-1), float("inf"))
    return members.gather(2, place.argsort(-1)).unflatten(2, (2, -1)).flatten(1, 2)


def _probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    tiles: int,
    prefix: int,
    key_mask: Tensor | None,
    scale: float,
) -> _Probes:
    """Full attention of the mean query of each group."""
    wide, dim = wide_dtype(q), q.shape[-1]
    key, value, there = k.to(wide), v.to(wide), groups >= 0
    query = q[:, :, prefix:].to(wide)
    if key_mask is not None:
        key, value = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (key, value))
        query = query.masked_fill(~key_mask[:, None, prefix:, None], 0)
        there = there & key_mask[:, None, prefix:].expand(-1, groups.shape[1], -1).gather(
            2, groups.clamp_min(0)
        )

    # means of the groups
    at = groups.clamp_min(0).flatten(1)[:, None, :, None].expand(-1, q.shape[1], -1, dim)
    rows = query.gather(2, at).unflatten(2, groups.shape[1:]) * there[:, None, ..., None]
    mean = rows.sum(3) / there.sum(2).clamp_min(1)[:, None, :, None] * scale
    empty = ~there.any(2).unsqueeze(-1)

    # their attention, some tiles at a time
    own, found, outs, importance = value[:, :, prefix:], [], [], []
    square, each = own.square().sum(-1).unsqueeze(2), groups.shape[1] // tiles
    for start in range(0, groups.shape[1], _AT_ONCE * each):
        part = slice(start, start + _AT_ONCE * each)
        logits = mean[:, :, part] @ key.mT
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], torch.finfo(wide).min)
        attention = logits.softmax(-1)
        out = attention @ value

        # what each key has in the outputs of all heads
        apart = square + out.square().sum(-1, keepdim=True) - 2 * out @ own.mT
        part_of = (attention[..., prefix:].square() * apart.clamp_min_(0)).sum(1)
        part_of = part_of.masked_fill(empty[:, part], 0)
        importance.append(part_of.unflatten(1, (-1, each)).sum(2))
        found.append(attention)
        outs.append(out)
    return _Probes(found, torch.cat(outs, 2), torch.cat(importance, 1))


def _draw(
    probes: _Probes,
    slots: int,
    curve: Tensor,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Keys of each tile: (indices, log_weights), both (B, tiles, K), -1 for an empty slot."""
    # of a tile's importance, a part is what all tiles have in common
    squared = probes.importance
    own, common = squared.sqrt(), squared.mean(1, keepdim=True).sqrt()
    tiny = torch.finfo(own.dtype).tiny
    own, common = (x / x.sum(-1, keepdim=True).clamp_min(tiny) for x in (own, common))
    logits = ((1 - _COMMON) * own + _COMMON * common).clamp_min(tiny).log()

    # a sample for each tile
    whole = None if mask is None else mask.repeat_interleave(squared.shape[1], 0)
    gates = inclusion_gates(logits.flatten(0, 1), slots, whole).view_as(logits)
    indices, valid = sample_tokens(gates, slots, curve, mask=mask, generator=generator)
    weights = gates.gather(-1, indices).clamp_min(tiny).log().neg()
    return torch.where(valid, indices, -1), weights.masked_fill(~valid, 0)


def _estimate(
    probes: _Probes,
    v: Tensor,
    keys: Tensor,
    log_weights: Tensor,
    prefix: int,
    key_mask: Tensor | None,
) -> Tensor:
    """(B, heads, G, head_dim), what the sampled keys of its tile give a probe."""
    value = v.to(probes.out.dtype)
    if key_mask is not None:
        value = value.masked_fill(~key_mask[:, None, :, None], 0)
    weights, outs = torch.where(keys < 0, 0, log_weights.exp()), []
    parts = (x.split(_AT_ONCE, 1) for x in (keys.clamp_min(0), weights))
    for attention, index, weight in zip(probes.attention, *parts):
        dense = weight.new_zeros(*index.shape[:2], v.shape[2] - prefix)
        dense = nn.functional.pad(dense.scatter_add(2, index, weight), (prefix, 0), value=1.0)
        share = attention.unflatten(2, (dense.shape[1], -1)) * dense[:, None, :, None]
        share = share.flatten(2, 3)
        whole = share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        outs.append(share @ value / whole)
    return torch.cat(outs, 2)


def _by_token(x: Tensor, groups: Tensor, tokens: int) -> Tensor:
    """(B, heads, G, D), each token with what its group has: (B, heads, N, D)."""
    number = torch.arange(groups.shape[1], device=x.device)[:, None].expand_as(groups)
    group = groups.new_zeros(groups.shape[0], tokens + 1)
    token = torch.where(groups < 0, tokens, groups)
    group = group.scatter(1, token.flatten(1), number.flatten(1))[:, :tokens]
    return x.gather(2, group[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
