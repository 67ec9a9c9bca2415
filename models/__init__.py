"""timm backbones of routed attention; importing ``colt5_vision.models`` registers ``colt5_*`` with timm."""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("colt5_vision.models needs timm: pip install 'colt5-vision[timm]'") from error

from .colt5_pyramid import Colt5Pyramid
from .colt5_vit import Colt5VisionTransformer
from .distill import distill_routers
from .routed_attention import routed_layers
from .store import load_routed_attention, save_routed_attention
from .swap import route_attention, unroute_attention

__all__ = [
    "Colt5Pyramid",
    "Colt5VisionTransformer",
    "distill_routers",
    "load_routed_attention",
    "route_attention",
    "routed_layers",
    "save_routed_attention",
    "unroute_attention",
]
