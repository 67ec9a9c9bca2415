from .api import coordinate_descent, soft_topk

__all__ = ["coordinate_descent", "soft_topk"]
