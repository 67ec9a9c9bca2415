"""Training the routers of a swapped timm model against its own full attention."""

import os
from collections.abc import Iterable

from torch import Tensor, nn

from colt5_vision.distill import distill

from .routed_attention import routed_modules

__all__ = ["distill_routers"]


def distill_routers(
    model: nn.Module,
    images: Iterable[Tensor],
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

    The backbone is frozen and runs with full attention; every layer's router minimises the expected squared error that
    sampling by its logits makes in that layer's output. Routers start as ``"mean_query"``.

    Args:
        model: through :func:`route_attention` with ``router="learned"``. Its mode and its parameters'
            ``requires_grad`` come back as they were.
        images: what ``model`` takes, batches (B, C, H, W) on the model's device; an iterable that starts over, a list
            or a data loader. It is repeated until ``steps``. In a process group, this process's own.
        steps: batches to train on.
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
    attention = {n: m for n, m in routed_modules(model).items() if m.routing.router == "learned"}
    if not attention:
        raise ValueError(
            "model: has no learned router, expected one that went through route_attention(router='learned')"
        )
    return distill(
        model,
        attention,
        getattr(model, "forward_features", model),
        images,
        argument="images",
        settings={},
        steps=steps,
        lr=lr,
        num_queries=num_queries,
        seed=seed,
        checkpoint=checkpoint,
        save_every=save_every,
        progress=progress,
    )
