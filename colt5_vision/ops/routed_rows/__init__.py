from .api import gather_normalize

__all__ = ["gather_normalize"]
