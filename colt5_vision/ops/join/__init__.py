from .api import join

__all__ = ["join"]
