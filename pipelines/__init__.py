"""diffusers: which of its models' layers can be routed, a processor to set by hand, and blocks to
train.

``colt5_vision.route_attention`` routes a pipeline or a model, ``unroute_attention`` undoes it.
"""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "colt5_vision.pipelines needs diffusers: pip install 'diffusers>=0.42.1'"
    ) from error

from .from_scratch import ConditionalRoutedAttentionBlock, build_routed_attention
from .processor import RoutedAttnProcessor

__all__ = ["ConditionalRoutedAttentionBlock", "RoutedAttnProcessor", "build_routed_attention"]
