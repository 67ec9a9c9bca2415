"""Inputs of a model or pipeline, as distillation and calibration take them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def check_batches(inputs: Any) -> None:
    """``inputs`` is an iterable of what a model takes."""
    if isinstance(inputs, (Tensor, Mapping)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: expected an iterable of batches, got one {type(inputs).__name__}")


def run_batch(model: Any, batch: Any) -> None:
    """Run a model or pipeline on one of its inputs: a mapping of its arguments, or, of a model, a
    tensor."""
    alone = isinstance(model, nn.Module)
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, Tensor) and alone:
        model(batch)
    else:
        raise TypeError(
            "inputs: expected tensors or mappings of the model's arguments, got "
            f"{type(batch).__name__}; of (images, labels), give the images"
            if alone
            else "inputs: expected mappings of the pipeline's arguments, such as {'prompt': ...}, "
            f"got {type(batch).__name__}"
        )
