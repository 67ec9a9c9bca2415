"""CoLT5's conditional computation for images: attention and feed-forward that spend where it pays.

The core needs torch and einops only; ``colt5_vision.models`` (timm) and ``colt5_vision.pipelines`` (diffusers) are
imported on their own.
"""

from .attention import ConditionalRoutedImageAttention
from .autoregressive import ConditionalRoutedAutoregressiveAttention
from .autoregressive_cache import AutoregressiveCache
from .block import ConditionalRoutedTransformerBlock
from .convert import convert_colt5_attention_state_dict
from .cross_attention import ConditionalRoutedCrossAttention
from .feedforward import ConditionalRoutedFeedForward
from .ops import topk
from .router import CoordinateDescentRouter, Routing
from .schedule import RoutingSchedule
from .sequence import ConditionalRoutedAttention
from .vit import ConditionalRoutedViT

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveCache",
    "ConditionalRoutedAttention",
    "ConditionalRoutedAutoregressiveAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "ConditionalRoutedViT",
    "CoordinateDescentRouter",
    "Routing",
    "RoutingSchedule",
    "convert_colt5_attention_state_dict",
    "topk",
]
