"""timm backbones of routed attention; importing ``colt5_vision.models`` registers ``colt5_*`` with timm."""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError("colt5_vision.models needs timm: pip install 'colt5-vision[timm]'") from error

from .colt5_vit import Colt5VisionTransformer

__all__ = ["Colt5VisionTransformer"]
