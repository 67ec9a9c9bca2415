from .api import router_logits

__all__ = ["router_logits"]
