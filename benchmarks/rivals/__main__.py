"""The field's training-free attention and ours, in the same attentions of two real networks.

    python -m benchmarks.rivals                     # all methods; --resume goes on
    python -m benchmarks.rivals --methods "PISA 1" "ours, sampled, window 14" --densities 0.05
    python -m benchmarks.rivals --quick             # small maps, two minutes on one core

DINOv2's ViT-S/14 on photographs and a consistency UNet on noise (see ``examples``). Every single
attention on inputs it has under full attention, then whole networks with a method in all large
attentions. The first photograph and the first noise are for choosing, the others are not looked at
before. Sizes after the first: the last input, the first density, every third attention, and no
oracle. Each row is written at once to ``rivals_cpu.jsonl``; ``rivals_cpu.md`` and ``.png`` are made
from it.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.rows import Rows
from support.command_line import UserError, at_least, exit_status
from support.photos import find_photos, skimage_photo

from . import measure, networks, report
from .layer import Layer
from .methods import METHODS
from .networks import Network

KEY = ("network", "size", "input", "layer", "density", "method", "draw")


def single(net: Network, size: int, name: str, args, rows: Rows) -> None:
    """Every method in each attention of a forward with full attention."""

    def attend(number: int, layer: Layer) -> torch.Tensor:
        for density, method in cases if args.layers is None or number in args.layers else ():
            of = {"network": net.name, "size": size, "input": name, "layer": number}
            of |= {"density": density, "method": method, "draw": 0}
            if not rows.has(**of):
                row = measure.attention(METHODS[method], layer, density)
                row |= {"timed": METHODS[method].timed}
                if number == first:
                    row["flops"] = measure.flops(METHODS[method], layer, density)
                rows.add(of | row)
                bar.update()
        return layer.full

    cases = [
        (density, method)
        for density in args.densities
        for method in args.methods
        if METHODS[method].fits(net.tokens, density)
    ]
    first = min(args.layers or [0])
    with tqdm(desc=f"{net.name}, {name}, single attentions", unit="row") as bar:
        net.outputs(name, attend)


def whole(net: Network, size: int, name: str, args, rows: Rows) -> None:
    """Every method in all large attentions at once."""
    full = None
    cases = [
        (density, method, draw)
        for density in args.densities
        for method in args.methods
        if METHODS[method].fits(net.tokens, density)
        for draw in range(args.draws if METHODS[method].draws else 1)
    ]
    for density, method, draw in tqdm(cases, f"{net.name}, {name}, whole"):
        of = {"network": net.name, "size": size, "input": name, "layer": None}
        of |= {"density": density, "method": method, "draw": draw}
        if not rows.has(**of):
            full = net.outputs(name) if full is None else full
            rows.add(of | measure.network(METHODS[method], net, name, full, density, draw))


def study(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    stem = Path(args.output) / "rivals_cpu"
    stem.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(stem.with_suffix(".jsonl"), KEY, args.resume)
    photos = {path.stem: path for path in args.photos}
    try:
        for kind, size, inputs, how in runs(args):
            if kind == "DINOv2":
                net = networks.vit(args.cache, size, photos)
            else:
                net = networks.unet(args.cache, size)
            for name in inputs:
                for step in args.steps:
                    {"layers": single, "whole": whole}[step](net, size, name, how, rows)
                    report.write(rows.rows, stem)
    except OSError as error:
        raise UserError(f"weights: {error}") from error
    print(report.write(rows.rows, stem), f"wrote {stem}.jsonl, .md, .png", sep="\n")


def runs(args: argparse.Namespace) -> Iterator[tuple[str, int, list[str], argparse.Namespace]]:
    """Network, size, names of its inputs, and the arguments that hold there."""
    less = copy.copy(args)
    less.densities = args.densities[:1]
    less.methods = [method for method in args.methods if method != "oracle per query"]
    less.layers = args.layers or list(range(0, 12, 3))
    for kind in args.networks:
        if kind == "DINOv2":
            inputs, (first, *more) = [path.stem for path in args.photos], args.vit_size
        else:
            inputs, (first, *more) = [str(seed) for seed in args.noises], args.unet_size
        yield kind, first, inputs, args
        for size in more:
            yield kind, size, inputs[-1:], less


def default_photos() -> list[Path]:
    """One to choose by, one inside of a package that chose nothing here."""
    import sklearn

    return [
        skimage_photo("coffee.png"),
        Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg",
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    # what is compared
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--draws", type=int, default=1, help="of methods that draw, whole networks")
    parser.add_argument("--layers", nargs="+", type=int, help="single attentions; default: all")
    parser.add_argument("--networks", nargs="+", choices=("DINOv2", "UNet"), default=None)
    parser.add_argument("--steps", nargs="+", choices=("layers", "whole"), default=None)

    # on which inputs
    parser.add_argument(
        "--vit-size", nargs="+", type=int, default=[1036, 1526], help="pixels, multiples of 14"
    )
    parser.add_argument(
        "--unet-size", nargs="+", type=int, default=[256, 512], help="pixels, multiples of 16"
    )
    parser.add_argument("--images", nargs="*", default=[], help="photos or folders of photos")
    parser.add_argument("--noises", nargs="+", type=int, default=[91, 92], help="seeds")

    # how to run
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", help="folder, default benchmarks/results, with --quick runs/rivals"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="for the wheels")
    parser.add_argument("--resume", action="store_true", help="keep the rows in --output")
    parser.add_argument("--quick", action="store_true", help="small maps, a few layers")
    args = parser.parse_args(argv)

    # checks
    for density in args.densities:
        if not 0 < density <= 1:
            parser.error(f"--densities: expected shares in (0, 1], got {density}")
    for name, step in (("vit-size", 14), ("unet-size", 16)):
        for size in getattr(args, name.replace("-", "_")):
            if size < step or size % step:
                parser.error(f"--{name}: expected a multiple of {step}, got {size}")
    at_least(parser, args, 1, "draws", "threads")

    # what was not given
    args.networks = args.networks or ["DINOv2", "UNet"]
    args.steps = args.steps or ["layers", "whole"]
    args.photos = find_photos(args.images) if args.images else default_photos()
    if args.quick:
        args.vit_size, args.unet_size = [min(*args.vit_size, 518)], [min(*args.unet_size, 128)]
        args.photos, args.noises, args.densities = args.photos[:1], args.noises[:1], [0.25]
        args.layers = args.layers or [2]
    args.output = args.output or ("runs/rivals" if args.quick else "benchmarks/results")
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_status(study, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
