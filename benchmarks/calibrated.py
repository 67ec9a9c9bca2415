"""A real pretrained ViT whose settings are chosen layer by layer on one photograph, and measured on
others:

    python -m benchmarks.calibrated                          # 1036 px: ten minutes on two cores
    python -m benchmarks.calibrated --size 518 --tolerance 0.1

DINOv2's ViT-S/14 (see ``examples/support/dinov2.py``). Beside it stand both routers with one
setting for all layers. Errors are relative to full attention's patch tokens. Times are medians of
whole forwards, routed and then full.
"""

import argparse
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.rivals.__main__ import default_photos
from colt5_vision import (
    RoutedAttentionReport,
    calibrate_routing,
    route_attention,
    unroute_attention,
)
from support import dinov2
from support.measure import medians, table
from support.photos import find_photos

ROUTED = {
    "sampled, window 14, keys 1/16": {"router": "sampled"},
    "grouped, window 14, keys 1/16": {"router": "grouped"},
}


def relative(out: Tensor, full: Tensor) -> float:
    return ((out - full).norm() / full.norm()).item()


def settings(report: RoutedAttentionReport) -> str:
    """How many layers have each setting."""
    found = Counter(
        "full attention" if one.config is None else str(one).split(", error")[0]
        for one in report.calibration.values()
    )
    return "; ".join(f"{count} layers {how}" for how, count in found.most_common())


def study(model: nn.Module, photos: dict[str, Tensor], tolerances: list[float], repeats: int):
    """Rows of the table, and what was chosen."""
    first = next(iter(photos.values()))

    # what is measured: errors of all photographs, the time of one, full attention around it
    def outputs() -> list[Tensor]:
        return [dinov2.features(model, x) for x in photos.values()]

    def seconds() -> float:
        return medians({"one": lambda: dinov2.features(model, first)}, repeats, warm_up=True)["one"]

    def measured(name: str, route: Callable[[], RoutedAttentionReport]) -> RoutedAttentionReport:
        report = route()
        errors = [f"{relative(out, exact):.4f}" for out, exact in zip(outputs(), full)]
        times = [seconds()]
        if report:
            unroute_attention(model)
        rows.append([name, *errors, f"{seconds() / times[0]:.2f}"])
        return report

    with torch.inference_mode():
        # one setting for all layers
        full, rows, chosen = outputs(), [], []
        for name, how in ROUTED.items():
            one = {"window_size": 14, "min_speedup": 0} | how
            measured(name, lambda one=one: route_attention(model, **one))

        # a setting for each
        for tolerance in tolerances:
            name = f"calibrated, tolerance {tolerance:g}"
            report = measured(
                name, lambda t=tolerance: calibrate_routing(model, [first], tolerance=t)
            )
            chosen.append(f"{name}: {settings(report)}.")
    return rows, chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=1036, help="pixels a side")
    parser.add_argument("--images", nargs="*", default=[], help="the first is calibrated on")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--repeats", type=int, default=3, help="of the timed forwards")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()

    paths = find_photos(args.images) if args.images else [*default_photos(), *find_photos([])]
    photos = {path.stem: dinov2.open_photo(path, args.size) for path in paths}
    rows, chosen = study(dinov2.load(args.cache)[0], photos, args.tolerance, args.repeats)

    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    header = ["attention", *photos, "speed-up of the whole forward"]
    header[1] += ", calibrated on"
    lines = [f"# DINOv2 ViT-S/14 at {args.size} px, settings chosen layer by layer", ""]
    lines += [f"{machine}, not run on a GPU. Relative error of the patch tokens.", ""]
    lines += [*table(header, rows), "", *chosen]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "calibrated.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
