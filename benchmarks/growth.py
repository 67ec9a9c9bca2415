"""How time and memory grow with the map at a fixed number of routed keys:
``python -m benchmarks.growth``.

The operator, both layers and the swap from 64² to 512² tokens, forward and with backward: CPU time
of one thread, memory in processes of their own, and the slope of both over tokens. ``--million``
adds a layer of 64 channels on 1,024² tokens. Writes ``growth_cpu.*``.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.cpu.cases import CPU, Case
from benchmarks.cpu.layers import fixed
from benchmarks.cpu.memory import probe
from benchmarks.cpu.report import machine
from benchmarks.gpu.attention import inputs, routed_layer
from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision.ops import routed_window_attention
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import SampledAttention
from support.measure import table

PARTS = ("operator", "layer, softmax", "layer, sum", "swap, sampled", "swap, grouped")
SIDES, KEYS = (64, 128, 256, 512), 1024
MILLION = 1024  # its side
MOST = 1.05  # exponent over tokens
ROUNDS = 3
HOW = (
    "2 heads x 32 = 64 channels, batch 1, float32, window 16, 1,024 routed keys whatever the map. "
    "ms: CPU time of one thread, the fastest of rounds in which all sizes take turns. MiB: what a "
    "call adds at its peak to the resident memory of a process of its own. Exponent: the slope of "
    "their logarithm over that of the tokens, by least squares; "
    f"{MOST} is the most that is allowed."
)


@dataclass(frozen=True)
class Grown(Case):
    """A part at one size."""

    part: str
    size: Map

    group: ClassVar[str] = "growth"

    def tiny(self) -> "Grown":
        return replace(self, size=replace(self.size, side=2 * self.size.window, share=16))

    def makers(self):
        return {self.part: self.calls}

    def calls(self):
        """Both passes."""
        size = self.size
        if self.part.startswith("layer"):
            torch.manual_seed(0)
            layer = routed_layer(size, self.part.split()[-1], CPU, torch.float32)
            x = torch.randn(size.batch, size.side, size.side, size.heads * size.head_dim)
            return both(layer, [x], torch.ones_like(x), tuple(layer.parameters()))
        x, grad, routed = inputs(size, CPU, torch.float32)
        grid = {"grid_size": (size.side, size.side)}
        if self.part == "operator":
            call = grid | {"window_size": size.window, "routed_indices": routed}
            call["log_weights"] = torch.zeros(routed.shape)
            return both(lambda *x: routed_window_attention(*x, **call), x, grad)
        kind = SampledAttention if self.part == "swap, sampled" else GroupedAttention
        module = kind(window_size=size.window, num_heavy_tokens_kv=routed.shape[1])
        return both(lambda *x: module(*x, **grid), x, grad)


def slope(values: dict[int, float]) -> float:
    """Of log value over log tokens, by side."""
    tokens = [2 * math.log(side) for side in values]
    logs = [math.log(value) for value in values.values()]
    return statistics.linear_regression(tokens, logs).slope


def times(part: str, sizes: list[Map], what: str, rounds: int) -> dict[int, float]:
    """Seconds by side."""
    calls = {size.side: Grown((), part, size).calls()[what] for size in sizes}
    repeats: dict[int, int] = {}
    for side, call in calls.items():  # short calls more often: the fastest counts
        start = time.process_time()
        call()
        repeats[side] = max(1, min(5, round(0.5 / (time.process_time() - start))))
    found: dict[int, list[float]] = {side: [] for side in calls}
    for _ in range(rounds):
        for side, call in calls.items():
            for _ in range(repeats[side]):
                start = time.process_time()
                call()
                found[side].append(time.process_time() - start)
    return {side: min(values) for side, values in found.items()}


def memory(part: str, size: Map, what: str) -> float:
    """Bytes.

    Raises:
        RuntimeError: if the call fails, or the system does not tell.
    """
    seen = probe(Grown((), part, size), part, what, torch.get_num_threads(), 600.0)
    if not seen.get("peak_bytes"):
        raise RuntimeError(f"{part} at {size.side}², {what}: {seen}")
    return seen["peak_bytes"]


def record(part: str, what: str, sizes: list[Map], kind: str, rounds: int) -> dict:
    """A line of the table: ``kind`` is ``"ms"`` or ``"MiB"``."""
    if kind == "ms":
        values = {side: 1e3 * t for side, t in times(part, sizes, what, rounds).items()}
    else:
        values = {size.side: memory(part, size, what) / 2**20 for size in sizes}
    return {
        "part": part,
        "pass": what,
        "kind": kind,
        "values": values,
        "exponent": slope(values),
        "machine": machine(),
    }


def million() -> dict:
    """A layer, forward and backward, on 1,024² tokens."""
    size = fixed(MILLION, KEYS)
    x = 4 * size.tokens * size.heads * size.head_dim
    added = memory("layer, softmax", size, PASSES[1])
    return {"part": "million", "GiB": (added + x) / 2**30, "machine": machine()}


def markdown(rows: list[dict]) -> str:
    # about the run
    about = rows[-1]["machine"]
    lines = ["# Growth with the map", "", "`python -m benchmarks.growth --million`."]
    lines += ["Not run on a GPU.", ""]
    lines += [f"- cpu: {about['cpu']}, {about['threads']} threads", f"- torch: {about['torch']}"]
    lines += [f"- date: {about['date']}", "", HOW, ""]

    # exponents
    some = [row for row in rows if row["part"] != "million"]
    sides = sorted({int(side) for row in some for side in row["values"]})
    cells = [
        [
            row["part"],
            row["pass"],
            row["kind"],
            *(f"{row['values'][str(s)]:.4g}" if str(s) in row["values"] else "–" for s in sides),
            f"{row['exponent']:.3f}",
            "met" if row["exponent"] <= MOST else "**not met**",
        ]
        for row in some
    ]
    head = ["part", "pass", "unit", *(f"{side}²" for side in sides), "exponent", "verdict"]
    lines += table(head, cells)

    # a million tokens
    for row in rows:
        if row["part"] == "million":
            text = (
                f"A layer (`softmax`, 64 channels, 1,024 keys) on {MILLION}² = {MILLION**2:,} "
                f"tokens, forward and backward: {row['GiB']:.2f} GiB at the peak, its input "
                "included."
            )
            lines += ["", text]
    return "\n".join(lines) + "\n"


def keep(path: Path, new: dict) -> None:
    """Add a record to the file, in place of the one it repeats."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    new = json.loads(json.dumps(new))
    same = ("part", "pass", "kind")
    rows = [row for row in rows if any(row.get(k) != new.get(k) for k in same)] + [new]
    order = (*PARTS, "million")
    rows.sort(key=lambda r: (r.get("kind", ""), order.index(r["part"]), r.get("pass", "")))
    rows.sort(key=lambda r: r["part"] == "million")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(rows))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--kinds", nargs="+", choices=("ms", "MiB"), default=("ms", "MiB"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--million", action="store_true", help="1,024² tokens, too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    path = args.output / "growth_cpu.json"
    sizes = [fixed(side, args.keys) for side in args.sides]
    for kind in args.kinds:
        for part in args.parts:
            for what in PASSES:
                found = record(part, what, sizes, kind, args.rounds)
                keep(path, found)
                values = ", ".join(f"{value:.4g}" for value in found["values"].values())
                print(part, what, f"{values} {kind}, {found['exponent']:.3f}", flush=True)
    if args.million:
        found = million()
        keep(path, found)
        print(f"{MILLION}² tokens: {found['GiB']:.2f} GiB")
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
