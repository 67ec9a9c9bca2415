"""CoLT5's way to join the branches: their sum."""

import torch
from torch import Tensor, nn

from .branches import HeavyBranch, LightBranch
from .checks import Count, check_heads, check_router_kwargs
from .ops import join
from .router import CoordinateDescentRouter


class SumFusion(nn.Module):
    """``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``, separate weights for each.

        x ─┬─ light branch, every token ───────────────────────────┐
           ├─ query router ─ routed tokens ─┐                      join ─ out
           └─ key router ─── routed keys ───┴─ heavy branch ───────┘

    A token that is not routed gets the learned null token in place of a heavy output.

    Args:
        light: the light branch, or None.
        dim: width C.
        heads, dim_head: of the heavy branch.
        routes_queries: queries are routed. False: every token is a query of the heavy branch.
        num_routed_kv: R, sets of routed keys.
        router, router_kwargs, router_straight_through: of both routers. Straight-through: None is
            False where every token queries, else True.
        multiply_keys_by_score, multiply_queries_by_score: gates scale the keys (queries) too.
        use_null_q_tokens: the null token; None: where queries are routed.
        rotary_emb: positions in the heavy branch.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        light: LightBranch | None,
        dim: int,
        heads: int,
        dim_head: int,
        *,
        routes_queries: bool,
        num_routed_kv: int,
        router: str,
        router_kwargs: dict | None,
        router_straight_through: bool | None,
        multiply_keys_by_score: bool,
        multiply_queries_by_score: bool,
        use_null_q_tokens: bool | None,
        rotary_emb: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # checks
        check_heads("heavy_heads", heads, "num_routed_kv", num_routed_kv)
        if not routes_queries and multiply_queries_by_score:
            raise ValueError(
                "multiply_queries_by_score: needs num_heavy_tokens_q, every token is a query"
            )
        if not routes_queries and use_null_q_tokens:
            raise ValueError("use_null_q_tokens: needs num_heavy_tokens_q, every token is a query")

        # measured over maps (docs/notes/2026-11-22-needle.md): straight through, one "sum" in six
        # forgot what it knew; where queries are routed, too, soft gates may fail in a short one
        straight = routes_queries if router_straight_through is None else router_straight_through
        options = check_router_kwargs(router_kwargs, "give num_routed_kv instead")
        options = {"log_gradient": straight, **options}
        options |= {"straight_through": straight, "router": router, **factory}
        self.q_router = CoordinateDescentRouter(dim, **options) if routes_queries else None
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **options)

        # both branches, and what stands in for the heavy one
        self.light_attn = light
        self.heavy_attn = HeavyBranch(
            dim,
            heads,
            dim_head,
            routes=num_routed_kv,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            rotary_emb=rotary_emb,
            **factory,
        )
        self.null_q_token = None
        if routes_queries and use_null_q_tokens is not False:
            self.null_q_token = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The null token starts at 0."""
        if self.null_q_token is not None:
            nn.init.zeros_(self.null_q_token)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None,
        mask: Tensor | None,
        count_q: Count,
        count_kv: Count,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C), masked tokens 0.
            grid_size: (H, W) of a map; None: a line.
            mask: (B, N) bool, True = valid.
            count_q, count_kv: how many queries and keys are routed.

        Returns:
            (B, N, C).
        """
        place = {"mask": mask, "grid_size": (1, x.shape[1]) if grid_size is None else grid_size}
        routed_kv = self.kv_router(x, num_tokens=count_kv.slots, counts=count_kv.filled, **place)
        # without a mask and counts every slot is filled
        key_mask = None if mask is None and count_kv.filled is None else routed_kv.mask
        read = {"key_mask": key_mask, "grid_size": grid_size}
        light = None if self.light_attn is None else self.light_attn(x, grid_size, mask)

        if self.q_router is None:  # every token asks
            heavy = self.heavy_attn(x, None, routed_kv, **read)
            return heavy if light is None else light + heavy.to(light.dtype)

        routed_q = self.q_router(x, num_tokens=count_q.slots, counts=count_q.filled, **place)
        routed_q = routed_q.only_route()
        heavy = self.heavy_attn(x, routed_q, routed_kv, **read)
        if light is None:
            light = heavy.new_zeros(()).expand(x.shape)
        return join(light, heavy, routed_q, self.null_q_token)
