"""Conditionally routed attention over image maps: every token sees its window, few tokens are seen
by all."""

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from .branches import LightBranch
from .checks import (
    TokenCount,
    check_count,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    check_rotary,
    check_token_count,
)
from .init import init_weights
from .scheduled import NARROW_SOFTMAX, NARROW_SUM, ScheduledLayer
from .softmax_fusion import SoftmaxFusion
from .sum_fusion import SumFusion

FUSIONS = ("sum", "softmax")


class ConditionalRoutedImageAttention(ScheduledLayer):
    """Attention over a map: near tokens for all, far tokens for the few that a router picks.

        (B, C, H, W) ─ tokens (B, N, C) ─┬─ window of each token ──────────────┐
                                         ├─ router ─ few routed tokens ─ heavy ┴─ (B, C, H, W)

    ``fusion="sum"`` (:class:`~colt5_vision.sum_fusion.SumFusion`) is CoLT5. It adds two branches of
    separate weights, ``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``. A token that is
    not routed gets the learned null token in place of a heavy output.

    ``fusion="softmax"`` (:class:`~colt5_vision.softmax_fusion.SoftmaxFusion`) has one set of
    weights and one softmax over window ∪ routed keys. With every token routed it *is* full
    attention.

    Routing is global over the map. Normalisation is included, the residual is not.

    Args:
        dim: channels C.
        num_heavy_tokens_q: queries of the heavy branch, an int >= 1, that many, or a float in
            (0, 1], that share of the map. None: every token queries the routed keys, and there is
            no query router.
        num_heavy_tokens_kv: routed keys and values, likewise.
        num_routed_kv: R sets of routed keys, the heads split over them.
        has_light_attn: ``sum`` only: False: the heavy branch alone.
        light_dim_head, light_heads: head width and heads of the light branch. None: 64 and 8.
        light_window_size: window side of the light branch, an int or (height, width).
        heavy_dim_head, heavy_heads: of the heavy branch, likewise. ``fusion="softmax"`` has one set
            of heads: give one pair of the two, or both alike.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm
            (``log_gradient``); False: the soft gates themselves. None: False for ``"sum"`` where
            every token queries, else True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
        multiply_keys_by_score, multiply_queries_by_score: ``sum`` only: gates scale the keys
            (queries) too, not only the values.
        use_null_q_tokens: ``sum`` only: the null token for queries that were not routed. None:
            where queries are routed.
        channel_first: (B, C, H, W); False: (B, H, W, C).
        fusion: ``"sum"`` or ``"softmax"``.
        rotary_emb: 2-D axial rotary positions, of the heavy branch (``sum``) or of all
            (``softmax``).
        router: kind of both routers: ``"learned"``, ``"mean_query"``, ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Attributes:
        attend: the :class:`SumFusion` or :class:`SoftmaxFusion`, which holds all weights.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) section 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_tokens_kv: TokenCount,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int | None = None,
        light_heads: int | None = None,
        light_window_size: int | tuple[int, int] = 16,
        heavy_dim_head: int | None = None,
        heavy_heads: int | None = None,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_null_q_tokens: bool | None = None,
        channel_first: bool = True,
        fusion: str = "sum",
        rotary_emb: bool = False,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # checks
        scores = multiply_keys_by_score or multiply_queries_by_score
        _check_fusion(fusion, of_sum=scores or use_null_q_tokens or not has_light_attn)
        self.dim, self.fusion, self.channel_first = check_int("dim", dim), fusion, channel_first
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = check_counts(
            num_heavy_tokens_q, num_heavy_tokens_kv
        )
        window_size = check_pair("light_window_size", light_window_size)

        # the heads, filled in
        one_set = fusion == "softmax"
        light_heads, heavy_heads = both("heads", light_heads, heavy_heads, 8, one_set)
        light_dim_head, heavy_dim_head = both(
            "dim_head", light_dim_head, heavy_dim_head, 64, one_set
        )
        check_rotary("heavy_dim_head", heavy_dim_head, 4, rotary_emb)

        # what both fusions take
        shared = {
            "routes_queries": num_heavy_tokens_q is not None,
            "num_routed_kv": num_routed_kv,
            "router": router,
            "router_kwargs": router_kwargs,
            "router_straight_through": router_straight_through,
            "rotary_emb": rotary_emb,
            **factory,
        }

        # the fusion, with weights of its own
        if fusion == "softmax":
            self.narrowing = NARROW_SOFTMAX
            self.attend = SoftmaxFusion(dim, heavy_heads, heavy_dim_head, window_size, **shared)
        else:
            light = None
            if has_light_attn:
                light = self._light_branch(light_heads, light_dim_head, window_size, **factory)
            self.narrowing = NARROW_SUM
            self.attend = SumFusion(
                light,
                dim,
                heavy_heads,
                heavy_dim_head,
                multiply_keys_by_score=multiply_keys_by_score,
                multiply_queries_by_score=multiply_queries_by_score,
                use_null_q_tokens=use_null_q_tokens,
                **shared,
            )

    def _light_branch(
        self, heads: int, dim_head: int, window_size: tuple[int, int], **factory
    ) -> LightBranch:
        norm = nn.RMSNorm(self.dim, eps=1e-6, **factory)
        return LightBranch(self.dim, heads, dim_head, norm, window_size=window_size, **factory)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, fusion={self.fusion!r}, "
            f"num_heavy_tokens_q={self.num_heavy_tokens_q}, "
            f"num_heavy_tokens_kv={self.num_heavy_tokens_kv}"
        )

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_tokens_kv: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, C, H, W), or (B, H, W, C) with ``channel_first=False``; any H and W.
            mask: (B, H, W) bool, True = valid. Masked tokens are not read, not routed, and come out
                as 0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's. A tensor (B,) is a count
                of each sample: integers, or floats, that share of its valid tokens; at most the
                module's own count.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        check_float_tensor("x", x, ndim=4)
        x = x.permute(0, 2, 3, 1) if self.channel_first else x  # (B, H, W, C)
        self._check_map(x, mask)
        count_q, count_kv = counts_of(self, x.shape[0], num_heavy_tokens_q, num_heavy_tokens_kv)

        grid_size, x = x.shape[1:3], x.flatten(1, 2)  # (B, N, C)
        if mask is not None:
            mask = mask.flatten(1)
            x = torch.where(mask.unsqueeze(-1), x, 0)
        out = self.attend(x, tuple(grid_size), mask, count_q, count_kv)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), out, 0)

        out = out.unflatten(1, grid_size)
        return out.permute(0, 3, 1, 2) if self.channel_first else out

    def _check_map(self, x: Tensor, mask: Tensor | None) -> None:
        """``x`` is (B, H, W, C), ``mask`` (B, H, W)."""
        batch, height, width, channels = x.shape
        if channels != self.dim:
            raise ValueError(
                f"x: expected {self.dim} channels, got {channels} "
                f"(channel_first={self.channel_first})"
            )
        if height < 1 or width < 1:
            raise ValueError(
                f"x: expected a map of at least one token, got H = {height}, W = {width}"
            )
        check_mask("mask", mask, (batch, height, width))


def _check_fusion(fusion, *, of_sum: bool) -> None:
    """``fusion`` is one of :data:`FUSIONS`; ``of_sum``: an option that only ``"sum"`` has is
    used."""
    if fusion not in FUSIONS:
        raise ValueError(f"fusion: expected one of {FUSIONS}, got {fusion!r}")
    if of_sum and fusion != "sum":
        raise ValueError(
            "multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens, "
            "has_light_attn: only for fusion='sum'"
        )


def both(
    name: str, light: int | None, heavy: int | None, default: int, one_set: bool
) -> tuple[int, int]:
    """``light_<name>`` and ``heavy_<name>``, those not given filled in; alike in ``one_set``."""
    if one_set:
        light, heavy = (heavy if light is None else light), (light if heavy is None else heavy)
    light = check_int(f"light_{name}", default if light is None else light)
    heavy = check_int(f"heavy_{name}", default if heavy is None else heavy)
    if one_set and light != heavy:
        raise ValueError(
            f"light_{name}: fusion='softmax' has one set of heads, expected heavy_{name} "
            f"({heavy}), got {light}"
        )
    return light, heavy


def check_counts(queries, keys) -> tuple[TokenCount | None, TokenCount]:
    """A layer's own ``num_heavy_tokens_q`` and ``num_heavy_tokens_kv``."""
    if queries is not None:
        queries = check_token_count("num_heavy_tokens_q", queries)
    return queries, check_token_count("num_heavy_tokens_kv", keys)


def counts_of(layer: ScheduledLayer, batch: int, queries, keys):
    """The :class:`Count` of queries and of keys of a call, against those of the layer."""
    own = layer.queries_now(layer.num_heavy_tokens_q)
    if queries is not None and own is None:
        raise ValueError(
            "num_heavy_tokens_q: the module was made without a query router "
            "(num_heavy_tokens_q=None)"
        )
    count_q = check_count("num_heavy_tokens_q", queries, own, batch)
    own = layer.keys_now(layer.num_heavy_tokens_kv)
    return count_q, check_count("num_heavy_tokens_kv", keys, own, batch)
