"""A task that needs the whole map: each white square must be labelled with the class of the one digit, far away.

    python -m benchmarks.needle                                    # all variants, 3 seeds, 600 steps; hours on a CPU core
    python -m benchmarks.needle --resume                           # go on after an interruption, or add seeds and variants
    python -m benchmarks.needle --variants full sum-learned-eighth --seeds 0
    python -m benchmarks.needle --canvas 384                       # a larger map, clutter and squares in proportion
    python -m benchmarks.needle --quick                            # see that it runs: a minute, a few steps of each

A convolutional stem makes tokens of 8x8 pixels (24x24 on the canvas of 192x192), two blocks follow, identical but for
their attention, and each square's token is classified. The digit touches no square's window, so windows alone cannot
answer. "eighth" routes 1/8 of the map as keys, of which some fall into every window, where window attention has spread
the digit; "few" routes 4 of 576 (9 of 2304, 36 of 9216), fewer than there are windows: the column of windows reached
says how often a choice that does not look could know. "quarter" lets only 1/4 of the tokens query the routed keys.

All variants of a seed see the same canvases in the same order. Every (variant, seed) is written at once to
``needle_cpu.jsonl``; ``needle_cpu.json``, ``.md`` and ``.png`` are made from it. Seconds are of this process on the CPU.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm.auto import tqdm

from benchmarks.needle_task import CELL, WINDOW, Batch, NeedleTask
from colt5_vision import ConditionalRoutedImageAttention
from colt5_vision.ops import window_attention
from colt5_vision.store import save_atomically
from colt5_vision.visualize import record_routing
from examples.command_line import UserError, at_least_one, exit_status, learning_rate
from examples.measure import table

DIM, HEADS, DEPTH, STEM = 64, 2, 2, (16, 32)
BATCH, PEAK_RATE, WEIGHT_DECAY, POINTS = 16, 2e-3, 0.02, 10  # points of a curve
SETTINGS = ("canvas", "steps", "held_out")  # what the records of a study share


class Variant(NamedTuple):
    """An attention: ``kind`` "full", "window", or the fusion of a routed one, its router, keys and queries."""

    kind: str
    router: str | None = None
    keys: str | None = None
    queries: float | None = None

    def num_keys(self, tokens: int) -> int:
        """Keys that a token sees outside its window."""
        few = max(4, tokens // WINDOW**2 // 4)
        return {"full": tokens, "window": 0}.get(self.kind, few if self.keys == "few" else tokens // 8)

    def build(self, tokens: int) -> nn.Module:
        if self.router is None:
            return DenseAttention(self.kind == "window")
        return ConditionalRoutedImageAttention(
            DIM,
            num_heavy_tokens_q=self.queries,
            num_heavy_tokens_kv=self.num_keys(tokens),
            light_heads=HEADS,
            light_dim_head=DIM // HEADS,
            light_window_size=WINDOW,
            heavy_heads=HEADS,
            heavy_dim_head=DIM // HEADS,
            channel_first=False,
            fusion=self.kind,
            router=self.router,
        )


VARIANTS = {"full": Variant("full"), "window": Variant("window")} | {
    f"{fusion}-{router}-{keys}": Variant(fusion, router, keys)
    for keys in ("eighth", "few")
    for fusion in ("softmax", "sum")
    for router in ("learned", "random", "grid")
}
VARIANTS |= {f"{f}-learned-eighth-quarter": Variant(f, "learned", "eighth", 0.25) for f in ("softmax", "sum")}


class DenseAttention(nn.Module):
    """Pre-normalised attention over a map (B, H, W, C), of all tokens or inside windows."""

    def __init__(self, windowed: bool):
        super().__init__()
        self.windowed = windowed
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        self.to_qkv, self.to_out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        grid_size = tuple(x.shape[1:3])
        qkv = self.to_qkv(self.norm(x)).flatten(1, 2).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.windowed:
            out = window_attention(q, k, v, grid_size=grid_size, window_size=WINDOW)
        else:
            out = scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2)).unflatten(1, grid_size)


class SquareReader(nn.Module):
    """Canvases (B, 1, H, W) and the tokens (B, S) of squares to class logits (B, S, 10)."""

    def __init__(self, variant: Variant, tokens: int):
        super().__init__()
        widths, layers = (1, *STEM, DIM), []
        for i in range(3):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.GELU(),
            ]
        layers += [nn.Conv2d(DIM, DIM, 3, 1, 1, bias=False), nn.BatchNorm2d(DIM)]  # a token sees 31 pixels
        self.stem, self.stem_norm = nn.Sequential(*layers), nn.RMSNorm(DIM, eps=1e-6)
        self.attentions = nn.ModuleList(variant.build(tokens) for _ in range(DEPTH))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(DIM, eps=1e-6), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
            for _ in range(DEPTH)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        # At first a square has heard little of the digit beside what it is, a square. In an earlier form of this model,
        # normalised token by token, neither full attention nor either fusion learned anything in 600 steps; over the
        # batch what all squares share falls away.
        self.norm, self.head = nn.BatchNorm1d(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor, squares: Tensor) -> Tensor:
        x = self.stem(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.stem_norm(x)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            x = x + attention(x)
            x = x + feed_forward(x)
        x = x.flatten(1, 2)
        x = x.gather(1, squares.unsqueeze(-1).expand(-1, -1, DIM))
        return self.head(self.norm(x.flatten(0, 1))).unflatten(0, squares.shape)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch.labels.repeat_interleave(batch.squares.shape[1])
    return cross_entropy(model(batch.images, batch.squares).flatten(0, 1), labels)


@torch.no_grad()
def judge(model: SquareReader, task: NeedleTask, count: int) -> tuple[float, float | None]:
    """Share of held-out squares labelled right; and of canvases with a key of the last block in the digit's windows."""
    model.eval()
    right, reached, routed = [], [], any(hasattr(a, "kv_router") for a in model.attentions)
    for start in range(0, count, 50):
        batch = task.held_out(start, min(start + 50, count))
        if routed:
            with record_routing(model.attentions[-1]) as records:
                guesses = model(batch.images, batch.squares).argmax(-1)
            keys = next(r.routing.indices for r in records if r.name == "kv_router")
            reached.append(batch.near.gather(1, keys.flatten(1)).any(1))
        else:
            guesses = model(batch.images, batch.squares).argmax(-1)
        right.append(guesses == batch.labels.unsqueeze(1))
    model.train()
    return torch.cat(right).float().mean().item(), torch.cat(reached).float().mean().item() if routed else None


def run(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one variant; its record."""
    task, tokens = NeedleTask(args.canvas, seed), (args.canvas // CELL) ** 2
    torch.manual_seed(seed)
    model = SquareReader(VARIANTS[name], tokens)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=WEIGHT_DECAY)
    every, curve, losses, seconds = max(1, args.steps // POINTS), [], [], 0.0
    for step in (bar := tqdm(range(args.steps), f"{name}, seed {seed}", mininterval=5)):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, PEAK_RATE, floor=0.01)
        loss = loss_of(model, task.train(step, BATCH))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if (step + 1) % every == 0:
            curve.append((step + 1, judge(model, task, args.held_out // 5)[0]))
            bar.set_postfix(loss=f"{statistics.mean(losses[-every:]):.3f}", accuracy=f"{curve[-1][1]:.3f}")
    accuracy, reach = judge(model, task, args.held_out)
    return {
        "variant": name,
        "seed": seed,
        **{name: getattr(args, name) for name in SETTINGS},
        "tokens": tokens,
        "keys": VARIANTS[name].num_keys(tokens),
        "accuracy": accuracy,
        "reach": reach,
        "curve": curve,
        "loss": statistics.mean(losses[-every:]),
        "seconds_per_step": seconds / args.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def read(path: Path, args: argparse.Namespace) -> list[dict]:
    """The finished runs of this study; a line cut short is none."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name in SETTINGS:
            if record[name] != getattr(args, name):
                given = getattr(args, name)
                raise UserError(f"--{name.replace('_', '-')}: the runs in {path} have {record[name]}, got {given}")
        records.append(record)
    return records


def report(records: list[dict], stem: Path) -> list[str]:
    """``stem``.json, .md and .png; the lines of the table."""
    groups = {name: [r for r in records if r["variant"] == name] for name in VARIANTS}
    groups = {name: sorted(group, key=lambda r: r["seed"]) for name, group in groups.items() if group}
    summary = []
    for name, group in groups.items():
        scores = [r["accuracy"] for r in group]
        summary.append(
            {
                "variant": name,
                "keys": group[0]["keys"],
                "mean": statistics.mean(scores),
                "spread": statistics.stdev(scores) if len(scores) > 1 else None,
                "seeds": {r["seed"]: r["accuracy"] for r in group},
                "reach": None if group[0]["reach"] is None else statistics.mean(r["reach"] for r in group),
                "seconds_per_step": statistics.median(r["seconds_per_step"] for r in group),
                "parameters": group[0]["parameters"],
            }
        )
    first = records[0]
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    settings = {"machine": machine, "batch": BATCH, "rate": PEAK_RATE, **{name: first[name] for name in SETTINGS}}
    whole = {**settings, "summary": summary, "runs": [r for group in groups.values() for r in group]}
    save_atomically(stem.with_suffix(".json"), lambda part: part.write_text(json.dumps(whole, indent=1) + "\n"))

    header = ["variant", "keys", "accuracy", "seeds", "digit's windows reached", "CPU s/step", "steps/s", "parameters"]
    rows = [
        [
            s["variant"],
            f"{s['keys']} of {first['tokens']}",
            f"{s['mean']:.3f}" + ("" if s["spread"] is None else f" ± {s['spread']:.3f}"),
            ", ".join(f"{value:.3f}" for value in s["seeds"].values()),
            "–" if s["reach"] is None else f"{s['reach']:.2f}",
            f"{s['seconds_per_step']:.3f}",
            f"{1 / s['seconds_per_step']:.1f}",
            f"{s['parameters']:,}",
        ]
        for s in summary
    ]
    lines = table(header, rows)
    about = (
        f"Canvas {first['canvas']}x{first['canvas']}, {first['steps']} steps of batch {BATCH}, squares on "
        f"{first['held_out']} held-out canvases; chance is 0.1. Mean ± standard deviation over seeds. Digit's windows "
        "reached: share of the canvases in which a routed key of the last block lies in a window that the digit "
        f"touches. {machine}.\n"
    )
    text = "\n".join(["# Each square is labelled with the class of the one digit, far away\n", about, *lines, ""])
    save_atomically(stem.with_suffix(".md"), lambda part: part.write_text(text))
    save_atomically(stem.with_suffix(".png"), lambda part: draw(groups, part))
    return lines


def draw(groups: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against steps, a panel each for 1/8 of the keys and for few; full and window in both."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, keys in zip(figure.subplots(1, 2, sharey=True), ("eighth", "few")):
        for number, (name, group) in enumerate(groups.items()):
            variant = VARIANTS[name]
            if variant.keys not in (None, keys):
                continue
            curves = torch.tensor([r["curve"] for r in group])
            style = {"learned": "-", "random": ":", "grid": "-."}.get(variant.router, "--")
            line = {"color": f"C{number % 10}" if variant.router else {"full": "k", "window": "0.6"}[name], "ls": style}
            axis.plot(curves[0, :, 0], curves[..., 1].mean(0), label=name, **line)
            axis.fill_between(
                curves[0, :, 0], curves[..., 1].amin(0), curves[..., 1].amax(0), alpha=0.12, color=line["color"]
            )
        axis.set(xlabel="steps", ylim=(0, 1), title=f"keys: {keys}")
        axis.axhline(0.1, color="0.8", lw=0.8)
        axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("held-out accuracy (band: range over seeds)")
    figure.savefig(path, dpi=110, format="png")


def study(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    stem = Path(args.output) / ("needle_cpu" if args.canvas == 192 else f"needle_{args.canvas}_cpu")
    store = stem.with_suffix(".jsonl")
    records = read(store, args) if args.resume else []
    lines = "".join(json.dumps(record) + "\n" for record in records)  # without one that was cut short
    save_atomically(store, lambda part: part.write_text(lines))
    done = {(r["variant"], r["seed"]) for r in records}
    for seed in args.seeds:
        for name in args.variants:
            if (name, seed) in done:
                continue
            record = run(name, seed, args)
            with store.open("a") as file:
                file.write(json.dumps(record) + "\n")
            records.append(record)
            report(records, stem)
    print(*report(records, stem), f"wrote {stem}.jsonl, .json, .md, .png", sep="\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--canvas", type=int, choices=(192, 384, 768), default=192, help="side in pixels")
    parser.add_argument(
        "--held-out", type=int, default=1000, help="canvases to judge by, a fifth of them for the curve"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="folder, default benchmarks/results, with --quick runs/needle")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs in --output, do what is missing")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.seeds, args.held_out = min(args.steps, 3), args.seeds[:1], 50
    args.output = args.output or ("runs/needle" if args.quick else "benchmarks/results")
    at_least_one(parser, args, "steps", "held_out", "threads")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(study, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
