"""A task that needs the whole map: each white square must be labelled with the class of the one
digit, far away.

    python -m benchmarks.needle             # all variants, 3 seeds, 1200 steps
    python -m benchmarks.needle --resume    # go on after an interruption, or add seeds, variants
    python -m benchmarks.needle --variants full sum-learned-eighth --seeds 0
    python -m benchmarks.needle --canvas 384 --start 192 --steps 60 --points 5 \
        --held-out 500 --seeds 0
    python -m benchmarks.needle --canvas 768 --start 192 --steps 4 --points 1 \
        --held-out 100 --seeds 0
    python -m benchmarks.needle --quick     # see that it runs: a minute, a few steps of each

Costs: two hours on two CPU cores. Leaves in --output: ``needle_cpu.json``, ``.md`` and ``.png``
(``needle_384_cpu``, ... of larger canvases), and ``needle_scale_cpu.png`` of all canvases there
are. Every (variant, seed) is a process of its own and written at once. Seconds are CPU seconds.

The digit touches no square's window, so windows alone cannot answer. "eighth" routes 1/8 of the map
as keys, of which some fall into every window, where window attention has spread the digit; "few"
routes 4 of 576 (9 of 2304, 36 of 9216), fewer than there are windows: the column of windows reached
says how often a choice that does not look could know. Routed attentions, random ones too, start
with a larger share of the map (``--widest``) and narrow to their own (``RoutingSchedule``), those
of "softmax" in turns with steps that have it all, those of "sum" late.

On larger canvases clutter and squares grow in proportion. With ``--start`` a run goes on with the
weights that the same variant and seed had after the smaller canvas (every run leaves them in
``--weights``), with its own keys and a third of the learning rate; its curve begins before the
first step. All variants of a seed see the same canvases in the same order.
"""

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from benchmarks.needle_model import VARIANTS, SquareReader, Variant
from benchmarks.needle_report import draw_scale, report
from benchmarks.needle_task import CELL, Batch, NeedleTask
from colt5_vision.store import save_atomically
from colt5_vision.visualize import record_routing
from support.command_line import (
    Help,
    UserError,
    at_least,
    exit_status,
    learning_rate,
)
from support.measure import added_memory

BATCH, PEAK_RATE, WEIGHT_DECAY = 16, 1e-3, 0.02
SETTINGS = ("canvas", "start", "steps", "held_out", "widest")  # what the records of a study share


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch.labels.repeat_interleave(batch.squares.shape[1])
    return cross_entropy(model(batch.images, batch.squares).flatten(0, 1), labels)


@torch.no_grad()
def judge(model: SquareReader, task: NeedleTask, count: int) -> tuple[float, float | None]:
    """Share of held-out squares labelled right; and of canvases with a routed key in the digit's
    windows."""
    model.eval()
    right, reached, routed = [], [], model.routed
    for start in range(0, count, 50):
        batch = task.held_out(start, min(start + 50, count))
        with record_routing(model) if routed else nullcontext([]) as records:
            guesses = model(batch.images, batch.squares).argmax(-1)
        right.append(guesses == batch.labels.unsqueeze(1))
        keys = [r.routing.indices.flatten(1) for r in records if r.name.endswith("kv_router")]
        if routed:
            reached.append(batch.near.gather(1, torch.cat(keys, 1)).any(1))
    model.train()
    return torch.cat(right).float().mean().item(), torch.cat(
        reached
    ).float().mean().item() if routed else None


def run(name: str, variant: Variant, seed: int, args: argparse.Namespace) -> dict:
    """Train one variant; its record. For a process of its own: memory is measured."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(seed)

    # the task, the model, and how it is trained
    task, tokens = NeedleTask(args.canvas, seed), (args.canvas // CELL) ** 2
    model = SquareReader(variant, tokens)
    schedule = None if args.start else variant.schedule(model, tokens, args.widest)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=WEIGHT_DECAY)
    peak = PEAK_RATE / 3 if args.start else PEAK_RATE
    every, curve, losses, keys, seconds = max(1, args.steps // args.points), [], [], [], []

    # a step, and a first one to measure
    def train(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, peak, floor=0.01)
        if schedule is not None:
            schedule.step(step / args.steps)
        keys.append(min(tokens, model.keys_now(variant.num_keys(tokens))))
        start = time.process_time()
        loss = loss_of(model, task.train(step, BATCH))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.process_time() - start)
        losses.append(loss.item())

    def first_step() -> None:
        twin = copy.deepcopy(model)  # what is measured leaves no trace in the training
        if schedule is not None:
            variant.schedule(twin, tokens, args.widest).step(0.0)
        loss_of(twin, task.train(0, BATCH)).backward()

    # the start
    if schedule is not None:
        schedule.step(0.0)  # takes a turn, as in all runs so far
    memory = added_memory(first_step)  # before anything larger has run
    if args.start:
        model.load_state_dict(
            torch.load(weights_of(name, seed, args.start, args), weights_only=True)
        )
        curve.append((0, judge(model, task, args.held_out // 5)[0], 0.0))

    # training, judged on the way and at the end
    for step in (bar := tqdm(range(args.steps), f"{name}, seed {seed}", mininterval=5)):
        train(step)
        if (step + 1) % every == 0:
            # judged with the keys it will be used with: a schedule holds in training mode only
            curve.append((step + 1, judge(model, task, args.held_out // 5)[0], sum(seconds)))
            bar.set_postfix(
                loss=f"{statistics.mean(losses[-every:]):.3f}", accuracy=f"{curve[-1][1]:.3f}"
            )
    accuracy, reach = judge(model, task, args.held_out)
    if args.weights:
        save_atomically(
            weights_of(name, seed, args.canvas, args),
            lambda part: torch.save(model.state_dict(), part),
        )

    # the record: settings, then what was found
    return {
        "variant": name,
        "seed": seed,
        **{name: getattr(args, name) for name in SETTINGS},
        "widest": None if schedule is None else args.widest,
        "narrowing": None if schedule is None else variant.narrowing,
        "tokens": tokens,
        "keys": variant.num_keys(tokens),
        "mean_keys": statistics.mean(keys),
        "accuracy": accuracy,
        "reach": reach,
        "curve": curve,
        "loss": statistics.mean(losses[-every:]),
        "seconds": sum(seconds),
        "seconds_per_step_at_last": statistics.median(seconds[-every:]),
        "added_mib": memory / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def weights_of(name: str, seed: int, canvas: int, args: argparse.Namespace) -> Path:
    return Path(args.weights) / str(canvas) / f"{name}-{seed}.pt"


def read(path: Path, variants: dict[str, Variant], args: argparse.Namespace) -> list[dict]:
    """The finished runs of this study."""
    try:
        records = json.loads(path.read_text())["runs"] if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} is no record of runs ({error!r})") from error
    for record in records:
        for name in SETTINGS:
            given = getattr(args, name)
            if record.get(name) != given and not (name == "widest" and record[name] is None):
                raise UserError(
                    f"--{name.replace('_', '-')}: the runs in {path} have {record.get(name)}, got "
                    f"{given}"
                )
        name, narrowed = record["variant"], record.get("narrowing")
        if name not in variants:
            raise UserError(
                f"--resume: {path} has runs of {name}, expected one of {', '.join(variants)}"
            )
        now = None if args.start else variants[name].narrowing
        if (narrowed and tuple(narrowed)) != now:
            raise UserError(
                f"--resume: {name} in {path} narrowed its keys by {narrowed}, now by {now}: "
                "remove the run"
            )
    return records


def records_of(
    variants: dict[str, Variant], args: argparse.Namespace, store: Path
) -> Iterator[list[dict]]:
    """Yield all records known so far, first those of ``store``, then as runs finish; who asks
    writes them there."""
    records = read(store, variants, args) if args.resume else []
    yield records

    # what is left to do, and whether it can be done
    done = {(r["variant"], r["seed"]) for r in records}
    wanted = [
        (name, seed) for seed in args.seeds for name in args.variants if (name, seed) not in done
    ]
    for name, seed in wanted if args.start else ():
        if not (path := weights_of(name, seed, args.start, args)).is_file():
            how = (
                f"python -m benchmarks.needle --canvas {args.start} --variants {name} --seeds "
                f"{seed}"
            )
            raise UserError(f"--start: no weights {path}; run {how} first")
    # Buffers of more than 32 MiB, as canvases of 768 need them, glibc fetches anew from the system
    # every time, and clearing their pages took two thirds of a step.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(1 << 40))

    # a process for each run
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(run, name, variants[name], seed, args) for name, seed in wanted]
        try:
            for future in as_completed(futures):
                records.append(future.result())
                yield records
        finally:
            for future in futures:
                future.cancel()  # after an error or an interruption do not start the rest


def study(args: argparse.Namespace) -> None:
    stem = Path(args.output) / ("needle_cpu" if args.canvas == 192 else f"needle_{args.canvas}_cpu")
    lines = []
    for records in records_of(VARIANTS, args, stem.with_suffix(".json")):
        lines = report(records, stem, SETTINGS) if records else []
    print(*lines, f"wrote {stem}.json, .md, .png, {draw_scale(stem.parent)}", sep="\n")


def parser_of(
    description: str, variants: dict[str, Variant], name: str = "needle"
) -> argparse.ArgumentParser:
    prog = f"python -m benchmarks.{name}"
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=Help)

    # what is trained, and for how long
    parser.add_argument(
        "--variants", nargs="+", choices=variants, default=list(variants), metavar="VARIANT"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument(
        "--canvas", type=int, choices=(192, 384, 768), default=192, help="side in pixels"
    )
    parser.add_argument(
        "--widest", type=float, default=1.0, help="share of the map that is routed at first"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=1000,
        help="canvases to judge by, a fifth of them for the curve",
    )

    # how to run
    parser.add_argument("--points", type=int, default=10, help="of the curve")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", type=int, default=2, help="processes, one run each")
    parser.add_argument(
        "--output", help="folder, default benchmarks/results, with --quick runs/needle"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished runs in --output, do what is missing",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed")
    parser.set_defaults(start=None, weights=None)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if not 0 < args.widest <= 1:
        parser.error(f"--widest: expected a share in (0, 1], got {args.widest}")
    if args.start and args.start >= args.canvas:
        parser.error(f"--start: expected a canvas smaller than {args.canvas}, got {args.start}")
    if args.quick:
        args.steps, args.seeds, args.held_out = min(args.steps, 3), args.seeds[:1], 50
    args.output = args.output or ("runs/needle" if args.quick else "benchmarks/results")
    at_least(parser, args, 1, "steps", "held_out", "points", "threads", "workers")
    return args


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, VARIANTS)
    parser.add_argument(
        "--start", type=int, choices=(192, 384), help="canvas whose weights to go on with"
    )
    parser.add_argument(
        "--weights",
        help="folder to leave weights in, default runs/needle_weights, with --quick --output",
    )
    args = parse(parser, argv)
    args.weights = args.weights or (args.output if args.quick else "runs/needle_weights")
    return exit_status(study, args, argv)


if __name__ == "__main__":
    sys.exit(main())
