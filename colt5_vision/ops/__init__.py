"""The operators: soft and hard top-k, and window attention with routed keys."""

from .route_topk import route_topk
from .routed_window_attention import routed_window_attention, window_attention
from .soft_topk import coordinate_descent, soft_topk

__all__ = ["coordinate_descent", "route_topk", "routed_window_attention", "soft_topk", "window_attention"]
