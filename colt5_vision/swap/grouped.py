"""Routed attention whose keys are chosen per tile of the map, for ``router="grouped"`` and
``"learned_grouped"``.

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
map, so time and memory are O(N). ``"learned_grouped"`` corrects the importance by what was trained.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._torch_internals import is_exporting
from ..checks import TokenCount, check_int, check_router, check_token_count, token_count
from ..ops import grouped_attention
from ..ops.attention_checks import check_qkv, checked_mask, checked_scale
from ..ops.autocast import without_autocast
from ..ops.dtypes import wide_dtype
from .learned import check_features, corrector
from .sampling import inclusion_gates, sample_tokens
from .tiles import FARTHEST, alike_groups, away_from, group_of_token, tiles_of
from .volume import curve_of
from .window import Grid, check_grid, check_window, window_of_grid

__all__ = ["GROUPED", "GroupedAttention"]

GROUPED = ("grouped", "learned_grouped")
"""Kinds of routing with a choice of keys for each tile."""

_AT_ONCE = 8  # tiles whose probes are asked together: only their attention is kept of all
# of the importance, the share that all tiles have in common: a few keys that every query attends to
# matter to queries that no probe stands for
_COMMON = 0.3


class Probes(NamedTuple):
    """What the mean queries of G groups tell, in float32 (float64 for float64)."""

    groups: Tensor  # (B, G, S) raster indices of queries, -1 for none; tile by tile
    attention: list[Tensor]  # (B, heads, groups of some tiles, P + N) each
    out: Tensor  # (B, heads, G, head_dim)
    importance: Tensor  # (B, tiles, N), squared, summed over the groups of a tile


class GroupedAttention(nn.Module):
    """A stand-in for ``scaled_dot_product_attention`` over the tokens of a map or a volume.

    Args:
        window_size: least side of the tiles in tokens, (height, width), or (frames, height, width).
            Large maps have larger tiles.
        num_heavy_tokens_kv: keys of each tile, an int or a float in (0, 1], that share of the map.
        router: ``"grouped"``, as described above; ``"learned_grouped"``, whose importance is
            corrected by two small networks: of the key, and of how far from the tile it is and how
            important it seemed. :func:`~colt5_vision.distill_routers` alone trains them: a loss of
            the model does not reach them.
        dim: channels of ``features``, for ``router="learned_grouped"``; else None.
        device: of these networks; else None.

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

    def __init__(
        self,
        *,
        window_size: int | tuple[int, ...],
        num_heavy_tokens_kv: TokenCount,
        router: str = "grouped",
        dim: int | None = None,
        device=None,
    ):
        super().__init__()
        self.router = check_router(router, GROUPED)
        self.window_size = check_window("window_size", window_size)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)
        self.generator: torch.Generator | None = None
        self.recorder: Callable[[Tensor, Tensor, Grid], None] | None = None
        if self.learns:
            self.correction = corrector(check_int("dim", dim), 64, device)
            self.place = corrector(4, 16, device)
        else:
            self._check_none(dim=dim, device=device)

    @property
    def learns(self) -> bool:
        """Whether importance is corrected by what was trained."""
        return self.router == "learned_grouped"

    def _check_none(self, **given) -> None:
        """What this router does not read must be None."""
        for name, value in given.items():
            if value is not None:
                got = type(value).__name__
                raise ValueError(f"{name}: expected None with router={self.router!r}, got {got}")

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
        features: Tensor | None = None,
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
            features: (B, N, dim), what ``router="learned_grouped"`` reads; else None.
            key_mask: (B, N) or (B, P + N) bool, True = may be attended to.
            scale: factor of the logits, default head_dim ** -0.5.
            generator: draws the sample; default: the module's.
            window_size, num_heavy_tokens_kv: of this call; default: the module's.
            pair_bias, num_heavy_tokens_q, group: None, they are for other routers.

        Returns:
            (B, heads, P + N, head_dim).

        Raises:
            TypeError, ValueError: for an argument that does not fit.
        """
        # checks
        check_qkv(q, k, v)
        self._check_none(pair_bias=pair_bias, group=group, num_heavy_tokens_q=num_heavy_tokens_q)
        prefix = num_prefix_tokens
        grid_size = check_grid("grid_size", grid_size, q.shape[2] - prefix)
        if self.learns:
            tokens = q.shape[2] - prefix
            check_features(features, q.shape[0], tokens, self.correction, self.router)
        else:
            self._check_none(features=features)
        if is_exporting() and any(isinstance(side, torch.SymInt) for side in grid_size):
            raise ValueError(
                f"grid_size: torch.export holds router={self.router!r} of one size alone, expected "
                "fixed height and width, or router='sampled'"
            )
        key_mask = checked_mask(key_mask, q, prefix)
        window = self.window_size if window_size is None else window_size
        window = window_of_grid(check_window("window_size", window), grid_size)
        count = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        slots = token_count("num_heavy_tokens_kv", count, q.shape[2] - prefix)

        # what the means of alike queries tell
        tiles = tiles_of(grid_size, window, q.device)
        with torch.no_grad(), without_autocast(q.device.type):
            probes = self.probe(q, k, v, tiles, grid_size, prefix, key_mask, scale)

            # keys of each tile, and what they get wrong at the probes
            mask = None if key_mask is None else key_mask[:, prefix:]
            logits = log_importance(probes)
            if self.learns:
                logits = logits + self.correct(logits, tiles, grid_size, features)
            curve = curve_of(grid_size, q.device)
            keys, log_weights = _draw(logits, slots, curve, mask, generator or self.generator)
            missing = probes.out - _estimate(probes, v, keys, log_weights, prefix, key_mask)
        if self.recorder is not None:
            self.recorder(keys.flatten(1), log_weights.flatten(1), tuple(grid_size))

        # attention of the groups, and what is missing by their probes
        out = grouped_attention(
            q,
            k,
            v,
            probes.groups.unflatten(1, (tiles.shape[0], -1)).flatten(2).unsqueeze(1),
            keys.unsqueeze(1),
            log_weights=log_weights.unsqueeze(1),
            key_mask=key_mask,
            num_prefix_tokens=prefix,
            scale=scale,
        )
        correction = _by_token(missing, probes.groups, q.shape[2] - prefix)
        return out + nn.functional.pad(correction, (0, 0, prefix, 0)).to(out.dtype)

    def probe(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Tensor,
        grid_size: Grid,
        prefix: int,
        key_mask: Tensor | None,
        scale: float | None,
    ) -> Probes:
        """What the mean queries of groups of alike ones tell.

        Args:
            q, k, v, grid_size, scale: as for :meth:`forward`.
            tiles: (tiles, S) raster indices, -1 for none.
            prefix: P.
            key_mask: (B, P + N) bool, True = may be attended to.
        """
        scale, curve = checked_scale(scale, q.shape[-1]), curve_of(grid_size, q.device)
        groups = alike_groups(q, k, tiles, curve, prefix, key_mask, scale)
        return _probe(q, k, v, groups, tiles.shape[0], prefix, key_mask, scale)

    def correct(self, logits: Tensor, tiles: Tensor, grid_size: Grid, features: Tensor) -> Tensor:
        """What training has added to the log importance of keys, (B, tiles, N).

        Args:
            logits: log importance, (B, tiles, N).
            tiles: (tiles, S) raster indices, -1 for none.
            grid_size: of the map or maps.
            features: (B, N, dim).
        """
        of_key = self.correction(features.detach()).mT  # (B, 1, N)
        away = away_from(tiles, grid_size)
        level = (logits.detach() + math.log(logits.shape[-1])) / 5  # 0: as much as the others
        found = []
        for some, own in zip(level.split(_AT_ONCE, 1), away.split(_AT_ONCE)):
            place = own / FARTHEST, (own < 1).to(own.dtype), (-own).exp()
            known = [x.expand_as(some) for x in place] + [some]
            found.append(self.place(torch.stack(known, -1)).squeeze(-1))
        return of_key + torch.cat(found, 1)


def _probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    tiles: int,
    prefix: int,
    key_mask: Tensor | None,
    scale: float,
) -> Probes:
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
    return Probes(groups, found, torch.cat(outs, 2), torch.cat(importance, 1))


def log_importance(probes: Probes) -> Tensor:
    """(B, tiles, N). Of a tile's importance, a part is what all tiles have in common."""
    squared, tiny = probes.importance, torch.finfo(probes.importance.dtype).tiny
    parts = squared.sqrt(), squared.mean(1, keepdim=True).sqrt()
    own, common = (x / x.sum(-1, keepdim=True).clamp_min(tiny) for x in parts)
    return ((1 - _COMMON) * own + _COMMON * common).clamp_min(tiny).log()


def _draw(
    logits: Tensor,
    slots: int,
    curve: Tensor,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Keys of each tile: (indices, log_weights), both (B, tiles, K), -1 for an empty slot."""
    whole = None if mask is None else mask.repeat_interleave(logits.shape[1], 0)
    gates = inclusion_gates(logits.flatten(0, 1), slots, whole).view_as(logits)
    indices, valid = sample_tokens(gates, slots, curve, mask=mask, generator=generator)
    weights = gates.gather(-1, indices).clamp_min(torch.finfo(gates.dtype).tiny).log().neg()
    return torch.where(valid, indices, -1), weights.masked_fill(~valid, 0)


def _estimate(
    probes: Probes,
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
    group = group_of_token(groups, tokens)[:, None, :, None]
    return x.gather(2, group.expand(-1, x.shape[1], -1, x.shape[3]))
