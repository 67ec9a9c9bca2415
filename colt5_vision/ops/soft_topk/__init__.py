from .api import coordinate_descent, soft_topk
from .common import eps_schedule

__all__ = ["coordinate_descent", "eps_schedule", "soft_topk"]
