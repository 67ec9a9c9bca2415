"""Routed attention for weights that were trained with full attention: what timm and diffusers swap in.

Keys are chosen by *sampling*, and what is left out is represented, not dropped: token j is routed with probability
``π_j`` and stands for ``1 / π_j`` tokens, ``-log π_j`` added to its logit (a Horvitz-Thompson estimate of both sums of
the softmax). The probabilities are the soft top-k gates of what the mean query attends to, so heavy hitters have
``π = 1`` and are exact, with weight 1, while the tail is thinned out in proportion.
"""

import torch
from torch import Tensor, nn

from .checks import TokenCount, check_int, check_pair, check_token_count, token_count
from .ops import route_topk, routed_window_attention, soft_topk
from .ops.routed_window_attention.gathered import PairBias
from .positions import dispersed_rank, hashed_uniform, morton_order
from .router import mean_query_logits, without_autocast

__all__ = ["ROUTERS", "PretrainedRoutedAttention", "sample_tokens"]

ROUTERS = ("mean_query", "learned", "mean_query_topk", "random", "grid", "window")
_PROBE_KEYS = 64  # routed keys that rank the queries


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
    total = gates.new_tensor(k) if mask is None else mask.sum(-1).clamp_max(k)[:, None, None]
    mass = gates[..., order].double().cumsum(-1)
    mass = mass * (total / mass[..., -1:].clamp_min(1e-30))  # the sum is exact again
    offset = 0.5 if generator is None else torch.rand(1, generator=generator, device=generator.device).to(gates.device)
    comb = torch.arange(k, device=gates.device, dtype=torch.float64) + offset
    place = torch.searchsorted(mass, comb.expand(*mass.shape[:-1], k).contiguous()).clamp_max(gates.shape[-1] - 1)
    valid = (comb < total).expand_as(place)
    # rounding may let a token of probability 1 reach two teeth: once is enough
    first = nn.functional.pad(place[..., 1:] != place[..., :-1], (1, 0), value=True)
    return order[place], valid & first


class PretrainedRoutedAttention(nn.Module):
    """A stand-in for ``scaled_dot_product_attention`` over the tokens of a map, for weights trained with full attention.

    Args:
        window_size: side of the windows in tokens, or (height, width).
        num_heavy_tokens_kv: keys that every token sees besides its window, an int or a float in (0, 1], that share.
        num_heavy_tokens_q: tokens that see them (by a probe of few routed keys, those that attend most beyond
            themselves); the others see their window. None: every token.
        router: ``"mean_query"``, as described above; ``"learned"``, the same with a trained correction of its logits;
            and as controls ``"mean_query_topk"`` (heavy hitters alone, nothing for the tail), ``"random"`` and
            ``"grid"`` (each key stands for N / K), ``"window"`` (none).
        dim: channels of ``features``, for ``router="learned"``.

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
        self.num_heavy_tokens_q = num_heavy_tokens_q
        if num_heavy_tokens_q is not None:
            check_token_count("num_heavy_tokens_q", num_heavy_tokens_q)
        self.router = router
        if router == "learned":
            width = check_int("dim", dim)
            self.correction = nn.Sequential(
                nn.Linear(width, 64, device=device, dtype=dtype),
                nn.GELU(),
                nn.Linear(64, 1, device=device, dtype=dtype),
            )
            nn.init.zeros_(self.correction[2].weight)  # starts as the mean query
            nn.init.zeros_(self.correction[2].bias)

    def extra_repr(self) -> str:
        return (
            f"window_size={self.window_size}, num_heavy_tokens_kv={self.num_heavy_tokens_kv}, "
            f"num_heavy_tokens_q={self.num_heavy_tokens_q}, router={self.router!r}"
        )

    def logits(self, q: Tensor, k: Tensor, features: Tensor | None, mask: Tensor | None, scale: float | None) -> Tensor:
        """(B, N) importance of each token, from q, k (B, heads, N, head_dim) and features (B, N, dim) of the map."""
        with without_autocast(q.device.type):
            logits = mean_query_logits(q.detach(), k.detach(), mask, scale).logsumexp(1)
            return logits + self.correct(features) if self.router == "learned" else logits

    def correct(self, features: Tensor | None) -> Tensor:
        """(B, N), what training has added to the logits of the mean query."""
        if features is None:
            raise ValueError("features: needed by router='learned'")
        weight = self.correction[0].weight
        correction = self.correction(features.detach().to(weight.dtype)).squeeze(-1)
        return correction if correction.dtype == torch.float64 else correction.float()

    def gates(self, logits: Tensor, k: int, mask: Tensor | None) -> Tensor:
        """Inclusion probabilities (B, N) with sum k; proportional to the root of importance, which suits squared errors
        best, hence eps = 2."""
        return soft_topk(logits, k, eps=2.0, mask=mask)

    def route(
        self,
        q: Tensor,
        k: Tensor,
        *,
        grid_size: tuple[int, int],
        features: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Routed keys of the map: (indices, log_weights), both (B, K), -1 for an empty slot; None for no keys.

        Arguments are those of :meth:`forward`, of the map's tokens alone.
        """
        batch, _, tokens, _ = q.shape
        slots = token_count("num_heavy_tokens_kv", self.num_heavy_tokens_kv, tokens)
        if self.router == "window":
            return None
        if self.router in ("random", "grid", "mean_query_topk"):
            if self.router == "random":
                scores = hashed_uniform(tokens, 0, q.device)
            elif self.router == "grid":
                scores = -dispersed_rank(*grid_size, q.device).float()
            else:
                scores = self.logits(q, k, features, mask, scale)
            indices, valid = route_topk(scores.expand(batch, -1), slots, mask=mask)
            stands_for = torch.ones(batch, 1, device=q.device)
            if self.router != "mean_query_topk":
                count = torch.full_like(stands_for, tokens) if mask is None else mask.sum(-1, keepdim=True).float()
                stands_for = (count / slots).clamp_min(1)
            return torch.where(valid, indices, -1), stands_for.log().expand(-1, slots)
        gates = self.gates(self.logits(q, k, features, mask, scale), slots, mask)
        indices, valid = sample_tokens(gates.detach().unsqueeze(1), slots, grid_size, mask, generator)
        indices, valid = indices.squeeze(1), valid.squeeze(1)
        gate = gates.gather(-1, indices).clamp_min(torch.finfo(gates.dtype).tiny).log()
        log_weights = gate.detach().neg()
        if gates.requires_grad:  # straight-through: a key that helps is sampled more often
            log_weights = log_weights + (gate - gate.detach())
        return torch.where(valid, indices, -1), log_weights

    def _route_queries(self, q: Tensor, k: Tensor, routed: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Raster indices (B, Q) of the tokens that attend most to a few of the routed keys, against themselves."""
        slots = token_count("num_heavy_tokens_q", self.num_heavy_tokens_q, q.shape[2])
        indices, log_weights = routed
        probe = torch.linspace(0, indices.shape[1] - 1, min(_PROBE_KEYS, indices.shape[1]), device=q.device).long()
        chosen = indices[:, probe]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k = q.detach().to(wide) * q.shape[-1] ** -0.5, k.detach().to(wide)
        keys = k.gather(2, chosen.clamp_min(0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1]))
        weight = log_weights.detach()[:, probe].masked_fill(chosen < 0, torch.finfo(wide).min)
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
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: (B, heads, P + N, head_dim), positions applied; P prefix tokens, then the map in raster order.
            grid_size: (H, W), N = H * W.
            num_prefix_tokens: P.
            features: (B, N, dim), what ``router="learned"`` reads.
            key_mask: (B, P + N) bool, True = may be attended to.
            pair_bias, scale: see :func:`~colt5_vision.ops.routed_window_attention`.
            generator: draws another sample; default: the same input gives the same sample.

        Returns:
            (B, heads, P + N, head_dim).

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        image = slice(num_prefix_tokens, None)
        mask = None if key_mask is None else key_mask[:, image]
        own_q, own_k = q[:, :, image], k[:, :, image]
        routed = self.route(
            own_q, own_k, grid_size=grid_size, features=features, mask=mask, scale=scale, generator=generator
        )
        call = {
            "grid_size": grid_size,
            "window_size": self.window_size,
            "num_prefix_tokens": num_prefix_tokens,
            "key_mask": key_mask,
            "pair_bias": pair_bias,
            "scale": scale,
        }
        if routed is None:
            return routed_window_attention(q, k, v, **call)
        call |= {"routed_indices": routed[0], "log_weights": routed[1]}
        if self.num_heavy_tokens_q is None:
            return routed_window_attention(q, k, v, **call)
        queries = self._route_queries(own_q, own_k, routed, mask)
        heavy = routed_window_attention(q, k, v, query_indices=queries, **call)
        call |= {"routed_indices": None, "log_weights": None}
        out = routed_window_attention(q, k, v, **call)
        rows = torch.arange(num_prefix_tokens, device=q.device).expand(q.shape[0], -1)
        rows = torch.cat([rows, queries + num_prefix_tokens], 1)
        return out.scatter(2, rows[:, None, :, None].expand_as(heavy), heavy)
