"""Train a small model to write real digits pixel by pixel with routed autoregressive attention, and
sample from it.

    python examples/train_autoregressive.py             # 14 x 14 digits of 16 greys
    python examples/train_autoregressive.py --resume    # go on after an interruption
    python examples/train_autoregressive.py --quick     # see that it runs: seconds

Costs: some minutes on two CPU cores, and no download.

Leaves in --output: checkpoint.pt, metrics.jsonl, results.md, curve.png, samples.png. An older
run there is moved to --output/before.

An image is a sequence of pixels, row after row, and its first token says which digit. The windows
are one row: a layer's light branch sees this row and the one above, everything older only through
routed keys. The control has the light branch alone.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from colt5_vision import ConditionalRoutedAutoregressiveAttention
from support.checkpoints import load_checkpoint, save_checkpoint
from support.command_line import (
    Help,
    UserError,
    above_zero,
    at_least,
    exit_status,
    learning_rate,
    make_folder,
    set_aside,
    stop_request,
)
from support.digits import draw_digits, load_digits
from support.measure import medians, table

LEVELS, HELD_OUT, ROWS = 16, 500, 4
MODELS = ("routed", "window only")
QUICK = {"epochs": 2, "limit": 24, "size": 7, "dim": 16, "depth": 2, "keys": 7, "batch_size": 8}
LEAVES = ("checkpoint.pt", "metrics.jsonl", "results.md", "curve.png", "samples.png")
SAME = (
    "size",
    "dim",
    "depth",
    "keys",
    "queries",
    "batch_size",
    "limit",
    "seed",
)  # what a resumed run may not change


def sequences(size: int, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out digits as int64 symbols (N, 1 + size²): LEVELS + the digit, then the
    greys in [0, LEVELS)."""
    images, labels = load_digits()
    order = np.random.default_rng(seed).permutation(len(images))
    fold = 28 // size
    images = images.reshape(-1, size, fold, size, fold).mean((2, 4))  # of 28 x 28 pixels
    greys = np.minimum(images * LEVELS / 255, LEVELS - 1).round().astype(np.int64)
    symbols = np.concatenate([LEVELS + labels[:, None], greys.reshape(len(greys), -1)], 1)
    symbols = torch.from_numpy(symbols[order])
    return symbols[:-HELD_OUT][:limit], symbols[-HELD_OUT:][:limit]


class PixelModel(nn.Module):
    """Symbols (B, n) to the logits (B, n, LEVELS) of what comes next; ``routed=False`` has no heavy
    branch."""

    def __init__(self, size: int, dim: int, depth: int, keys: int, queries: float, routed: bool):
        super().__init__()
        self.size, self.routed = size, routed

        # a symbol, and its place
        self.symbol = nn.Embedding(LEVELS + 10, dim)
        self.row, self.column = nn.Embedding(size + 1, dim), nn.Embedding(size, dim)

        # layers; the one without a heavy branch keeps the light branch of the other
        heads = {
            "light_heads": 4,
            "light_dim_head": dim // 4,
            "heavy_heads": 4,
            "heavy_dim_head": dim // 4,
        }
        layers = []
        for _ in range(depth):
            attention = ConditionalRoutedAutoregressiveAttention(
                dim,
                num_heavy_tokens_q=None if queries == 1 else queries,
                num_heavy_tokens_kv=keys,
                num_routed_kv=2,
                light_window_size=size,
                rotary_emb=True,
                **heads,
            )
            attention = attention if routed else attention.light_attn

            feed_forward = [
                nn.RMSNorm(dim),
                nn.Linear(dim, 4 * dim),
                nn.GELU(),
                nn.Linear(4 * dim, dim),
            ]
            layers.append(nn.ModuleList([attention, nn.Sequential(*feed_forward)]))

        # logits, and fresh embeddings
        self.layers, self.norm = nn.ModuleList(layers), nn.RMSNorm(dim)
        self.head = nn.Linear(dim, LEVELS)
        for embedding in (self.symbol, self.row, self.column):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(
        self, symbols: Tensor, caches: list | None = None, position: int = 0
    ) -> tuple[Tensor, list | None]:
        """``caches`` of the layers: [] to begin, then what this returns; None: do without."""
        place = torch.arange(position, position + symbols.shape[1], device=symbols.device)
        x = self.symbol(symbols) + self.row(place // self.size) + self.column(place % self.size)
        fresh = []
        for i, (attention, feed_forward) in enumerate(self.layers):
            if not self.routed:
                x = x + attention(x, None)[0]
            elif caches is None:
                x = x + attention(x)
            else:
                out, cache = attention(x, cache=caches[i] if caches else None, return_cache=True)
                x = x + out
                fresh.append(cache)
            x = x + feed_forward(x)
        return self.head(self.norm(x)), None if caches is None else fresh

    def bits(self, symbols: Tensor) -> Tensor:
        """Mean bits a pixel of whole images (B, 1 + size²)."""
        return cross_entropy(
            self(symbols[:, :-1])[0].flatten(0, 1), symbols[:, 1:].flatten()
        ) / math.log(2)

    @torch.no_grad()
    def sample(
        self, digits: Tensor, seed: int, cached: bool = True, steps: int | None = None
    ) -> Tensor:
        """Greys (B, size²) of images of ``digits`` (B,), drawn pixel by pixel."""
        draws = torch.Generator().manual_seed(seed)
        symbols, caches = LEVELS + digits.unsqueeze(1), [] if cached else None
        for position in range(self.size**2 if steps is None else steps):
            given = symbols[:, -1:] if cached else symbols
            logits, caches = self(given, caches, position if cached else 0)
            drawn = logits[:, -1].float().softmax(-1).cpu().multinomial(1, generator=draws)
            symbols = torch.cat([symbols, drawn.to(symbols.device)], 1)
        return symbols[:, 1:]


class Run:
    """Both models, their optimizers, and how far they are.

    Attributes:
        losses: bits a pixel of every step so far, a pair (routed, window only).
        history: figures of the finished epochs.
    """

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.symbols, self.held_out = sequences(args.size, args.limit, args.seed)
        self.steps = len(self.symbols) // args.batch_size
        if not self.steps:
            raise UserError(
                f"--limit: expected at least a batch of {args.batch_size} digits, got "
                f"{len(self.symbols)}"
            )
        self.models, self.optimizers = {}, {}
        for name in MODELS:
            torch.manual_seed(args.seed)
            model = PixelModel(
                args.size, args.dim, args.depth, args.keys, args.queries, name == "routed"
            )
            self.models[name] = model = model.to(self.device)
            self.optimizers[name] = torch.optim.AdamW(
                model.parameters(), lr=args.lr, betas=(0.9, 0.98)
            )
        self.losses: list[list[float]] = []
        self.history: list[dict] = []

    def settings(self) -> dict:
        return {name: getattr(self.args, name) for name in SAME}

    def save(self, path: Path) -> None:
        state = {n: [self.models[n].state_dict(), self.optimizers[n].state_dict()] for n in MODELS}
        state |= {"losses": self.losses, "history": self.history}
        save_checkpoint(path, state | {"settings": self.settings()})

    def load(self, path: Path) -> None:
        def parts(state: dict) -> None:
            for name in MODELS:
                self.models[name].load_state_dict(state[name][0])
                self.optimizers[name].load_state_dict(state[name][1])

        state = load_checkpoint(path, self.settings(), parts)
        self.losses, self.history = state["losses"], state["history"]

    def step(self, epoch: int, step: int) -> None:
        """One step of both models, a function of (seed, epoch, step)."""
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.symbols))
        index = order[step * self.args.batch_size : (step + 1) * self.args.batch_size]
        symbols, bits = self.symbols[torch.from_numpy(index)].to(self.device), []
        rate = learning_rate(len(self.losses), self.args.epochs * self.steps, self.args.lr)
        for name, model in self.models.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate
            loss = model.bits(symbols)
            self.optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            self.optimizers[name].step()
            bits.append(loss.item())
        self.losses.append(bits)

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Bits a pixel of held-out digits."""
        parts = self.held_out.to(self.device).split(50)
        weights = torch.tensor([len(part) for part in parts]) / len(self.held_out)
        return {
            name: sum(w.item() * m.bits(p).item() for w, p in zip(weights, parts))
            for name, m in self.models.items()
        }

    def controls(self) -> dict[str, float]:
        """Bits a pixel of held-out digits without any model: counts of greys, over the image and at
        each pixel."""
        train, test = self.symbols[:, 1:], self.held_out[:, 1:]
        counts = torch.stack([(train == level).sum(0) for level in range(LEVELS)], 1).double()
        overall = (counts.sum(0) + 1).log2() - (counts.sum(0) + 1).sum().log2()
        # a prior of one image in all, spread as the greys are
        local = (counts + overall.exp2()).log2() - (counts.sum(1, keepdim=True) + 1).log2()
        pixel = torch.arange(test.shape[1]).expand(test.shape)
        return {
            "counts of greys": -overall[test].mean().item(),
            "counts at each pixel": -local[pixel, test].mean().item(),
        }

    def draw(self, path: Path) -> None:
        """A picture of digits that the routed model samples, one column each."""
        digits = torch.arange(10, device=self.device).repeat(ROWS)
        greys = self.models["routed"].sample(digits, self.args.seed).cpu()
        greys = greys.view(-1, self.args.size, self.args.size)
        images = (greys * 255 // (LEVELS - 1)).byte().numpy()
        draw_digits(path, images, scale=56 // self.args.size)


def train(args) -> None:
    # where
    if args.device == "auto":
        args.device = (
            torch.accelerator.current_accelerator().type
            if torch.accelerator.is_available()
            else "cpu"
        )
    elif args.device != "cpu" and not getattr(torch, args.device).is_available():
        raise UserError(f"--device: {args.device} is not available here")

    # start, or go on
    run, output = Run(args), Path(args.output)
    if args.resume:
        run.load(output / "checkpoint.pt")
        print(f"resuming after step {len(run.losses)} of {args.epochs * run.steps}")
    else:
        make_folder(output)
        set_aside(output, *LEAVES)

    # train
    with stop_request() as stop:
        while (epoch := len(run.history)) < args.epochs:
            start, done = time.perf_counter(), len(run.losses) - epoch * run.steps
            desc = f"epoch {epoch + 1}/{args.epochs}"
            for step in (bar := tqdm(range(done, run.steps), desc, run.steps, initial=done)):
                run.step(epoch, step)
                bar.set_postfix(bits=f"{np.mean(run.losses[-50:], 0)[0]:.3f}", refresh=False)
                if stop.is_set():
                    run.save(output / "checkpoint.pt")
                    raise KeyboardInterrupt

            # how good it is
            seconds = time.perf_counter() - start
            trained = dict(zip(MODELS, np.mean(run.losses[epoch * run.steps :], 0).tolist()))
            run.history.append(
                {"epoch": epoch + 1, "seconds": seconds, "train": trained, "held_out": run.judge()}
            )

            # what is kept, shown and told
            run.save(output / "checkpoint.pt")
            run.draw(output / "samples.png")
            report(run, output)
            told = ", ".join(
                f"{name} {bits:.3f}" for name, bits in run.history[-1]["held_out"].items()
            )
            print(f"epoch {epoch + 1}: held-out bits per pixel: {told}; {seconds:.0f} s")

    # at the end, what the cache saves
    report(run, output, line := speed(run))
    print(
        f"{line}\nwrote {output}/: checkpoint.pt, metrics.jsonl, results.md, curve.png, samples.png"
    )


def report(run: Run, output: Path, line: str = "") -> None:
    """metrics.jsonl, results.md, curve.png."""
    last, size = run.history[-1]["held_out"], run.args.size
    (output / "metrics.jsonl").write_text("".join(json.dumps(h) + "\n" for h in run.history))

    # the models
    parameters = {
        name: sum(p.numel() for p in model.parameters()) for name, model in run.models.items()
    }
    rows = [[name, "-", f"{bits:.3f}"] for name, bits in run.controls().items()]
    rows += [[name, f"{parameters[name]:,}", f"{last[name]:.3f}"] for name in reversed(MODELS)]

    # their epochs
    epochs = [
        [
            h["epoch"],
            *(f"{h[part][name]:.3f}" for name in MODELS for part in ("train", "held_out")),
            f"{h['seconds']:.0f}",
        ]
        for h in run.history
    ]
    columns = [f"{name}: {part}" for name in MODELS for part in ("train", "held out")]

    # both tables
    text = [
        "# Digits pixel by pixel\n",
        f"{size} x {size} pixels of {LEVELS} greys, held-out digits.\n",
        *table(["model", "parameters", "bits per pixel"], rows),
        "",
        *table(["epoch", *columns, "seconds"], epochs),
    ]
    (output / "results.md").write_text("\n".join([*text, "", line]) + "\n")

    # the curve
    axis = Figure(figsize=(6, 3.2), layout="constrained").subplots()
    at, colors = np.arange(1, len(run.losses) + 1) / run.steps, ("tab:orange", "tab:blue")
    for column, (name, color) in enumerate(zip(MODELS, colors)):
        axis.plot(at, np.array(run.losses)[:, column], color=color, lw=0.5, alpha=0.35)
        held_out = [h["held_out"][name] for h in run.history]
        axis.plot(
            [h["epoch"] for h in run.history],
            held_out,
            "o-",
            color=color,
            label=f"{name}, held out",
        )

    # what a model must beat
    axis.axhline(
        run.controls()["counts at each pixel"],
        color="0.5",
        ls=":",
        label="counting greys at each pixel",
    )
    axis.set(xlabel="epoch", ylabel="bits per pixel")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.figure.savefig(output / "curve.png", dpi=110)


def speed(run: Run) -> str:
    """What the cache saves at sampling."""
    model, digits = run.models["routed"], torch.arange(10, device=run.device)
    steps = min(64, run.args.size**2)
    calls = {
        cached: lambda cached=cached: model.sample(digits, 0, cached, steps)
        for cached in (True, False)
    }
    seconds = medians(calls, 3)
    rates = [10 * steps / seconds[cached] for cached in (True, False)]
    return (
        f"Sampling the first {steps} pixels of 10 digits at a time: {rates[0]:,.0f} pixels/s with "
        "the cache, "
        f"{rates[1]:,.0f} without. Keys a token sees beyond its window: {run.args.keys} of up to "
        f"{run.args.size**2}."
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument

    # the data
    add("--epochs", type=int, default=6, help="in all, those of a resumed run too")
    add("--limit", type=int, help="use only so many digits")
    add("--size", type=int, choices=(7, 14, 28), default=14, help="side of the pictures")

    # the model
    add("--dim", type=int, default=64, help="width of the model, a multiple of 8")
    add("--depth", type=int, default=3, help="layers")
    add("--keys", type=int, default=28, help="routed keys of each token")
    add("--queries", type=float, default=0.5, help="share of each row that queries them")

    # the run
    add("--batch-size", type=int, default=32, help="digits a step")
    add("--lr", type=above_zero, default=3e-3, help="highest learning rate")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    add("--seed", type=int, default=0, help="of weights, order and samples")
    add("--output", default="runs/autoregressive", help="folder for results")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    told = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--quick", action="store_true", help=f"{told}, where not given")

    # checks
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    at_least(parser, args, 1, "epochs", "limit", "dim", "depth", "keys", "batch_size")
    at_least(parser, args, 0, "seed")
    if args.dim % 8:
        parser.error(f"--dim: expected a multiple of 8, got {args.dim}")
    if not 0 < args.queries <= 1:
        parser.error(f"--queries: expected a share in (0, 1], got {args.queries}")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(train, parse(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
