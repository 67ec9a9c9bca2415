from .api import PooledKeys, grouped_attention

__all__ = ["PooledKeys", "grouped_attention"]
