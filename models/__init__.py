"""timm backbones of routed attention, and which layers of timm and transformers can be routed.

Importing ``colt5_vision.models`` registers ``colt5_*`` with timm, where timm is installed.
"""

import importlib.util

if importlib.util.find_spec("timm") is not None:
    from .colt5_pyramid import Colt5Pyramid
    from .colt5_vit import Colt5VisionTransformer

    __all__ = ["Colt5Pyramid", "Colt5VisionTransformer"]
else:
    __all__ = []

    def __getattr__(name: str):
        if name in ("Colt5Pyramid", "Colt5VisionTransformer"):
            raise ImportError(
                "colt5_vision.models needs timm: pip install 'timm>=1.0.31'"
            ) from None
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
