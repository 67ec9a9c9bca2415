"""What a network is for, with routed attention in place of its own.

    python -m benchmarks.tasks             # half an hour on two cores; --resume goes on
    python -m benchmarks.tasks --quick     # a smaller map and one picture of each kind, two minutes

DINOv2's ViT-S/14, whose patch tokens are asked for four things, and a consistency UNet that makes a
picture in four steps (see ``examples``). Nothing is trained or chosen with routed attention: heads
and centres come from full attention's tokens.

- segments: a linear probe tells from which of eight pictures each patch of a mosaic is. It has
  learned on their other halves.
- matches: the nearest token in another view of the scene lies within a patch of where it should,
  or within a tenth of the picture.
- salient: intersection over union with full attention's map, by the decoder that came with the
  weights.
- clusters: patches in the same cluster as with full attention.

Each row is written at once to ``tasks_cpu.jsonl``; ``tasks_cpu.md`` is made from it.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from benchmarks.rivals.__main__ import default_photos
from benchmarks.rivals.clusters import svg_ear
from benchmarks.rivals.layer import Layer, Result
from benchmarks.rivals.networks import Network
from benchmarks.rivals.tokens import grouped, sampled, todo, window_only
from benchmarks.rows import Rows
from support import dinov2, terrain
from support.command_line import UserError, at_least, exit_status
from support.photos import find_photos

from . import report, scenes, scores
from .sampling import denoised

TASKS = ("segments", "views", "denoise")
KEY = ("task", "size", "input", "method")
BY_LAYER = "sampled in two layers, then grouped, 1/10"  # of a ViT
Row = Callable[[str], dict[str, float]]
"""Measures a way on one input."""


class Way(NamedTuple):
    """A method of :mod:`benchmarks.rivals`, and the share of the keys that a query has."""

    call: Callable[[Layer, float], Result]
    keys: Callable[[int], float]
    first: Callable[[Layer, float], Result] | None = None  # in the first two attentions

    def attend(self, number: int, layer: Layer) -> Tensor:
        call = self.first if self.first is not None and number < 2 else self.call
        return call(layer, self.keys(layer.tokens)).out


def rounded(layer: Layer, share: float) -> Result:
    """Full attention in bfloat16: what rounding alone changes."""
    q, k, v = (x.bfloat16().unsqueeze(0) for x in layer.qkv)
    out = scaled_dot_product_attention(q[:, :, layer.prefix :], k, v, scale=layer.scale)
    return Result(out[0].to(layer.q.dtype))


WAYS = {
    report.FULL: None,
    "full, bfloat16": Way(rounded, lambda n: 1.0),
    # a window of 16, 1/16 of the keys, and 64 probes
    "sampled, the default": Way(partial(sampled, window=16), lambda n: 1 / 16 + (256 + 64) / n),
    "sampled, window 8, 1/10": Way(partial(sampled, window=8), lambda n: 1 / 10),
    "sampled, 1/4": Way(partial(sampled, window=16), lambda n: 1 / 4),
    "grouped, 1/10": Way(grouped, lambda n: 1 / 10),
    BY_LAYER: Way(grouped, lambda n: 1 / 10, first=partial(sampled, window=14)),
    "SVG-EAR, 1/10": Way(svg_ear, lambda n: 1 / 10),
    "window only, 1/10": Way(window_only, lambda n: 1 / 10),
    "ToDo, 1/9": Way(todo, lambda n: 1 / 9),
}
"""What is compared: window, routed keys and probes count."""


def attend(way: str) -> Callable[[int, Layer], Tensor] | None:
    return None if WAYS[way] is None else WAYS[way].attend


class Pictures:
    """DINOv2 and its heads, at one size."""

    def __init__(self, cache_at: Path, side: int, photos: list[Path], mosaics: int):
        self.side, self.columns = side, side // dinov2.PATCH
        self.photos = {path.stem: path for path in photos}
        self.mosaics = mosaics
        model, self.decoder = dinov2.load(cache_at)
        self.net = Network(
            "DINOv2", self.columns**2, 1, lambda x: x, lambda x: dinov2.features(model, x)
        )

    def tokens(self, image: Tensor, way: str = report.FULL) -> Tensor:
        """(N, C)"""
        return self.net.outputs(image, attend(way))[0]

    @cached_property
    def probe(self) -> scores.Probe:
        """What tells the pictures of a mosaic apart, learned on full attention's tokens."""
        learned = [scenes.mosaic(self.side, seed, half=0) for seed in range(2 * self.mosaics)]
        tokens = torch.cat([self.tokens(image) for image, _ in learned])
        return scores.Probe(tokens, torch.cat([labels for _, labels in learned]))

    def segments(self, name: str) -> Row:
        """On a mosaic: how many of its patches are told, and how many as by full attention."""
        image, labels = scenes.mosaic(self.side, 100 + int(name), half=1)
        told = self.probe(self.tokens(image))

        def row(way: str) -> dict[str, float]:
            found, known = self.probe(self.tokens(image, way)), labels >= 0
            return {
                "segments": scores.agreement(found[known], labels[known]),
                "segments_alike": scores.agreement(found, told),
            }

        return row

    def views(self, name: str) -> Row:
        """On two views of a scene: what matches, and what the first one's tokens say."""
        if name == "stereo":
            pair = scenes.stereo(self.side)
        else:
            pair = scenes.turned(self.photos[name], self.side)
        full = [self.tokens(x) for x in (pair.first, pair.second)]
        salient, centres = self.salient(full[0]), scores.clusters(full[0])
        _, nearest = scores.matched(*full, pair.truth, self.columns)

        def row(way: str) -> dict[str, float]:
            one, other = full
            if way != report.FULL:
                one, other = (self.tokens(x, way) for x in (pair.first, pair.second))
            away, found = scores.matched(one, other, pair.truth, self.columns)
            near = [torch.cdist(x, centres).argmin(-1) for x in (full[0], one)]
            return {
                "matches": (away <= 1).double().mean().item(),
                "matches_near": (away <= self.columns / 10).double().mean().item(),
                "matches_alike": scores.agreement(found, nearest),
                "salient": scores.overlap(self.salient(one), salient),
                "clusters": scores.agreement(*near),
            }

        return row

    def salient(self, tokens: Tensor) -> Tensor:
        """(side, side) in [0, 1]"""
        features = tokens.mT.view(1, -1, self.columns, self.columns)
        with torch.inference_mode():
            return self.decoder(features, (self.side, self.side))[0, 0]


def denoise(net: Network, name: str) -> Row:
    """On a noise: the picture after all steps."""
    full = net.outputs(name)
    return lambda way: {"psnr": net.compare(net.outputs(name, attend(way)), full)["psnr"]}


def study(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    stem = Path(args.output) / "tasks_cpu"
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(stem.with_suffix(".jsonl"), KEY, args.resume)

    # an input, by every way to attend
    def measure(task: str, size: int, name: str, begin: Callable) -> None:
        """The rows of an input that are not there yet."""
        of = {"task": task, "size": size, "input": name}
        skipped = (report.FULL, BY_LAYER) if task == "denoise" else ()
        ways = [way for way in args.ways if way not in skipped]
        left = [way for way in ways if not rows.has(**of, method=way)]
        row = begin(name) if left else None
        for way in tqdm(left, f"{task}, {name}"):
            rows.add(of | {"method": way} | row(way))
        report.write(rows.rows, stem)

    # all inputs of every task
    try:
        if {"segments", "views"} & set(args.tasks):
            pictures = Pictures(args.cache, args.vit_size, args.photos, args.mosaics)
        for number in range(args.mosaics) if "segments" in args.tasks else ():
            measure("segments", args.vit_size, str(number), pictures.segments)
        for name in [*pictures.photos, "stereo"] if "views" in args.tasks else ():
            measure("views", args.vit_size, name, pictures.views)
        if "denoise" in args.tasks:
            net, size = terrain.load(args.cache), args.unet_size
            unet = Network("UNet", (size // 4) ** 2, 0, int, lambda n: denoised(net, size, n))
            for seed in args.noises:
                measure("denoise", size, str(seed), lambda name: denoise(unet, name))
    except OSError as error:
        raise UserError(f"weights: {error}") from error
    print(report.write(rows.rows, stem), f"wrote {stem}.jsonl, .md", sep="\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    # what is compared
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--vit-size", type=int, default=1036, help="pixels, a multiple of 14")
    parser.add_argument("--unet-size", type=int, default=256, help="pixels, a multiple of 16")
    parser.add_argument("--images", nargs="*", default=[], help="photos or folders of photos")
    parser.add_argument("--mosaics", type=int, default=2, help="to test on; twice to learn from")
    parser.add_argument("--noises", nargs="+", type=int, default=list(range(8)), help="seeds")

    # how to run
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", help="folder, default benchmarks/results, with --quick runs/tasks"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="for the wheels")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --output")
    parser.add_argument("--quick", action="store_true", help="a small map, one of each")
    args = parser.parse_args(argv)

    # checks
    least = 52 * dinov2.PATCH  # a tenth of the keys are a window of 14, 64 probes and a few more
    if args.vit_size < least or args.vit_size % dinov2.PATCH:
        parser.error(f"--vit-size: expected a multiple of 14 from {least} on, got {args.vit_size}")
    if args.unet_size < 256 or args.unet_size % 16:
        parser.error(f"--unet-size: expected a multiple of 16 from 256 on, got {args.unet_size}")
    at_least(parser, args, 1, "mosaics", "threads")

    # what was not given
    args.photos = find_photos(args.images) if args.images else default_photos()
    if args.quick:
        args.vit_size, args.unet_size = min(args.vit_size, 770), min(args.unet_size, 256)
        args.photos, args.noises, args.mosaics = args.photos[:1], args.noises[:1], 1
    args.output = args.output or ("runs/tasks" if args.quick else "benchmarks/results")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(study, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
