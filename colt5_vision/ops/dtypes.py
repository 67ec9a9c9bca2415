"""In which dtype operators compute, whatever they are given."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums and logits are computed in: float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def double_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device, for a few scalars of a row: float64, float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64
