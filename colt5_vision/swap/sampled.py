"""Routed attention for weights that were trained with full attention: what the swap puts in place
of ``scaled_dot_product_attention``.

Keys are chosen by *sampling*, and what is left out is represented, not dropped: token j is routed
with probability ``π_j`` and stands for ``1 / π_j`` tokens, ``-log π_j`` added to its logit (a
Horvitz-Thompson estimate of both sums of the softmax beyond a query's own window; within it every
key is there itself). The probabilities are soft top-k gates of a token's importance, its root mean
square part in the outputs of a sample of queries: heavy hitters have ``π = 1`` and are exact, with
weight 1, while the tail is thinned out in proportion. Those queries, the probes, attend to
everything: what the estimate gets wrong is known for them, and added to the others' in the measure
they are alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import TokenCount, check_int, check_router, check_token_count, token_count
from ..gates import only_gradient
from ..ops import route_topk, routed_window_attention
from ..ops.attention_checks import check_qkv, checked_mask
from ..ops.autocast import without_autocast
from ..ops.dtypes import wide_dtype
from ..ops.routed_window_attention.gathered import PairBias
from ..positions import morton_order
from .controls import CONTROLS, control_keys
from .heads import Group, over_heads
from .learned import check_features, corrector
from .probes import Probes, correction, probe
from .sampling import inclusion_gates, sample_tokens
from .volume import Volume, fold_grid
from .window import Grid, check_grid, check_window, window_of_grid

__all__ = ["KINDS", "SampledAttention"]

KINDS = ("sampled", "learned", *CONTROLS)
"""Kinds of routing with one choice of keys for the whole map."""
_PROBE_KEYS = 64  # routed keys that rank the queries
_DRAWING = ("sampled", "learned")
_READ_BY = {  # arguments that are not for every router
    "features": ("learned",),
    "dim": ("learned",),
    "device": ("learned",),
    "generator": _DRAWING,
    "curve": (*_DRAWING, "grid"),
    "num_heavy_tokens_q": tuple(kind for kind in KINDS if kind != "window"),
}


class SampledAttention(nn.Module):
    """A stand-in for ``scaled_dot_product_attention`` over the tokens of a map or a volume.

    Args:
        window_size: side of the windows in tokens, (height, width), or (frames, height, width). Of
            a volume, one or two numbers are windows of single frames.
        num_heavy_tokens_kv: keys that every token sees besides its window, an int or a float in (0,
            1], that share.
        num_heavy_tokens_q: tokens that see them (by a probe of few routed keys, those that attend
            most beyond themselves); the others see their window. None: every token.
        router: ``"sampled"``, by importance, as described above; ``"learned"``, the same with
            trained logits; and as controls ``"mean_query"`` (what the mean of all queries attends
            to most, nothing for the tail), ``"random"`` and ``"grid"`` (each key stands for N / K),
            ``"window"`` (none).
        dim: channels of ``features``, for ``router="learned"``; of others None.
        device: of the learned router; of others None.

    Attributes:
        generator: draws the samples where a call gives no generator; None: the same input gives the
            same sample.
        recorder: gets the routed keys of each call, (B, K) raster indices (-1: empty) and log
            weights, and the grid; None: nobody looks.

    Raises:
        TypeError, ValueError: for an argument that does not fit.

    Source: CoLT5 (arXiv 2303.09752) with one softmax; Horvitz-Thompson weights (JASA 1952).
    """

    def __init__(
        self,
        *,
        window_size: int | tuple[int, ...],
        num_heavy_tokens_kv: TokenCount,
        num_heavy_tokens_q: TokenCount | None = None,
        router: str = "sampled",
        dim: int | None = None,
        device=None,
    ):
        super().__init__()
        check_router(router, KINDS)
        self.window_size = check_window("window_size", window_size)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)
        self.num_heavy_tokens_q = num_heavy_tokens_q
        if num_heavy_tokens_q is not None:
            self.num_heavy_tokens_q = check_token_count("num_heavy_tokens_q", num_heavy_tokens_q)
        self.router = router
        self.generator: torch.Generator | None = None
        self.recorder: Callable[[Tensor, Tensor, Grid], None] | None = None
        self._check_read(dim=dim, device=device, num_heavy_tokens_q=num_heavy_tokens_q)
        if router == "learned":
            self.correction = corrector(check_int("dim", dim), 64, device)

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heavy_tokens_kv={self.num_heavy_tokens_kv}, "
            f"num_heavy_tokens_q={self.num_heavy_tokens_q}, router={self.router!r}"
        )

    def _check_read(self, **given) -> None:
        """What this router does not read must be None."""
        for name, value in given.items():
            if value is not None and self.router not in _READ_BY[name]:
                kind = type(value).__name__
                raise ValueError(f"{name}: expected None with router={self.router!r}, got {kind}")

    @property
    def samples(self) -> bool:
        """Whether keys are sampled by importance, and outputs corrected by the probes."""
        return self.router in _DRAWING

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
        pair_bias: PairBias | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        window_size: int | tuple[int, ...] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        num_heavy_tokens_q: TokenCount | None = None,
        curve: Tensor | None = None,
        group: Group = None,
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: (B, heads, P + N, head_dim), positions applied; P prefix tokens, then the map
                in raster order.
            grid_size: (H, W), or (T, H, W), whose product is N; or several (T, H, W), of maps that
                follow each other: each has windows of its own, and keys are routed of all.
            num_prefix_tokens: P.
            features: (B, N, dim), what ``router="learned"`` reads; for others None.
            key_mask: (B, N) or (B, P + N) bool, True = may be attended to.
            pair_bias, scale: see :func:`~colt5_vision.ops.routed_window_attention`.
            generator: draws the sample; default: the module's. None for routers that draw none.
            window_size, num_heavy_tokens_kv, num_heavy_tokens_q: of this call; default: the
                module's. ``router="window"`` has no heavy queries.
            curve: (M,) raster indices along which keys are sampled, or spread by ``"grid"``;
                default: a Z-order curve; for others None.
            group: of processes that have the other heads, which are then routed to the same keys;
                ``features`` are those of all heads; None: all heads are here.

        Returns:
            (B, heads, P + N, head_dim).

        Raises:
            TypeError, ValueError: for an argument that does not fit.
        """
        # checks
        self._check_read(features=features, generator=generator, curve=curve)
        self._check_read(num_heavy_tokens_q=num_heavy_tokens_q)
        check_qkv(q, k, v)
        prefix = num_prefix_tokens
        grid_size = check_grid("grid_size", grid_size, q.shape[2] - prefix)
        key_mask = checked_mask(key_mask, q, prefix)
        if self.router == "learned":
            tokens = q.shape[2] - prefix
            check_features(features, q.shape[0], tokens, self.correction, self.router)

        # this call's settings, else the module's
        window = self.window_size if window_size is None else window_size
        window = window_of_grid(check_window("window_size", window), grid_size)
        kv_count = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        q_count = self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q

        # a volume, or several maps, become one map
        whole_grid = grid_size
        volume = fold_grid(grid_size, window, q.device)
        if volume is not None:
            unfolded = (q, k, v, features, key_mask, pair_bias)
            q, k, v, features, key_mask, pair_bias = fold(volume, prefix, *unfolded)
            slots = token_count("num_heavy_tokens_kv", kv_count, volume.place.shape[0])
            grid_size, window, curve = volume.grid, volume.window, volume.curve
            q_count = scaled_count(q_count, volume)
        else:
            slots = token_count("num_heavy_tokens_kv", kv_count, q.shape[2] - prefix)

        # what a few queries tell that attend to everything
        if curve is None and self.samples:
            curve = morton_order(*grid_size, q.device)
        call = {
            "grid_size": grid_size,
            "num_prefix_tokens": prefix,
            "key_mask": key_mask,
            "pair_bias": pair_bias,
            "scale": scale,
            "window_size": window,
        }
        probes = self.probe(q, k, v, curve=curve, group=group, **call) if self.samples else None

        # routed keys
        routed = self.route(
            q,
            k,
            slots,
            grid_size=grid_size,
            num_prefix_tokens=prefix,
            key_mask=key_mask,
            scale=scale,
            features=features,
            probes=probes,
            generator=generator or self.generator,
            curve=curve,
            group=group,
        )
        if self.recorder is not None and routed is not None:
            self._record(routed, volume, whole_grid)

        # attention over window and routed keys
        if routed is None or q_count is None:
            out = self._attend_all(q, k, v, routed, probes, call)
        else:
            out = self._attend_some(q, k, v, routed, probes, q_count, call, group)
        return out if volume is None else unfold(volume, prefix, out)

    def probe(self, q: Tensor, k: Tensor, v: Tensor, *, window_size=None, **call) -> Probes:
        """What a few queries tell; further arguments of :func:`~colt5_vision.swap.probes.probe`."""
        window = self.window_size if window_size is None else window_size
        return probe(q.detach(), k.detach(), v.detach(), window_size=window, **call)

    def importance(
        self, q: Tensor, k: Tensor, v: Tensor, *, grid_size, num_prefix_tokens=0, **call
    ) -> Tensor:
        """(B, N), log importance of the keys, as ``grid_size`` has them in order."""
        volume = fold_grid(grid_size, call.get("window_size"), q.device)
        if volume is None:
            how = {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens}
            return self.probe(q, k, v, **how, **call).importance
        mask, bias = call.pop("key_mask"), call.pop("pair_bias")
        q, k, v, _, mask, bias = fold(volume, num_prefix_tokens, q, k, v, None, mask, bias)
        call |= {"window_size": volume.window, "grid_size": volume.grid, "curve": volume.curve}
        call |= {"num_prefix_tokens": num_prefix_tokens, "key_mask": mask, "pair_bias": bias}
        return self.probe(q, k, v, **call).importance[:, volume.place]

    def logits(self, importance: Tensor, features: Tensor | None) -> Tensor:
        """(B, N), what the probabilities of the keys grow with, from the probes' ``importance``."""
        if self.router == "learned":
            with without_autocast(importance.device.type):
                return importance + self.correct(features)
        return importance

    def correct(self, features: Tensor) -> Tensor:
        """(B, N), what training has added to the logits."""
        return self.correction(features.detach()).squeeze(-1)

    def route(
        self,
        q: Tensor,
        k: Tensor,
        slots: int,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        features: Tensor | None = None,
        probes: Probes | None = None,
        generator: torch.Generator | None = None,
        curve: Tensor | None = None,
        group: Group = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Routed keys of the map: (indices, log_weights), both (B, slots), -1 for an empty slot;
        None for no keys.

        Args:
            q, k, features, key_mask, scale, generator, curve, group: as for :meth:`forward`;
                ``key_mask`` (B, P + N).
            slots: number of routed keys.
            grid_size: (H, W).
            probes: of :meth:`probe`, where keys are sampled.
        """
        prefix = num_prefix_tokens
        mask = None if key_mask is None else key_mask[:, prefix:]
        if not self.samples:
            return control_keys(
                self.router,
                q[:, :, prefix:],
                k[:, :, prefix:],
                slots,
                grid_size=grid_size,
                curve=curve,
                mask=mask,
                scale=scale,
                group=group,
            )

        # draw keys by their importance
        gates = inclusion_gates(self.logits(probes.importance, features), slots, mask)
        order = morton_order(*grid_size, q.device) if curve is None else curve
        how = {"mask": mask, "generator": generator}
        drawn = sample_tokens(gates.detach().unsqueeze(1), slots, order, **how)
        indices, valid = (x.squeeze(1) for x in drawn)

        # each stands for 1 / its probability
        gate = gates.gather(-1, indices).clamp_min(torch.finfo(gates.dtype).tiny).log()
        log_weights = gate.detach().neg()
        if gates.requires_grad:  # straight-through: a key that helps is sampled more often
            log_weights = log_weights + only_gradient(gate)
        return torch.where(valid, indices, -1), log_weights

    def _record(self, routed, volume: Volume | None, grid_size: Grid) -> None:
        indices, log_weights = routed
        if volume is not None:
            indices = torch.where(indices < 0, -1, volume.token[indices.clamp_min(0)])
        self.recorder(indices, log_weights, tuple(grid_size))

    def _attend_all(self, q, k, v, routed, probes: Probes | None, call: dict) -> Tensor:
        """Every token sees its window and the routed keys, if there are any."""
        if routed is None:
            return routed_window_attention(q, k, v, **call)
        heavy = {"routed_indices": routed[0], "log_weights": routed[1], "weight_own_window": False}
        out = routed_window_attention(q, k, v, **heavy, **call)
        if probes is None:
            return out
        prefix = call["num_prefix_tokens"]
        return out + correction(probes, out[:, :, probes.rows + prefix], q, prefix)

    def _attend_some(
        self, q, k, v, routed, probes: Probes | None, count: TokenCount, call: dict, group: Group
    ) -> Tensor:
        """Some tokens see their window and the routed keys, the others their window."""
        prefix = call["num_prefix_tokens"]
        heavy = {"routed_indices": routed[0], "log_weights": routed[1], "weight_own_window": False}
        mask = None if call["key_mask"] is None else call["key_mask"][:, prefix:]
        queries = choose_queries(
            q[:, :, prefix:], k[:, :, prefix:], routed, count, mask, call["scale"], group
        )
        out = routed_window_attention(q, k, v, query_indices=queries, **heavy, **call)

        # the probes need not be among the queries
        if probes is not None:
            rows = probes.rows.expand(q.shape[0], -1)
            estimate = routed_window_attention(q, k, v, query_indices=rows, **heavy, **call)
            index = (queries + prefix)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
            missing = correction(probes, estimate[:, :, prefix:], q, prefix).gather(2, index)
            out = out + nn.functional.pad(missing, (0, 0, prefix, 0))

        # write them into what the others see
        light = routed_window_attention(q, k, v, **call)
        rows = torch.arange(prefix, device=q.device).expand(q.shape[0], -1)
        rows = torch.cat([rows, queries + prefix], 1)
        return light.scatter(2, rows[:, None, :, None].expand_as(out), out)


def choose_queries(
    q: Tensor,
    k: Tensor,
    routed: tuple[Tensor, Tensor],
    count: TokenCount,
    mask: Tensor | None,
    scale: float | None,
    group: Group = None,
) -> Tensor:
    """Raster indices (B, Q) of the tokens that attend most to a few of the routed keys, against
    themselves; by content alone.

    Args:
        q, k: (B, heads, N, head_dim).
        routed: (indices, log_weights) of the routed keys, both (B, K).
        count: of the tokens to choose.
        mask: (B, N) bool, True = valid.
        group: of processes that have the other heads.
    """
    slots = token_count("num_heavy_tokens_q", count, q.shape[2])
    indices, log_weights = routed
    few = min(_PROBE_KEYS, indices.shape[1])
    few = torch.linspace(0, indices.shape[1] - 1, few, device=q.device).long()
    wide = wide_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach().to(wide) * scale, k.detach().to(wide)

    # the few keys, without the empty slots
    chosen = indices[:, few]
    empty = chosen < 0
    index = chosen.clamp_min(0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1])
    keys = k.gather(2, index).masked_fill(empty[:, None, :, None], 0)
    weight = log_weights.detach()[:, few].to(wide).masked_fill(empty, torch.finfo(wide).min)

    score = (q @ keys.mT + weight[:, None, None]).logsumexp(-1) - (q * k).sum(-1)
    return route_topk(over_heads(score, group), slots, mask=mask)[0]


def fold(volume: Volume, prefix: int, q, k, v, features, key_mask, pair_bias) -> tuple:
    """Arguments of an attention over a volume or several maps, for the map that stands for them."""
    own = torch.arange(prefix, device=volume.token.device)
    token = torch.cat([own, volume.token + prefix])  # of each place, the prefix in front
    q, k, v = (x[:, :, token] for x in (q, k, v))
    features = None if features is None else features[:, volume.token]
    if key_mask is not None:
        key_mask = key_mask[:, token]
    if volume.filled is not None:
        filled = nn.functional.pad(volume.filled, (prefix, 0), value=True)
        key_mask = filled.expand(q.shape[0], -1) if key_mask is None else key_mask & filled
    bias = None if pair_bias is None else lambda i, j: pair_bias(token[i], token[j])
    return q, k, v, features, key_mask, bias


def unfold(volume: Volume, prefix: int, out: Tensor) -> Tensor:
    """Tokens (B, heads, P + M, head_dim) of the map back in their own order."""
    own = torch.arange(prefix, device=out.device)
    return out[:, :, torch.cat([own, volume.place + prefix])]


def scaled_count(count: TokenCount | None, volume: Volume) -> TokenCount | None:
    """A share of the volume's tokens as a number: empty places are not counted."""
    if count is None:
        return None
    return token_count("num_heavy_tokens_q", count, volume.place.shape[0])
