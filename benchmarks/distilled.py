"""What training the routers brings, on inputs that none was trained on:

    python -m benchmarks.distilled            # half an hour on two cores
    python -m benchmarks.distilled --quick    # small sizes, to see that it runs

DINOv2's ViT-S/14 and the consistency UNet (see ``examples/support``). Routers are trained on small
inputs by :func:`colt5_vision.distill_routers`, and tried on other inputs, of that size and of a
larger one, with several draws of the keys each. Training resumes where it was interrupted.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.__main__ import default_photos
from colt5_vision import distill_routers, route_attention, routed_layers, unroute_attention
from support import dinov2, terrain
from support.measure import table
from support.photos import find_photos, skimage_photo

PHOTOS = ("chelsea.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png", "cell.png")
NOISES, OTHER_NOISES = range(10, 16), range(3)
SHARE = 1 / 16
ROUTERS = ("sampled", "learned", "grouped", "learned_grouped")
TILE = 16  # least side of what ``"grouped"`` chooses keys for
HEAD = ["network", "size", "router", "squared error of a layer", "error", "worst", "times as fast"]
HOW = (
    f"Keys 1/{1 / SHARE:g}. Windows of 14 (DINOv2) and 8 (UNet); tiles of at least {TILE} for the "
    "grouped routers. "
    f"DINOv2 is trained on {', '.join(PHOTOS)}, and tried on coffee, china, retina and Hubble's "
    f"deep field. The UNet is trained on the noises {NOISES[0]} to {NOISES[-1]}, and tried on "
    f"{OTHER_NOISES[0]} to {OTHER_NOISES[-1]}. "
    "Relative errors of the outputs, the geometric mean over inputs and draws, and the worst. "
    "*Squared error of a layer*: what is expected on the training inputs, over that before "
    "training. *Times as fast* as full attention, the whole forward, of one run."
)


@dataclass(frozen=True)
class Study:
    """A network, what its routers are trained on and tried on.

    Attributes:
        size: of the training inputs.
        routed: the module whose attention is routed.
        window: of the routers with windows.
        training: inputs of ``routed``.
        held_out: by size, calls that give the network's output on other inputs.
        error: of an output, beside that of full attention.
    """

    name: str
    size: int
    routed: nn.Module
    window: int
    training: list[Any]
    held_out: dict[int, list[Callable[[], Tensor]]]
    error: Callable[[Tensor, Tensor], float]


def vit(cache: Path, sizes: list[int]) -> Study:
    """Its patch tokens."""
    model = dinov2.load(cache)[0]

    def photos(paths: Iterable[Path], size: int) -> list[Tensor]:
        return [dinov2.open_photo(path, size) for path in paths]

    others = [*default_photos(), *find_photos([])]
    return Study(
        "DINOv2 ViT-S/14",
        sizes[0],
        model,
        14,
        photos(map(skimage_photo, PHOTOS), sizes[0]),
        {
            size: [lambda x=x: dinov2.features(model, x) for x in photos(others, size)]
            for size in sizes
        },
        lambda out, full: ((out - full).norm() / full.norm()).item(),
    )


def unet(cache: Path, sizes: list[int]) -> Study:
    """Its picture of a noise, in one step."""
    net, sigma = terrain.load(cache), terrain.SIGMA_MAX

    def picture(size: int, seed: int) -> Tensor:
        with torch.inference_mode():
            return net(terrain.noise(size, seed), sigma)

    with torch.no_grad():
        training = [net.inputs(terrain.noise(sizes[0], seed), sigma) for seed in NOISES]
    return Study(
        "UNet of terrain",
        sizes[0],
        net.unet,
        8,
        training,
        {
            size: [lambda size=size, seed=seed: picture(size, seed) for seed in OTHER_NOISES]
            for size in sizes
        },
        lambda out, full: ((out - full).square().mean().sqrt() / full.std()).item(),
    )


def timed(calls: list[Callable[[], Tensor]]) -> tuple[list[Tensor], float]:
    """What they return, and their seconds."""
    begin = time.perf_counter()
    return [call() for call in calls], time.perf_counter() - begin


def train(study: Study, steps: int, file: Path) -> str:
    """Squared error of a layer in the last round of the inputs, over that before training."""
    history = distill_routers(study.routed, study.training, steps=steps, checkpoint=file)
    last = [sum(step.values()) / len(step) for step in history[-len(study.training) :]]
    return f"{sum(last) / len(last):.2f}"


def rows_of(study: Study, args) -> list[list[str]]:
    rows, full = [], {size: timed(calls) for size, calls in study.held_out.items()}
    for router in ROUTERS:
        window = TILE if "grouped" in router else study.window
        how = {"router": router, "window_size": window, "num_heavy_tokens_kv": SHARE}
        route_attention(study.routed, min_tokens=args.min_tokens, **how)
        trained = "–"
        if router.startswith("learned"):
            name = f"{study.name.split()[0].lower()}_{study.size}_{router}_{args.steps}.pt"
            trained = train(study, args.steps, args.output / name)
        for size, calls in study.held_out.items():
            errors, seconds = [], 0.0
            for draw in range(args.draws):
                for layer in routed_layers(study.routed).values():
                    layer.attention.generator = torch.Generator().manual_seed(draw)
                outs, took = timed(calls)
                errors += map(study.error, outs, full[size][0])
                seconds += took
            mean = math.exp(sum(map(math.log, errors)) / len(errors))
            speed = f"{args.draws * full[size][1] / seconds:.2f}"
            cells = [trained, f"{mean:.2g}", f"{max(errors):.2g}", speed]
            rows.append([study.name, f"{size} px", f'`"{router}"`', *cells])
        unroute_attention(study.routed)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distilled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--draws", type=int, default=3, help="of the keys, for each input")
    parser.add_argument("--min-tokens", type=int, default=256, help="smaller maps are not routed")
    parser.add_argument("--vit-sizes", type=int, nargs="+", default=[518, 1036])
    parser.add_argument("--unet-sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.draws, args.vit_sizes, args.unet_sizes = 2, 1, [224], [64]

    args.output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(vit(args.cache, args.vit_sizes), args)
    rows += rows_of(unet(args.cache, args.unet_sizes), args)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ["# Trained routers on inputs that they were not trained on", ""]
    about = f"{machine}, not run on a GPU. {args.steps} steps of training, {args.draws} draws."
    lines += [f"{about} Maps of at least {args.min_tokens} tokens are routed.", "", HOW, ""]
    lines += table(HEAD, rows)
    (args.output / "distilled.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
