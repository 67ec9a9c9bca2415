"""The operators: soft and hard top-k, window attention with routed keys, and what surrounds a routed branch."""

from .relaxations import cumulative_softmax, gumbel_sinkhorn
from .route_topk import route_topk
from .routed_rows import gated_scatter_add_, gather_normalize
from .routed_window_attention import routed_window_attention, window_attention
from .router_logits import router_logits
from .soft_topk import coordinate_descent, soft_topk
from .topk import TopkReturn, topk

__all__ = [
    "TopkReturn",
    "coordinate_descent",
    "cumulative_softmax",
    "gated_scatter_add_",
    "gather_normalize",
    "gumbel_sinkhorn",
    "route_topk",
    "routed_window_attention",
    "router_logits",
    "soft_topk",
    "topk",
    "window_attention",
]
