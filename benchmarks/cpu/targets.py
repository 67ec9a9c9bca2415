"""``python -m benchmarks.cpu --targets``: what the library is to reach on two cores, what it
reaches, and what SDPA's own kernel would allow.

Every target is a ratio of two calls that take turns. Quality is measured elsewhere: a faster
setting counts only at the error it had.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from tqdm.auto import tqdm

from benchmarks.diffusion import BATCH, CHANNELS, HEADS
from benchmarks.diffusion import layer as diffusion_layer
from benchmarks.gpu.attention import inputs, pairs
from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision import RoutedAttentionConfig, route_attention
from support.measure import table

from . import parts
from .cases import CPU
from .fit import calls_of
from .layers import dense_layer, fixed, ours, subsampled
from .report import machine

FORWARD, BACKWARD = PASSES
OPERATOR = Map(109, 6, 64, window=14)
GROUPED = (Map(109, 6, 64, share=20), Map(128, 8, 40, share=20))
Calls = tuple[Callable, Callable, Callable]
"""The library's, what it is compared to, and what no code around SDPA's kernel can do without."""
HOW = (
    "Three calls take turns: the library's, its peer, and what no code around SDPA's kernel can do "
    "without. That is the kernel on the same parts, and in a forward a copy of each window in and "
    "out. "
    "In the layer, weights of keys want gradients, which cost it eight features a head. "
    "*Ratio*: the median over rounds of the peer's time over the library's. *Ceiling*: the same "
    "over that of the parts, without routing and joins. *Of bound*: the ratio over that of the "
    "FLOPs, where the target is a part of it."
)


@dataclass(frozen=True)
class Target:
    """A ratio to reach.

    Attributes:
        name: what is compared.
        least: ratio.
        make: returns the calls.
        bound: ratio that the FLOPs allow; None: not counted.
    """

    name: str
    least: float
    make: Callable[[], Calls]
    bound: float | None = None


def bound_of(size: Map) -> float:
    """Pairs of full attention over those of window ∪ routed keys."""
    count = pairs(size, inputs(size, CPU, torch.float32)[2])
    return count["full"] / count["union"]


def attention(kind: str, what: str, size: Map = OPERATOR) -> Calls:
    calls = calls_of(size)
    return calls[kind][what], calls["full"][what], getattr(parts, kind)(size, what)


def todo(what: str) -> Calls:
    """The layer beside attention to as many keys, of every n-th row and column."""
    size = fixed(128, 1024)
    layer = ours(size, "softmax")
    x = torch.randn(size.batch, size.side, size.side, size.heads * size.head_dim)
    used = tuple(p for name, p in layer.attend.named_parameters() if "router" not in name)
    peer = subsampled(layer.attend, size, 1 / size.share)
    grad = torch.ones_like(x)
    mine = both(layer, [x], grad, tuple(layer.parameters()))[what]
    other = both(peer, [x], grad, used)[what]
    # projections and norm, which both have, and the attention of ours alone
    around = both(dense_layer(layer.attend, lambda q, k, v: q + k + v), [x], grad, used)[what]
    within = parts.layer(size, what)
    return mine, other, lambda: (around(), within())


def diffusion(side: int) -> Calls:
    """attn1 of Stable Diffusion 1.5, as ``benchmarks.diffusion`` has it."""
    x = torch.randn(BATCH, side * side, CHANNELS, generator=torch.Generator().manual_seed(1))
    routed = _inferring(diffusion_layer(side, RoutedAttentionConfig(min_tokens=1)), x)
    full = _inferring(diffusion_layer(side), x)
    size = Map(side, HEADS, CHANNELS // HEADS, batch=BATCH)
    return routed, full, parts.in_place_of_attention(full, parts.sampled(size, FORWARD))


def dinov2(pixels: int) -> Calls:
    """The whole model, with random weights: its time is the same."""
    name, how = "vit_small_patch14_dinov2", {"num_classes": 0, "dynamic_img_size": True}
    routed, full = (timm.create_model(name, **how).eval() for _ in range(2))
    settings = {"window_size": 14, "num_heavy_tokens_kv": 1 / 16, "min_tokens": 0}
    route_attention(routed, sample_size=(pixels, pixels), **settings)
    x = torch.randn(1, 3, pixels, pixels)
    full = _inferring(full, x)
    size = Map(pixels // 14, 6, 64, window=14)
    alone = parts.in_place_of_attention(full, parts.sampled(size, FORWARD))
    return _inferring(routed, x), full, alone


def _inferring(model: Callable, x: torch.Tensor) -> Callable:
    def run():
        with torch.inference_mode():
            return model(x)

    return run


def targets(quick: bool) -> list[Target]:
    """All, or at small sizes to see that they run."""
    # sizes
    size = Map(32, 2, 32, window=8) if quick else OPERATOR
    bound, small = bound_of(size), (16, 32) if quick else (64, 128)
    pixels = (224, 448) if quick else (1022, 1526)

    # the operator, as a share of its bound
    goals = [
        ("operator", "operator", FORWARD, 0.88),
        ("operator", "operator", BACKWARD, 0.80),
        ("operator with routing", "sampled", FORWARD, 0.75),
    ]
    found = [
        Target(
            f"{name}, {what}, {size}",
            share * bound,
            lambda kind=kind, what=what: attention(kind, what, size),
            bound,
        )
        for name, kind, what, share in goals
    ]

    # keys chosen by tile: one in twenty
    grouped = (size, Map(24, 2, 16, window=8)) if quick else GROUPED
    for one, least in zip(grouped, (2.5, 3.0)):
        name = f"grouped keys, routing included, {FORWARD}, {one}"
        found.append(Target(name, least, lambda one=one: attention("grouped", FORWARD, one)))

    # a layer, against a peer
    for what in PASSES:
        name = f"layer, softmax, to ToDo at equal keys, 128², {what}"
        found.append(Target(name, 0.75, lambda what=what: todo(what)))

    # pretrained layers and models, against full attention
    for side, least in zip(small, (4.0, 7.5)):
        name = f"attn1 of Stable Diffusion 1.5, {side}² latents"
        found.append(Target(name, least, lambda side=side: diffusion(side)))
    for side, least in zip(pixels, (2.3, 4.2)):
        name = f"DINOv2 ViT-S, whole model, {side} px"
        found.append(Target(name, least, lambda side=side: dinov2(side)))
    return found


def measure(target: Target, budget: float) -> dict:
    """Ratios of rounds within a time, at least two and at most nine."""
    calls = target.make()
    for call in calls:
        call()
    rounds, begin = [], time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < 9 and time.perf_counter() - begin < budget):
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            rounds[-1].append(time.perf_counter() - start)
    ratios = [other / mine for mine, other, _ in rounds]
    ratio = statistics.median(ratios)
    return {
        "target": target.name,
        "least": target.least,
        "bound": target.bound,
        "ms": 1e3 * statistics.median(mine for mine, *_ in rounds),
        "ratio": ratio,
        "ratios": ratios,
        "ceiling": statistics.median(other / alone for _, other, alone in rounds),
        "met": ratio >= target.least,
    }


def _verdict(row: dict) -> str:
    if row["met"]:
        return "met"
    return "not met" if row["ceiling"] >= row["least"] else "not met, above the ceiling"


def markdown(rows: list[dict], about: dict) -> str:
    lines = [
        "# Targets on a CPU",
        "",
        "`python -m benchmarks.cpu --targets`. Not run on a GPU.",
        "",
    ]
    lines += [f"- cpu: {about['cpu']}, {about['threads']} threads", f"- torch: {about['torch']}"]
    lines += [f"- date: {about['date']}", "", HOW, ""]
    cells = [
        [
            row["target"],
            f"{row['ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{min(row['ratios']):.2f}–{max(row['ratios']):.2f}",
            f">= {row['least']:.3g}",
            f"{row['ratio'] / row['bound']:.0%}" if row["bound"] else "–",
            f"{row['ceiling']:.2f}",
            _verdict(row),
        ]
        for row in rows
    ]
    head = ["target", "ms", "ratio", "of rounds", "target", "of bound", "ceiling", "verdict"]
    return "\n".join(lines + table(head, cells)) + "\n"


def main(folder: Path, quick: bool) -> int:
    torch.manual_seed(0)
    rows, budget = [], 0.0 if quick else 20.0
    path, about = folder / f"targets_cpu{'_quick' * quick}.json", machine()
    folder.mkdir(parents=True, exist_ok=True)
    for target in tqdm(targets(quick), desc="targets"):
        rows.append(measure(target, budget))
        kept = {"machine": about, "rows": rows}
        path.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
        path.with_suffix(".md").write_text(markdown(rows, about))
    print(path.with_suffix(".md").read_text())
    return 0
