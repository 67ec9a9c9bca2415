"""Training the routers of a routed diffusers model against its own full attention."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from colt5_vision.distill import distill

from .swap import routed_layers

__all__ = ["distill_routers"]


def distill_routers(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    steps: int = 100,
    lr: float = 3e-3,
    num_queries: int = 256,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 20,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the learned routers of a routed model to match the outputs of full attention, layer by layer.

    Everything else is frozen and runs with full attention; every layer's router minimises the expected squared error
    that sampling by its logits makes in that layer's output. Routers start as ``"mean_query"``. Layers train on maps of
    at least ``min_tokens``, with the settings that the schedule gives them.

    Args:
        model: a UNet or transformer through :func:`enable_routed_attention` with ``router="learned"``. Its mode and its
            parameters' ``requires_grad`` come back as they were.
        inputs: arguments of ``model`` by name, as its own denoising gives it, one mapping a step, on its device; an
            iterable that starts over. It is repeated until ``steps``. In a process group, this process's own.
        steps: of training.
        lr: learning rate of Adam, cosine to 0.
        num_queries: queries per image and step that stand for all.
        seed: of the queries drawn.
        checkpoint: file to resume from if it is there, and to save to every ``save_every`` steps and on interruption.
        save_every: see ``checkpoint``.
        progress: show a bar.

    Returns:
        One dict a step, name of a layer to its error over that of ``"mean_query"`` (below 1: better).

    Raises:
        TypeError, ValueError: naming the argument; a checkpoint of other layers or settings; an error that is not
            finite, before it reaches a router.

    Source: layer-wise distillation (FitNets, arXiv 1412.6550); optimal sampling by Neyman (1934).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a diffusers model, such as pipe.unet, got {type(model).__name__}")
    attention = {name: part for name, part in routed_layers(model).items() if part.config.router == "learned"}
    if not attention:
        raise ValueError(
            "model: has no learned router, expected one that went through enable_routed_attention with router='learned'"
        )
    return distill(
        model,
        attention,
        lambda arguments: model(**arguments),
        inputs,
        argument="inputs",
        settings={"config": json.dumps([part.config.to_dict() for part in attention.values()])},
        steps=steps,
        lr=lr,
        num_queries=num_queries,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
