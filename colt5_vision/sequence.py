"""Conditionally routed attention over sequences: every token sees its neighbours, few tokens are
seen by all."""

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from .attention import check_counts, counts_of
from .branches import LightBranch
from .checks import TokenCount, check_float_tensor, check_int, check_mask, check_rotary
from .init import init_weights
from .scheduled import ScheduledLayer
from .sum_fusion import SumFusion


class ConditionalRoutedAttention(ScheduledLayer):
    """Attention over a sequence: local attention for all, far tokens for the few that a router
    picks.

        x (B, N, C) ─┬─ neighbours of each token ──────────┐
                     └─ router ─ few routed tokens ─ heavy ┴─ (B, N, C)

    ``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``, see
    :class:`~colt5_vision.sum_fusion.SumFusion`. A token that is not routed gets the learned null
    token in place of a heavy output. Normalisation is included, the residual is not.

    Args:
        dim: width C.
        num_heavy_tokens_q: queries of the heavy branch, an int >= 1, that many, or a float in
            (0, 1], that share of the sequence. None: every token queries the routed keys, and there
            is no query router.
        num_heavy_tokens_kv: routed keys and values, likewise.
        num_routed_kv: R sets of routed keys, the heads split over them.
        has_light_attn: False: the heavy branch alone.
        light_dim_head, light_heads: head width and heads of the light branch.
        light_window_size: tokens that the light branch sees, half of them on either side.
        heavy_dim_head, heavy_heads: of the heavy branch.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm
            (``log_gradient``); False: the soft gates themselves. None: False where every token
            queries, else True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`;
            ``cell_size`` (1, c) stratifies over stretches of c tokens.
        multiply_keys_by_score, multiply_queries_by_score: gates scale the keys (queries) too, not
            only the values.
        use_null_q_tokens: the null token for queries that were not routed. None: where queries are
            routed.
        rotary_emb: rotary positions in the heavy branch.
        router: kind of both routers: ``"learned"``, ``"mean_query"``, ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Attributes:
        attend: the :class:`SumFusion`, which holds all weights.

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
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_null_q_tokens: bool | None = None,
        rotary_emb: bool = False,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # checks
        self.dim = check_int("dim", dim)
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = check_counts(
            num_heavy_tokens_q, num_heavy_tokens_kv
        )
        check_rotary("heavy_dim_head", heavy_dim_head, 2, rotary_emb)

        # the light branch
        light = None
        if has_light_attn:
            check_int("light_heads", light_heads)
            check_int("light_dim_head", light_dim_head)
            reach = check_int("light_window_size", light_window_size, minimum=2) // 2
            norm = nn.LayerNorm(dim, **factory)
            light = LightBranch(dim, light_heads, light_dim_head, norm, reach=reach, **factory)

        # both branches, and the routers
        self.attend = SumFusion(
            light,
            dim,
            heavy_heads,
            heavy_dim_head,
            routes_queries=num_heavy_tokens_q is not None,
            num_routed_kv=num_routed_kv,
            router=router,
            router_kwargs=router_kwargs,
            router_straight_through=router_straight_through,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_null_q_tokens=use_null_q_tokens,
            rotary_emb=rotary_emb,
            **factory,
        )

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heavy_tokens_q={self.num_heavy_tokens_q}, "
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
            x: (B, N, C), any N >= 1.
            mask: (B, N) bool, True = valid. Masked tokens are not read, not routed, and come out as
                0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's. A tensor (B,) is a count
                of each sample: integers, or floats, that share of its valid tokens; at most the
                module's own count.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        return attend_line(self, x, mask, num_heavy_tokens_q, num_heavy_tokens_kv)


def attend_line(layer, x: Tensor, mask: Tensor | None, queries, keys) -> Tensor:
    """The branches of ``layer`` over a sequence; arguments as of
    :meth:`ConditionalRoutedAttention.forward`."""
    check_float_tensor("x", x, ndim=3)
    batch, num_tokens, dim = x.shape
    if dim != layer.dim or num_tokens < 1:
        raise ValueError(f"x: expected (B, N, {layer.dim}) with N >= 1, got {tuple(x.shape)}")
    check_mask("mask", mask, (batch, num_tokens))
    count_q, count_kv = counts_of(layer, batch, queries, keys)

    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0)
    out = layer.attend(x, None, mask, count_q, count_kv)
    return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)
