from .api import gated_scatter_add_, gather_normalize

__all__ = ["gated_scatter_add_", "gather_normalize"]
