"""Routed attention for diffusers: one call to route a pipeline or a model, one to undo it."""

try:
    import diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("colt5_vision.pipelines needs diffusers: pip install 'colt5-vision[diffusers]'") from error

from .config import RoutedAttentionConfig, ScheduleRule
from .processor import RoutedAttnProcessor
from .swap import (
    RoutedAttentionReport,
    disable_routed_attention,
    enable_routed_attention,
    routed_layers,
)

__all__ = [
    "RoutedAttentionConfig",
    "RoutedAttentionReport",
    "RoutedAttnProcessor",
    "ScheduleRule",
    "disable_routed_attention",
    "enable_routed_attention",
    "routed_layers",
]
