"""CoLT5's conditional computation for images: attention and feed-forward that spend where it pays.

The core needs torch, einops and numpy only; ``colt5_vision.models`` (timm, transformers) and
``colt5_vision.pipelines`` (diffusers) are imported on their own, or by ``route_attention`` for a
model of theirs.
"""

from .attention import ConditionalRoutedImageAttention
from .block import ConditionalRoutedTransformerBlock
from .causal.attention import ConditionalRoutedAutoregressiveAttention
from .causal.cache import AutoregressiveCache
from .cross_attention import ConditionalRoutedCrossAttention
from .feedforward import ConditionalRoutedFeedForward
from .router import CoordinateDescentRouter
from .routing import Routing
from .schedule import RoutingSchedule
from .sequence import ConditionalRoutedAttention
from .swap.calibrate import calibrate_routing
from .swap.config import RoutedAttentionConfig
from .swap.distill import distill_routers
from .swap.report import RoutedAttentionReport
from .swap.store import load_routing, save_routing
from .swap.verb import route_attention, routed_layers, unroute_attention, why_not

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveCache",
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "CoordinateDescentRouter",
    "RoutedAttentionConfig",
    "RoutedAttentionReport",
    "Routing",
    "RoutingSchedule",
    "calibrate_routing",
    "distill_routers",
    "load_routing",
    "route_attention",
    "routed_layers",
    "save_routing",
    "unroute_attention",
    "why_not",
]
