"""Inputs of a model, as distillation and calibration take them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def check_batches(model: Any, inputs: Any) -> None:
    """``model`` is a module, and ``inputs`` an iterable of what it takes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model, such as pipe.unet, got {type(model).__name__}")
    if isinstance(inputs, (Tensor, Mapping)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected an iterable of batches, got one {type(inputs).__name__}")


def run_batch(model: nn.Module, batch: Any) -> None:
    """Run a model on one of its inputs, a tensor or a mapping of its arguments."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor):
        model(batch)
    else:
        raise TypeError(
            "inputs: expected tensors or mappings of the model's arguments, got "
            f"{type(batch).__name__}; of (images, labels), give the images"
        )
