"""The other way to join the branches: one softmax over near tokens and routed ones."""

import torch
from torch import Tensor, nn

from .branches import merge_heads, split_heads
from .checks import Count, check_heads, check_router_kwargs
from .ops import join, routed_window_attention, window_attention
from .positions import axial_rotary, rows_and_columns
from .router import CoordinateDescentRouter
from .routing import gather_tokens


class SoftmaxFusion(nn.Module):
    """One set of weights and one softmax over window(i) ∪ routed keys, over maps.

        x ─┬─ norm ─ to_qkv ─ rotate ─ q, k, v ─┬─ attention to window ∪ routed keys ─ to_out
           └─ key router ─ routed keys ─────────┘

    With every token routed it *is* full attention. Where queries are routed, the others see their
    window only.

    Args:
        dim: width C.
        heads, dim_head: number of heads and width of each.
        window_size: (height, width) of the windows.
        routes_queries: only routed queries see the routed keys. False: every token does.
        num_routed_kv: R, sets of routed keys, the heads split over them.
        router, router_kwargs, router_straight_through: of both routers. Straight-through: None is
            True.
        rotary_emb: axial rotary positions.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        window_size: tuple[int, int],
        *,
        routes_queries: bool,
        num_routed_kv: int,
        router: str,
        router_kwargs: dict | None,
        router_straight_through: bool | None,
        rotary_emb: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_heads("heavy_heads", heads, "num_routed_kv", num_routed_kv)
        factory = {"device": device, "dtype": dtype}
        self.heads, self.window_size, self.rotary_emb = heads, window_size, rotary_emb

        straight = True if router_straight_through is None else router_straight_through
        options = check_router_kwargs(router_kwargs, "give num_routed_kv instead")
        options = {"log_gradient": straight, **options}
        options |= {"straight_through": straight, "router": router, **factory}
        self.q_router = CoordinateDescentRouter(dim, **options) if routes_queries else None
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **options)

        self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int],
        mask: Tensor | None,
        count_q: Count,
        count_kv: Count,
    ) -> Tensor:
        """x (B, N, C), masked tokens 0, a map of ``grid_size``, mask (B, N) -> (B, N, C)."""
        place = {"mask": mask, "grid_size": grid_size}
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1))

        # which keys everybody sees
        asked = {"query": q, "key": k} if self.kv_router.kind == "mean_query" else {}
        routed_kv = self.kv_router(
            x, num_tokens=count_kv.slots, counts=count_kv.filled, **place, **asked
        )
        routed = {
            "routed_indices": torch.where(routed_kv.mask, routed_kv.indices, -1),
            "log_weights": routed_kv.log_weights,
        }
        if self.rotary_emb:
            q, k, v = self._rotated(q, k, v, grid_size[1])

        # every token asks
        window = {"grid_size": grid_size, "window_size": self.window_size, "key_mask": mask}
        if self.q_router is None:
            return self.to_out(merge_heads(routed_window_attention(q, k, v, **routed, **window)))

        # a routed query sees window ∪ routed keys, any other its window: the gate blends the two
        routed_q = self.q_router(x, num_tokens=count_q.slots, counts=count_q.filled, **place)
        routed_q = routed_q.only_route()
        near = merge_heads(window_attention(q, k, v, **window))
        asking = {"query_indices": routed_q.indices}
        both = merge_heads(routed_window_attention(q, k, v, **routed, **window, **asking))
        gain = both - gather_tokens(near, routed_q.indices)
        return self.to_out(join(near, gain, routed_q))

    def _rotated(self, q: Tensor, k: Tensor, v: Tensor, width: int) -> tuple[Tensor, ...]:
        places = torch.arange(q.shape[2], device=q.device)
        y_x = rows_and_columns(places, width)
        # v is a view of all of qkv, which backward would keep
        v = v.contiguous() if torch.is_grad_enabled() else v
        return axial_rotary(q, y_x), axial_rotary(k, y_x), v
