"""Training the routers of a swapped model, and nothing else, against its own full attention, layer by layer."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colt5_vision.checks import check_int, check_positive, token_count
from colt5_vision.ops import routed_window_attention
from colt5_vision.ops.grid import slot_of_token
from colt5_vision.pretrained import PretrainedRoutedAttention
from colt5_vision.store import save_atomically

from .routed_attention import routed_modules

__all__ = ["distill_routers"]


def sampling_error(routing: PretrainedRoutedAttention, logits: Tensor, cost: Tensor) -> Tensor:
    """(B,) expected squared error of the attention output when keys are sampled by ``logits``, up to a factor.

    A key sampled with probability π_j and weighted 1/π_j adds a variance of ``(1/π_j - 1) · cost_j``, where ``cost_j``
    is what a query's output loses without the key, squared and summed over queries (delta method of the ratio of sums).

    Args:
        logits, cost: (B, N).
    """
    slots = token_count("num_heavy_tokens_kv", routing.num_heavy_tokens_kv, logits.shape[-1])
    gates = routing.gates(logits, slots, None).clamp_min(1e-12)
    return ((1 / gates - 1) * cost).sum(-1)


class _Teacher:
    """Stands in for one routed attention: gives the full attention's output and trains the router on it."""

    def __init__(self, num_queries: int):
        self.num_queries = num_queries
        self.generator = torch.Generator()
        self.errors: dict[nn.Module, tuple[float, float]] = {}

    def __call__(self, attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, **call) -> Tensor:
        features, key_mask = call.pop("features"), call.pop("key_mask")
        if key_mask is not None:
            raise ValueError("attn_mask: distillation takes whole images, got a mask")
        routing, tokens = attention.routing, q.shape[2] - call["num_prefix_tokens"]
        every = torch.arange(tokens, device=q.device).expand(q.shape[0], -1)
        window = routing.window_size
        # every key is routed: full attention, by the same operator and with nothing of size N x N
        out = routed_window_attention(q, k, v, routed_indices=every, window_size=window, **call)
        cost = self._cost(window, q, k, v, out, **call)
        with torch.enable_grad():
            logits = routing.logits(q, k, features, **call)
            error = sampling_error(routing, logits, cost).mean()
            base = (logits - routing.correct(features)).detach()
            reference = sampling_error(routing, base, cost).mean()
            (error / reference.clamp_min(1e-30)).backward()
        self.errors[attention] = (error.item(), reference.item())
        return out

    def _cost(self, window_size, q, k, v, out, *, grid_size, num_prefix_tokens, pair_bias, scale) -> Tensor:
        """(B, N): sum over heads and sampled queries outside key j's window of ``(p_ij |v_j - o_i|)²``."""
        prefix, tokens = num_prefix_tokens, grid_size[0] * grid_size[1]
        rows = torch.randperm(tokens, generator=self.generator)[: self.num_queries].to(q.device) + prefix
        logits = (q[:, :, rows] @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if pair_bias is not None:
            every = torch.arange(k.shape[2], device=q.device)
            bias = pair_bias(rows.view(1, 1, 1, -1, 1), every.view(1, 1, 1, 1, -1))
            logits = logits + bias.squeeze(2)
        p = logits.float().softmax(-1)[..., prefix:]
        values, o = v[:, :, prefix:].float(), out[:, :, rows].float()
        distance = values.square().sum(-1).unsqueeze(2) + o.square().sum(-1, keepdim=True) - 2 * o @ values.mT
        area = min(window_size[0], grid_size[0]) * min(window_size[1], grid_size[1])
        window = slot_of_token(*grid_size, window_size, q.device) // area
        outside = window[rows - prefix].unsqueeze(-1) != window
        return (p.square() * distance.clamp_min(0) * outside).sum((1, 2))


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
            or a data loader. It is repeated until ``steps``.
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
    check_int("steps", steps)
    check_int("num_queries", num_queries)
    check_int("save_every", save_every)
    check_int("seed", seed, minimum=0)
    check_positive("lr", lr)
    attention = {n: m for n, m in routed_modules(model).items() if m.routing.router == "learned"}
    if not attention:
        raise ValueError(
            "model: has no learned router, expected one that went through route_attention(router='learned')"
        )
    routers = nn.ModuleDict({name.replace(".", "/"): m.routing for name, m in attention.items()})
    settings = {"steps": steps, "lr": lr, "num_queries": num_queries, "seed": seed}
    settings |= {name: repr(m.routing) for name, m in attention.items()}
    optimizer = torch.optim.Adam(routers.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[dict[str, float]] = []

    def save() -> None:
        if checkpoint is not None:
            state = {"routers": routers, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in state.items()}
            state |= {"history": history, "settings": settings}
            save_atomically(Path(checkpoint), lambda path: torch.save(state, path))

    frozen = {p: p.requires_grad for p in model.parameters()}
    training, teacher = {m: m.training for m in model.modules()}, _Teacher(num_queries)
    run = getattr(model, "forward_features", model)
    model.eval().requires_grad_(False)
    routers.requires_grad_(True)
    for module in attention.values():
        module.teacher = teacher
    names = {module: name for name, module in attention.items()}
    dtypes = {p: p.dtype for p in routers.parameters() if p.dtype.itemsize < 4}
    for parameter in dtypes:
        parameter.data = parameter.data.float()  # Adam does not train in half precision
    bar = tqdm(total=steps, desc="distil routers", disable=not progress)
    try:
        if checkpoint is not None and Path(checkpoint).exists():
            _resume(Path(checkpoint), settings, routers, optimizer, schedule, history)
            bar.update(len(history))
        batches = _repeat(images, skip=len(history))
        while len(history) < steps:
            optimizer.zero_grad(set_to_none=True)
            teacher.generator.manual_seed(seed + 1_000_003 * len(history))  # of the step: resuming changes nothing
            with torch.no_grad():
                run(next(batches))
            ratios = {names[m]: error / max(reference, 1e-30) for m, (error, reference) in teacher.errors.items()}
            wrong = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
            if wrong:
                raise ValueError(f"images: batch {len(history)} gives an error that is not finite in {wrong[0]}")
            optimizer.step()
            schedule.step()
            history.append(ratios)
            bar.update()
            bar.set_postfix(error_vs_mean_query=f"{sum(ratios.values()) / len(ratios):.3f}")
            if len(history) % save_every == 0 or len(history) == steps:
                save()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        bar.close()
        for module in attention.values():
            module.__dict__.pop("teacher", None)
        for parameter, requires_grad in frozen.items():
            parameter.requires_grad_(requires_grad)
        optimizer.zero_grad(set_to_none=True)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        for module, mode in training.items():
            module.training = mode
    return history


def _repeat(images: Iterable[Tensor], skip: int):
    count = 0
    while True:
        before = count
        for batch in images:
            count += 1
            if count > skip:
                yield batch
        if count == before:
            raise ValueError("images: expected an iterable of batches that starts over, got none (left)")


def _resume(path: Path, settings: dict, routers: nn.Module, optimizer, schedule, history: list) -> None:
    try:
        state = torch.load(path, weights_only=True)
        saved, own, before = state["routers"], routers.state_dict(), state["settings"]
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
            raise KeyError(f"its layers are {sorted({k.split('.')[0] for k in saved})}")
    except (RuntimeError, KeyError, EOFError, OSError, TypeError, AttributeError, UnpicklingError) as error:
        raise ValueError(f"checkpoint: {path} does not belong to these routers or is damaged: {error}") from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(f"{name}: expected that of the checkpoint {path}, {before.get(name)}, got {value}")
    routers.load_state_dict(saved)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    history += state["history"]
