"""Training the routers of a swapped model, and nothing else, against its own full attention, layer by layer.

Shared by the swap-ins. An attention here is a module with ``routing``, a ``PretrainedRoutedAttention``, that calls its
``teacher``, where it has one, instead of it.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import scaled_dot_product_attention

from .checks import TokenCount, check_int, check_positive, token_count
from .ops import routed_window_attention
from .ops.autocast import without_autocast
from .ops.grid import window_of_token
from .pretrained import PretrainedRoutedAttention
from .store import save_atomically


def sampling_error(
    routing: PretrainedRoutedAttention, logits: Tensor, cost: Tensor, count: TokenCount | None = None
) -> Tensor:
    """(B,) expected squared error of the attention output when keys are sampled by ``logits``, up to a factor.

    A key sampled with probability π_j and weighted 1/π_j adds a variance of ``(1/π_j - 1) · cost_j``, where ``cost_j``
    is what a query's output loses without the key, squared and summed over queries (delta method of the ratio of sums).

    Args:
        logits, cost: (B, N).
        count: of routed keys; None: the routing's.
    """
    slots = token_count(
        "num_heavy_tokens_kv", routing.num_heavy_tokens_kv if count is None else count, logits.shape[-1]
    )
    gates = routing.gates(logits, slots, None).clamp_min(1e-12)
    return ((1 / gates - 1) * cost).sum(-1)


class Teacher:
    """Stands in for one routed attention: gives the full attention's output and trains the router on it."""

    def __init__(self, num_queries: int):
        self.num_queries = num_queries
        self.generator = torch.Generator()
        self.errors: dict[nn.Module, tuple[float, float]] = {}

    def __call__(
        self,
        attention: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        features: Tensor,
        key_mask: Tensor | None = None,
        window_size: tuple[int, int] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        num_heavy_tokens_q: TokenCount | None = None,  # every query tells what it needs
        **call,
    ) -> Tensor:
        if key_mask is not None:
            raise ValueError("attn_mask: distillation takes whole images, got a mask")
        routing = attention.routing
        window = routing.window_size if window_size is None else window_size
        out = self._full(window, q, k, v, **call)
        with without_autocast(q.device.type):
            cost = self._cost(window, q, k, v, out, **call)
        with torch.enable_grad(), without_autocast(q.device.type):
            logits = routing.logits(routing.probe(q, k, v, window_size=window, **call).importance, features)
            error = sampling_error(routing, logits, cost, num_heavy_tokens_kv).mean()
            base = (logits - routing.correct(features)).detach()
            reference = sampling_error(routing, base, cost, num_heavy_tokens_kv).mean()
            (error / reference.clamp_min(1e-30)).backward()
        self.errors[attention] = (error.item(), reference.item())
        return out

    @staticmethod
    def _full(window_size, q, k, v, *, grid_size, num_prefix_tokens=0, pair_bias=None, scale=None) -> Tensor:
        """Full attention, with nothing of size N x N."""
        if pair_bias is None:
            return scaled_dot_product_attention(q, k, v, scale=scale)
        every = torch.arange(grid_size[0] * grid_size[1], device=q.device).expand(q.shape[0], -1)
        call = {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens, "pair_bias": pair_bias, "scale": scale}
        return routed_window_attention(q, k, v, routed_indices=every, window_size=window_size, **call)

    def _cost(self, window_size, q, k, v, out, *, grid_size, num_prefix_tokens=0, pair_bias=None, scale=None) -> Tensor:
        """(B, N): sum over heads and sampled queries outside key j's window of ``(p_ij |v_j - o_i|)²``."""
        prefix, tokens = num_prefix_tokens, grid_size[0] * grid_size[1]
        rows = torch.randperm(tokens, generator=self.generator)[: self.num_queries].to(q.device) + prefix
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # half precision overflows unscaled
        query = q[:, :, rows].to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
        logits = query @ k.to(wide).mT
        if pair_bias is not None:
            every = torch.arange(k.shape[2], device=q.device)
            bias = pair_bias(rows.view(1, 1, 1, -1, 1), every.view(1, 1, 1, 1, -1))
            logits = logits + bias.squeeze(2)
        p = logits.softmax(-1)[..., prefix:]
        values, o = v[:, :, prefix:].to(wide), out[:, :, rows].to(wide)
        distance = values.square().sum(-1).unsqueeze(2) + o.square().sum(-1, keepdim=True) - 2 * o @ values.mT
        window = window_of_token(*grid_size, window_size, q.device)
        outside = window[rows - prefix].unsqueeze(-1) != window
        return (p.square() * distance.clamp_min(0) * outside).sum((1, 2))


def distill(
    model: nn.Module,
    attention: dict[str, nn.Module],
    run: Callable[[Any], Any],
    batches: Iterable,
    *,
    argument: str,
    settings: dict[str, Any],
    steps: int,
    lr: float,
    num_queries: int,
    seed: int,
    checkpoint: str | os.PathLike | None,
    save_every: int,
    progress: bool,
) -> list[dict[str, float]]:
    """Train the learned routers of ``attention``, by layer name, while ``run`` sends batches through ``model``.

    In a process group the processes' gradients are averaged, and the first one shows the bar and saves.

    Args:
        argument: what the caller calls ``batches``, for messages.
        settings: further ones by name that a checkpoint to resume must share, of plain types.

    Other arguments, return value and errors are those of ``distill_routers``.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("distill_routers needs tqdm: pip install tqdm") from error

    check_int("steps", steps)
    check_int("num_queries", num_queries)
    check_int("save_every", save_every)
    check_int("seed", seed, minimum=0)
    check_positive("lr", lr)
    routers = nn.ModuleDict({name.replace(".", "/"): m.routing for name, m in attention.items()})
    settings = settings | {"steps": steps, "lr": lr, "num_queries": num_queries, "seed": seed}
    settings |= {name: repr(m.routing) for name, m in attention.items()}
    optimizer = torch.optim.Adam(routers.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[dict[str, float]] = []
    rank = distributed.get_rank() if _several() else 0

    def save() -> None:
        if checkpoint is not None and rank == 0:
            state = {"routers": routers, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in state.items()}
            state |= {"history": history, "settings": settings}
            save_atomically(Path(checkpoint), lambda path: torch.save(state, path))

    frozen = {p: p.requires_grad for p in model.parameters()}
    training, teacher = {m: m.training for m in model.modules()}, Teacher(num_queries)
    model.eval().requires_grad_(False)
    routers.requires_grad_(True)
    for module in attention.values():
        module.teacher = teacher
    names = {module: name for name, module in attention.items()}
    dtypes = {p: p.dtype for p in routers.parameters() if p.dtype.itemsize < 4}
    for parameter in dtypes:
        parameter.data = parameter.data.float()  # Adam does not train in half precision
    bar = tqdm(total=steps, desc="distil routers", disable=not progress or rank > 0)
    try:
        if checkpoint is not None and Path(checkpoint).exists():
            _resume(Path(checkpoint), settings, routers, optimizer, schedule, history)
            bar.update(len(history))
        _start_alike(routers)
        rows = _repeat(batches, skip=len(history), argument=argument)
        while len(history) < steps:
            optimizer.zero_grad(set_to_none=True)
            teacher.errors.clear()
            # of the step and the process: resuming changes nothing
            teacher.generator.manual_seed(seed + 1_000_003 * len(history) + 7_919 * rank)
            with torch.no_grad():
                run(next(rows))
            if not teacher.errors:
                raise ValueError(f"{argument}: batch {len(history)} reached no map that is routed")
            ratios = {names[m]: error / max(reference, 1e-30) for m, (error, reference) in teacher.errors.items()}
            wrong = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
            if wrong:
                raise ValueError(f"{argument}: batch {len(history)} gives an error that is not finite in {wrong[0]}")
            _average_gradients(routers)
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


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


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


def _repeat(batches: Iterable, skip: int, argument: str):
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            if count > skip:
                yield batch
        if count == before:
            raise ValueError(f"{argument}: expected an iterable of batches that starts over, got none (left)")


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
