"""The operators: soft and hard top-k, window attention with routed keys, attention of groups to
their own keys, and what surrounds a routed branch."""

from .grouped_attention import PooledKeys, grouped_attention
from .join import join
from .route_topk import route_topk
from .routed_rows import gather_normalize
from .routed_window_attention import routed_window_attention, window_attention
from .router_logits import router_logits
from .soft_topk import coordinate_descent, soft_topk

__all__ = [
    "PooledKeys",
    "coordinate_descent",
    "gather_normalize",
    "grouped_attention",
    "join",
    "route_topk",
    "routed_window_attention",
    "router_logits",
    "soft_topk",
    "window_attention",
]
