"""Training the routers of a routed model, and nothing else, against its own full attention, layer
by layer."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..checks import check_int, check_path, check_positive
from ..store import save_atomically
from .batches import check_batches, run_batch
from .learned import LEARNED
from .reroute import RoutedLayer
from .teacher import Teacher
from .verb import routed_layers

__all__ = ["distill_routers"]


def distill_routers(
    model: nn.Module,
    inputs: Iterable[Tensor | Mapping[str, Any]],
    *,
    steps: int = 100,
    lr: float = 3e-3,
    num_queries: int = 256,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 20,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the learned routers of a routed model to match the outputs of full attention, layer by
    layer.

    The model is frozen and runs with full attention; every layer's router minimises the expected
    squared error that sampling by its logits makes in that layer's output. Routers start as
    ``"sampled"`` or ``"grouped"``. Layers train on maps of at least ``min_tokens``, with the
    settings that the schedule gives them. In a process group the processes' gradients are averaged;
    the first one shows the bar and saves.

    ``"learned_grouped"`` gains most. See ``docs/choosing.md``, and compare your own outputs.

    Args:
        model: a timm, transformers or diffusers model through
            :func:`~colt5_vision.route_attention` with ``router="learned"`` or
            ``"learned_grouped"``. Its mode and its parameters' ``requires_grad`` come back as they
            were.
        inputs: what ``model`` takes, on its device: tensors, or mappings of its arguments by name;
            an iterable that starts over, a list or a data loader. It is repeated until ``steps``.
            In a process group, this process's own.
        steps: batches to train on.
        lr: learning rate of Adam, cosine to 0.
        num_queries: queries per image and step that stand for all.
        seed: of the queries drawn.
        checkpoint: file to resume from if it is there, and to save to every ``save_every`` steps
            and on interruption.
        save_every: see ``checkpoint``.
        progress: show a bar.

    Returns:
        One dict a step, name of a layer to its error over that of its untrained router (below 1:
        better).

    Raises:
        TypeError, ValueError: for an argument that does not fit; a checkpoint of other
            layers or settings; an error that is not finite, before it reaches a router.
        RuntimeError: within ``torch.inference_mode``.

    Source: layer-wise distillation (FitNets, arXiv 1412.6550); optimal sampling by Neyman (1934).
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("distill_routers needs tqdm: pip install tqdm") from error

    # checks
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model, such as pipe.unet, got {type(model).__name__}")
    check_batches(inputs)
    for name, value in (("steps", steps), ("num_queries", num_queries), ("save_every", save_every)):
        check_int(name, value)
    check_int("seed", seed, minimum=0)
    check_positive("lr", lr)
    file = None if checkpoint is None else check_path("checkpoint", checkpoint)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("distill_routers: it trains, expected no torch.inference_mode around it")

    # which layers
    layers = {n: one for n, one in routed_layers(model).items() if one.attention.router in LEARNED}
    if not layers:
        raise ValueError(
            "model: has no learned router, expected one that went through "
            "route_attention(router='learned') or 'learned_grouped'"
        )

    # what is trained, and what a checkpoint must agree with
    routers = nn.ModuleDict({name.replace(".", "/"): one.attention for name, one in layers.items()})
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "num_queries": num_queries, "seed": seed}
    for name, one in layers.items():
        settings[name] = json.dumps(one.config.to_dict(), sort_keys=True)

    # how
    optimizer = torch.optim.Adam(routers.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[dict[str, float]] = []
    rank = distributed.get_rank() if _several() else 0

    # all of it, to go on from
    def save() -> None:
        if file is not None and rank == 0:
            state = {"routers": routers, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in state.items()}
            state |= {"history": history, "settings": settings}
            save_atomically(file, lambda path: torch.save(state, path))

    # the model stands still, its layers have a teacher
    frozen = {p: p.requires_grad for p in model.parameters()}
    training, teacher = {m: m.training for m in model.modules()}, Teacher(num_queries)
    model.eval().requires_grad_(False)
    for layer in layers.values():
        layer.teacher = teacher

    # training, from where a checkpoint left off
    bar = tqdm(total=steps, desc="distil routers", disable=not progress or rank > 0)
    try:
        if file is not None and file.exists():
            _resume(file, settings, routers, optimizer, schedule, history)
            bar.update(len(history))
        _start_alike(routers)
        batches = _repeat(inputs, skip=len(history))

        while len(history) < steps:
            # every layer's error and its gradients; the queries drawn are those of the step and the
            # process, so that resuming changes nothing
            optimizer.zero_grad(set_to_none=True)
            teacher.errors.clear()
            teacher.generator.manual_seed(seed + 1_000_003 * len(history) + 7_919 * rank)
            with torch.no_grad():
                run_batch(model, next(batches))
            ratios = _ratios(teacher, layers, len(history))

            # a step of all routers
            _average_gradients(routers)
            optimizer.step()
            schedule.step()
            history.append(ratios)

            # what is shown, and saved
            bar.update()
            error = sum(ratios.values()) / len(ratios)
            bar.set_postfix(error_vs_untrained=f"{error:.3f}")
            if len(history) % save_every == 0 or len(history) == steps:
                save()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        # the model as it was
        bar.close()
        for layer in layers.values():
            layer.teacher = None
        optimizer.zero_grad(set_to_none=True)
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
        for module, mode in training.items():
            module.training = mode
    return history


def _ratios(teacher: Teacher, layers: dict[str, RoutedLayer], step: int) -> dict[str, float]:
    """Each layer's error over that of its router as it began."""
    if not teacher.errors:
        reasons = dict.fromkeys(reason for layer in layers.values() for reason in layer.calls.exact)
        because = "".join(f"; exact so far: {reason}" for reason in reasons)
        raise ValueError(f"inputs: batch {step} reached no map that is routed{because}")
    names = {layer: name for name, layer in layers.items()}
    ratios = {
        names[layer]: error / max(reference, 1e-30)
        for layer, (error, reference) in teacher.errors.items()
    }
    wrong = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
    if wrong:
        raise ValueError(f"inputs: batch {step} gives an error that is not finite in {wrong[0]}")
    return ratios


def _several() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _start_alike(routers: nn.Module) -> None:
    if _several():
        for parameter in routers.parameters():
            distributed.broadcast(parameter.data, 0)


def _average_gradients(routers: nn.Module) -> None:
    if _several():
        for parameter in routers.parameters():
            if parameter.grad is None:  # of a layer that this process's map was too small for
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def _repeat(batches: Iterable, skip: int):
    """Batches over and over, from the one after ``skip``."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            if count > skip:
                yield batch
        if count == before:
            raise ValueError(
                "inputs: expected an iterable of batches that starts over, got none (left)"
            )


def _resume(
    path: Path, settings: dict, routers: nn.Module, optimizer, schedule, history: list
) -> None:
    # what a file of these routers holds
    try:
        state = torch.load(path, weights_only=True)
        saved, own, before = state["routers"], routers.state_dict(), state["settings"]
        layers = {key.split(".")[0] for key in saved}
        if layers != {key.split(".")[0] for key in own}:
            raise KeyError(f"its layers are {sorted(layers)}")
    except (
        RuntimeError,
        KeyError,
        EOFError,
        OSError,
        TypeError,
        AttributeError,
        UnpicklingError,
    ) as error:
        raise ValueError(
            f"checkpoint: {path} does not belong to these routers or is damaged: {error}"
        ) from error

    # of the same settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}: expected that of the checkpoint {path}, {before.get(name)}, got {value}"
            )
    if {key: x.shape for key, x in saved.items()} != {key: x.shape for key, x in own.items()}:
        raise ValueError(f"checkpoint: {path} does not belong to these routers: other widths")

    # go on from there
    routers.load_state_dict(saved)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    history += state["history"]
