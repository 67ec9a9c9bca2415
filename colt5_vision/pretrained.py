"""Routed attention for weights that were trained with full attention: what timm and diffusers swap in.

Keys are chosen by *sampling*, and what is left out is represented, not dropped: token j is routed with probability
``π_j`` and stands for ``1 / π_j`` tokens, ``-log π_j`` added to its logit (a Horvitz-Thompson estimate of both sums of
the softmax beyond a query's own window; within it every key is there itself). The probabilities are soft top-k gates of
a token's importance, its root mean square part in the outputs of a sample of queries: heavy hitters have
``π = 1`` and are exact, with weight 1, while the tail is thinned out in proportion. Those queries, the probes, attend to
everything: what the estimate gets wrong is known for them, and added to the others' in the measure they are alike.
"""

import torch
from torch import Tensor, nn

from .checks import TokenCount, check_int, check_pair, check_token_count, token_count
from .mean_query import mean_query_logits
from .ops import route_topk, routed_window_attention, soft_topk
from .ops.autocast import without_autocast
from .ops.routed_window_attention.gathered import PairBias
from .positions import dispersed_rank, hashed_uniform, morton_order
from .probes import Probes, correction, probe

__all__ = ["ROUTERS", "PretrainedRoutedAttention", "sample_tokens"]

ROUTERS = ("mean_query", "learned", "mean_query_topk", "random", "grid", "window")
_PROBE_KEYS = 64  # routed keys that rank the queries
_UNIFORM = 0.1  # part of the probability that is spread evenly


def sample_tokens(
    gates: Tensor,
    k: int,
    grid_size: tuple[int, int],
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Systematic sampling: each token with its probability, spread over the map, without replacement.

    Args:
        gates: (B, R, N) inclusion probabilities in [0, 1] with a sum of ``min(k, valid tokens)``.
        k: slots.
        grid_size: (H, W) of the map.
        mask: (B, N) bool, True = valid.
        generator: draws the offset of the comb anew; default: its middle, the same input gives the same sample.

    Returns:
        ``(indices, valid)``, both (B, R, k): raster indices, and a bool, False in an empty slot.

    Source: systematic sampling (Madow 1949).
    """
    order = morton_order(*grid_size, gates.device)
    total = k if mask is None else mask.sum(-1).clamp_max(k)[:, None, None]
    mass = gates[..., order].double().cumsum(-1)
    mass = mass * (total / mass[..., -1:].clamp_min(1e-30))  # the sum is exact again
    offset = 0.5 if generator is None else torch.rand(1, generator=generator, device=generator.device).to(gates.device)
    # a token is taken when its share of the mass reaches the next tooth of a comb with teeth 1 apart
    teeth = (nn.functional.pad(mass, (1, 0)) - offset).floor()
    taken = teeth[..., 1:] > teeth[..., :-1]
    place = torch.arange(gates.shape[-1], 0, -1, device=gates.device)
    place = torch.where(taken, place + gates.shape[-1], place).topk(k, -1).indices
    return order[place], taken.gather(-1, place)


class _Linear(nn.Linear):
    """Takes any dtype. It looks at its weight only while it runs: offloading and layerwise casting change it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class PretrainedRoutedAttention(nn.Module):
    """A stand-in for ``scaled_dot_product_attention`` over the tokens of a map, for weights trained with full attention.

    Args:
        window_size: side of the windows in tokens, or (height, width).
        num_heavy_tokens_kv: keys that every token sees besides its window, an int or a float in (0, 1], that share.
        num_heavy_tokens_q: tokens that see them (by a probe of few routed keys, those that attend most beyond
            themselves); the others see their window. None: every token.
        router: ``"mean_query"``, sampling by importance to the mean (squared) of the queries, as described above;
            ``"learned"``, the same with trained logits; and as controls ``"mean_query_topk"`` (what
            the mean of all queries attends to most, nothing for the tail), ``"random"`` and ``"grid"`` (each key stands
            for N / K), ``"window"`` (none).
        dim: channels of ``features``, for ``router="learned"``.
        device, dtype: of the parameters.

    Attributes:
        generator: draws the samples where a call gives no generator; None: the same input gives the same sample.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752) with one softmax; Horvitz-Thompson weights (JASA 1952).
    """

    def __init__(
        self,
        *,
        window_size: int | tuple[int, int],
        num_heavy_tokens_kv: TokenCount,
        num_heavy_tokens_q: TokenCount | None = None,
        router: str = "mean_query",
        dim: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if router not in ROUTERS:
            raise ValueError(f"router: expected one of {ROUTERS}, got {router!r}")
        self.window_size = check_pair("window_size", window_size)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)
        q_count = num_heavy_tokens_q
        self.num_heavy_tokens_q = None if q_count is None else check_token_count("num_heavy_tokens_q", q_count)
        self.router = router
        self.generator: torch.Generator | None = None
        if router == "learned":
            width = check_int("dim", dim)
            self.correction = nn.Sequential(
                _Linear(width, 64, device=device, dtype=dtype),
                nn.GELU(),
                _Linear(64, 1, device=device, dtype=dtype),
            )
            nn.init.zeros_(self.correction[2].weight)  # starts as router="mean_query"
            nn.init.zeros_(self.correction[2].bias)

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heavy_tokens_kv={self.num_heavy_tokens_kv}, "
            f"num_heavy_tokens_q={self.num_heavy_tokens_q}, router={self.router!r}"
        )

    def probe(
        self, q: Tensor, k: Tensor, v: Tensor, *, window_size: int | tuple[int, int] | None = None, **call
    ) -> Probes:
        """What a few queries tell; further arguments of :func:`~colt5_vision.probes.probe`."""
        window = self.window_size if window_size is None else check_pair("window_size", window_size)
        return probe(q.detach(), k.detach(), v.detach(), window_size=window, **call)

    def logits(self, importance: Tensor, features: Tensor | None) -> Tensor:
        """(B, N), what the probabilities of the keys grow with, from the probes' ``importance``."""
        if self.router == "learned":
            with without_autocast(importance.device.type):
                return importance + self.correct(features)
        return importance

    def correct(self, features: Tensor | None) -> Tensor:
        """(B, N), what training has added to the logits."""
        if features is None:
            raise ValueError("features: needed by router='learned'")
        correction = self.correction(features.detach()).squeeze(-1)
        return correction if correction.dtype == torch.float64 else correction.float()

    def gates(self, logits: Tensor, k: int, mask: Tensor | None) -> Tensor:
        """Probabilities (B, N) of being routed, with sum k; none is tiny, so that no weight is huge."""
        with without_autocast(logits.device.type):
            valid = torch.ones_like(logits) if mask is None else mask.to(logits.dtype)
            share = logits.masked_fill(valid == 0, torch.finfo(logits.dtype).min).softmax(-1)
            uniform = valid / valid.sum(-1, keepdim=True).clamp_min(1)
            share = (1 - _UNIFORM) * share + _UNIFORM * uniform
            return soft_topk(share.clamp_min(torch.finfo(share.dtype).tiny).log(), k, mask=mask)

    def route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        features: Tensor | None = None,
        key_mask: Tensor | None = None,
        pair_bias: PairBias | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        window_size: int | tuple[int, int] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        probes: Probes | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Routed keys of the map: (indices, log_weights), both (B, K), -1 for an empty slot; None for no keys.

        Arguments are those of :meth:`forward`, and ``probes``, what :meth:`probe` gave for them (default: done here).
        """
        batch, tokens = q.shape[0], q.shape[2] - num_prefix_tokens
        image = slice(num_prefix_tokens, None)
        mask = None if key_mask is None else key_mask[:, image]
        count = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        slots = token_count("num_heavy_tokens_kv", count, tokens)
        if self.router == "window":
            return None
        if self.router in ("random", "grid", "mean_query_topk"):
            if self.router == "random":
                scores = hashed_uniform(tokens, 0, q.device)
            elif self.router == "grid":
                scores = -dispersed_rank(*grid_size, q.device).float()
            else:
                with without_autocast(q.device.type):
                    scores = mean_query_logits(q[:, :, image].detach(), k[:, :, image].detach(), mask, scale)
                scores = scores.logsumexp(1)
            indices, valid = route_topk(scores.expand(batch, -1), slots, mask=mask)
            stands_for = torch.ones(batch, 1, device=q.device)
            if self.router != "mean_query_topk":
                count = torch.full_like(stands_for, tokens) if mask is None else mask.sum(-1, keepdim=True).float()
                stands_for = (count / slots).clamp_min(1)
            return torch.where(valid, indices, -1), stands_for.log().expand(-1, slots)
        if probes is None:
            call = {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens, "key_mask": key_mask}
            probes = self.probe(q, k, v, window_size=window_size, pair_bias=pair_bias, scale=scale, **call)
        gates = self.gates(self.logits(probes.importance, features), slots, mask)
        indices, valid = sample_tokens(gates.detach().unsqueeze(1), slots, grid_size, mask, generator)
        indices, valid = indices.squeeze(1), valid.squeeze(1)
        gate = gates.gather(-1, indices).clamp_min(torch.finfo(gates.dtype).tiny).log()
        log_weights = gate.detach().neg()
        if gates.requires_grad:  # straight-through: a key that helps is sampled more often
            log_weights = log_weights + (gate - gate.detach())
        return torch.where(valid, indices, -1), log_weights

    def _route_queries(
        self,
        q: Tensor,
        k: Tensor,
        routed: tuple[Tensor, Tensor],
        mask: Tensor | None,
        scale: float | None,
        count: TokenCount | None = None,
    ) -> Tensor:
        """Raster indices (B, Q) of the tokens that attend most to a few of the routed keys, against themselves; by
        content, without ``pair_bias``."""
        slots = token_count("num_heavy_tokens_q", self.num_heavy_tokens_q if count is None else count, q.shape[2])
        indices, log_weights = routed
        probe = torch.linspace(0, indices.shape[1] - 1, min(_PROBE_KEYS, indices.shape[1]), device=q.device).long()
        chosen = indices[:, probe]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = q.detach().to(wide) * scale, k.detach().to(wide)
        keys = k.gather(2, chosen.clamp_min(0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
        keys = keys.masked_fill((chosen < 0)[:, None, :, None], 0)
        weight = log_weights.detach()[:, probe].to(wide).masked_fill(chosen < 0, torch.finfo(wide).min)
        score = (q @ keys.mT + weight[:, None, None]).logsumexp(-1) - (q * k).sum(-1)
        return route_topk(score.mean(1), slots, mask=mask)[0]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        features: Tensor | None = None,
        key_mask: Tensor | None = None,
        pair_bias: PairBias | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        window_size: int | tuple[int, int] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        num_heavy_tokens_q: TokenCount | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: (B, heads, P + N, head_dim), positions applied; P prefix tokens, then the map in raster order.
            grid_size: (H, W), N = H * W.
            num_prefix_tokens: P.
            features: (B, N, dim), what ``router="learned"`` reads.
            key_mask: (B, N) or (B, P + N) bool, True = may be attended to.
            pair_bias, scale: see :func:`~colt5_vision.ops.routed_window_attention`.
            generator: draws the sample; default: the module's.
            window_size, num_heavy_tokens_kv, num_heavy_tokens_q: of this call; default: the module's.

        Returns:
            (B, heads, P + N, head_dim).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if key_mask is not None and key_mask.shape[-1] == q.shape[2] - num_prefix_tokens:
            key_mask = nn.functional.pad(key_mask, (num_prefix_tokens, 0), value=True)
        call = {
            "grid_size": grid_size,
            "num_prefix_tokens": num_prefix_tokens,
            "key_mask": key_mask,
            "pair_bias": pair_bias,
            "scale": scale,
            "window_size": self.window_size if window_size is None else window_size,
        }
        probes = self.probe(q, k, v, **call) if self.router in ("mean_query", "learned") else None
        chosen = {"generator": generator or self.generator, "num_heavy_tokens_kv": num_heavy_tokens_kv}
        routed = self.route(q, k, v, features=features, probes=probes, **chosen, **call)
        if routed is None:
            return routed_window_attention(q, k, v, **call)
        call |= {"routed_indices": routed[0], "log_weights": routed[1], "weight_own_window": False}
        prefix, count = num_prefix_tokens, self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q
        if count is None:
            out = routed_window_attention(q, k, v, **call)
            if probes is None:
                return out
            missing = correction(probes, out[:, :, probes.rows + prefix], q, prefix)
            return out + nn.functional.pad(missing, (0, 0, prefix, 0))
        mask = None if key_mask is None else key_mask[:, prefix:]
        queries = self._route_queries(q[:, :, prefix:], k[:, :, prefix:], routed, mask, scale, count)
        heavy = routed_window_attention(q, k, v, query_indices=queries, **call)
        if probes is not None:  # the probes need not be among the queries
            rows = probes.rows.expand(q.shape[0], -1)
            estimate = routed_window_attention(q, k, v, query_indices=rows, **call)[:, :, prefix:]
            index = queries[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
            missing = correction(probes, estimate, q, prefix).gather(2, index)
            heavy = heavy + nn.functional.pad(missing, (0, 0, prefix, 0))
        call |= {"routed_indices": None, "log_weights": None}
        out = routed_window_attention(q, k, v, **call)
        rows = torch.arange(prefix, device=q.device).expand(q.shape[0], -1)
        rows = torch.cat([rows, queries + prefix], 1)
        return out.scatter(2, rows[:, None, :, None].expand_as(heavy), heavy)
