"""Keeping autocast out of an operator."""

from contextlib import nullcontext

import torch


def without_autocast(device_type: str):
    """A context without autocast, also on a device that has none (meta)."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
