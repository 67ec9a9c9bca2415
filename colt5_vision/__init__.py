"""CoLT5's conditional computation for images: attention and feed-forward that spend where it pays.

The core needs torch and einops only; ``colt5_vision.models`` (timm) and ``colt5_vision.pipelines`` (diffusers) are
imported on their own.
"""

from .attention import ConditionalRoutedImageAttention
from .block import ConditionalRoutedTransformerBlock
from .feedforward import ConditionalRoutedFeedForward
from .router import CoordinateDescentRouter, Routing

__version__ = "0.1.0"

__all__ = [
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedImageAttention",
    "ConditionalRoutedTransformerBlock",
    "CoordinateDescentRouter",
    "Routing",
]
