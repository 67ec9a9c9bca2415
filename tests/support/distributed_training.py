"""What tests/core/test_distributed.py runs in one process and in two: a small colt5_vit trained, in
many ways."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import timm
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import colt5_vision.models  # noqa: F401

PROCESSES, STEPS, SAVED, BATCH, CLASSES = 2, 12, 6, 8, 4
SUM = {"fusion": "sum", "num_heavy_tokens_q": 1 / 4}
TIMEOUT = timedelta(seconds=60)  # of one collective; the slowest takes milliseconds


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        parallel: ``"ddp"``, ``"fsdp"`` or ``"none"``: every process for itself, on its share of the
            batch.
        model: overrides of the model.
        accumulate: micro-batches a step; only the last one communicates.
        checkpointing: blocks run again in backward.
        bf16: parameters gathered, and computed with, in bfloat16 (``"fsdp"`` only).
    """

    parallel: str
    model: dict = field(default_factory=dict)
    accumulate: int = 1
    checkpointing: bool = False
    bf16: bool = False


RUNS = {
    "ddp": Run("ddp"),
    "ddp-sum": Run("ddp", SUM),
    "ddp-accumulate-checkpointing": Run("ddp", accumulate=2, checkpointing=True),
    "fsdp": Run("fsdp"),
    "fsdp-sum": Run("fsdp", SUM),
    "fsdp-accumulate-checkpointing": Run("fsdp", accumulate=2, checkpointing=True),
    "ddp-schedule": Run("ddp", {"routing_schedule": STEPS}, checkpointing=True),
    "fsdp-schedule": Run("fsdp", {"routing_schedule": STEPS}, checkpointing=True),
    "fsdp-bf16": Run("fsdp", bf16=True),
    "alone": Run("none"),
    "ddp-batch-norm": Run("ddp", {"stem": "conv"}),
}


def build(seed: int = 0, **overrides) -> nn.Module:
    """A colt5_vit of 36 tokens in windows of 4, cut off at the border; 4 keys and 9 feed-forward
    tokens are routed."""
    torch.manual_seed(seed)
    small = {
        "img_size": 48,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "stem": "patch",
        "num_classes": CLASSES,
    }
    return timm.create_model("test_colt5_vit", **{**small, **overrides})


def batches() -> list[tuple[Tensor, Tensor]]:
    """The fixed stream: noise, and in one quadrant the texture of the class."""
    generator = torch.Generator().manual_seed(0)
    textures = 2 * torch.randn(CLASSES, 3, 8, 8, generator=generator)
    stream = []
    for step in range(STEPS):
        x, y = (
            torch.randn(BATCH, 3, 48, 48, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        row, column = 24 * (step // 2 % 2), 24 * (step % 2)
        x[:, :, row : row + 24, column : column + 24] += textures[y].repeat(1, 1, 3, 3)
        stream.append((x, y))
    return stream


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)


def train(
    model: nn.Module, optimizer, stream, accumulate: int = 1, synchronise=lambda last: nullcontext()
) -> Tensor:
    """Loss of each step, before it, over this process's samples."""
    curve = []
    for x, y in stream:
        total = 0.0
        for i, (part, labels) in enumerate(zip(x.chunk(accumulate), y.chunk(accumulate))):
            with synchronise(i == accumulate - 1):
                loss = nn.functional.cross_entropy(model(part).float(), labels) / accumulate
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(total)
    return torch.stack(curve)


def sharded(model: nn.Module, bf16: bool = False) -> nn.Module:
    """FSDP2 as its documentation has it: each block a unit, the rest (stem, norm, head) with the
    root."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    cpu = init_device_mesh("cpu", (PROCESSES,))  # the default is an accelerator, where there is one
    for block in model.blocks:
        fully_shard(block, mesh=cpu, mp_policy=policy)
    return fully_shard(model, mesh=cpu, mp_policy=policy)


def parallelise(model: nn.Module, run: Run):
    """The module to call and the context of a micro-batch."""
    if run.parallel == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)  # find_unused_parameters is False
        return wrapped, lambda last: nullcontext() if last else wrapped.no_sync()
    if run.parallel == "fsdp":
        sharded(model, run.bf16)

        def synchronise(last: bool):
            model.set_requires_gradient_sync(last)
            return nullcontext()

        return model, synchronise
    return model, lambda last: nullcontext()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The plain state dict; of shards gathered on rank 0, empty elsewhere."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def shard_sizes(model: nn.Module) -> tuple[int, int]:
    """Elements of the parameters that this process holds, and of all."""
    held = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() for p in held), sum(p.numel() for p in model.parameters())


def own_share(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.chunk(PROCESSES)[rank], y.chunk(PROCESSES)[rank]) for x, y in batches()]


def averaged(curve: Tensor) -> Tensor:
    """Equal shares: the mean over the processes is the loss of the whole batch."""
    distributed.all_reduce(curve)
    return curve / PROCESSES


class Traffic(TorchDispatchMode):
    """Bytes of what each kind of collective carries: whole gradients, whole parameters."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._opname
            carried = args[
                name == "_reduce_scatter_base_"
            ]  # its first argument is the shard that comes out
            carried = [carried] if isinstance(carried, Tensor) else carried
            self.bytes[name] = self.bytes.get(name, 0) + sum(tensor.nbytes for tensor in carried)
        return function(*args, **(kwargs or {}))


def trained(run: Run, rank: int) -> dict:
    model = build(**run.model)
    if run.checkpointing:
        model.set_grad_checkpointing()
    call, synchronise = parallelise(model, run)
    optimizer, stream = optimizer_of(model), own_share(rank)
    curve = train(call, optimizer, stream[:-1], run.accumulate, synchronise)
    with Traffic() as traffic:
        curve = torch.cat([curve, train(call, optimizer, stream[-1:], run.accumulate, synchronise)])
    held = shard_sizes(model)
    model.eval()
    with torch.no_grad():
        logits = call(batches()[0][0])
    curve = averaged(curve)
    return {
        "curve": curve,
        "state": whole_state(model),
        "logits": logits,
        "held": held,
        "traffic": traffic.bytes,
    }


def resumed(rank: int, folder: str) -> Tensor:
    """The curve of FSDP2 that is saved by DCP half-way and goes on as another model, from other
    weights."""
    stream, curves = own_share(rank), []
    for seed, part in ((0, stream[:SAVED]), (1, stream[SAVED:])):
        model = sharded(build(seed))
        optimizer = optimizer_of(model)
        if seed:
            weights, moments = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        curves.append(train(model, optimizer, part))
        if not seed:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    return averaged(torch.cat(curves))


def worker(rank: int, folder: str) -> None:
    """One of the two processes; rank 0 writes ``results.pt``."""
    torch.set_num_threads(1)
    # a file to meet at: no port that another process could take in between
    meet = f"file://{folder}/rendezvous"
    distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=PROCESSES, timeout=TIMEOUT
    )
    try:
        results = {name: trained(run, rank) for name, run in RUNS.items()}
        results["resumed"] = {"curve": resumed(rank, str(Path(folder) / "dcp"))}
        if rank == 0:
            torch.save(results, Path(folder) / "results.pt")
    finally:
        distributed.destroy_process_group()


def hanging_worker(rank: int, folder: str) -> None:
    time.sleep(600 * rank)


def launch(work: Callable[[int, str], None], folder: Path, seconds: float) -> None:
    """Run ``work(rank, folder)`` in two processes.

    Raises:
        TimeoutError: if they are not done after ``seconds``; they are then dead.
        torch.multiprocessing.ProcessRaisedException: with the traceback of the one that failed.
    """
    # forked from a process that has imported this module and done nothing else: one import of torch
    # in place of two
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    context = torch.multiprocessing.start_processes(
        work, (str(folder),), PROCESSES, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1, grace_period=5):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"seconds: expected two processes to end within {seconds}, they run on"
                )
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
