from .api import routed_window_attention, window_attention

__all__ = ["routed_window_attention", "window_attention"]
