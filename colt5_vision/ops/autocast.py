"""Keeping autocast out of an operator."""

from contextlib import nullcontext

import torch

from .._torch_internals import has_autocast


def without_autocast(device_type: str):
    """A context without autocast, also on a device that has none (meta)."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
