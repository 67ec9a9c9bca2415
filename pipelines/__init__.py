"""Routed attention for diffusers: one call to route a pipeline or a model, one to undo it."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("colt5_vision.pipelines needs diffusers: pip install 'colt5-vision[diffusers]'") from error

from .config import RoutedAttentionConfig, ScheduleRule
from .distill import distill_routers
from .from_scratch import ConditionalRoutedAttentionBlock, build_routed_attention
from .processor import RoutedAttnProcessor
from .store import load_routed_attention, save_routed_attention
from .swap import (
    RoutedAttentionReport,
    disable_routed_attention,
    enable_routed_attention,
    routed_layers,
)

__all__ = [
    "ConditionalRoutedAttentionBlock",
    "RoutedAttentionConfig",
    "RoutedAttentionReport",
    "RoutedAttnProcessor",
    "ScheduleRule",
    "build_routed_attention",
    "disable_routed_attention",
    "distill_routers",
    "enable_routed_attention",
    "load_routed_attention",
    "routed_layers",
    "save_routed_attention",
]
