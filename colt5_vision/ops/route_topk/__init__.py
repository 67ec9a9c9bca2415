from .api import route_topk

__all__ = ["route_topk"]
