"""``python -m benchmarks.cpu``: the library on a CPU beside its peers, ten minutes on two cores,
``--quick`` one.

Rounds are adapted to the time. Results go to ``cpu.json``, ``cpu.md`` and ``cpu.png``; while the
run goes on, and if it is interrupted, what was measured is in ``cpu_part.*``.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.gpu.measure import Map

from . import fit, plots, profile, report
from .attention import Attention
from .cases import Case
from .gates import Gates, Sharp
from .layers import Growth, Layer, fixed
from .selection import Selection
from .timing import Timer

# seconds of forward, and of forward + backward: how the time of a run is shared out
FULL: tuple[Case, ...] = (
    Gates((12, 18)),
    Gates((12, 18), eps=0.1),
    Sharp((4, 6)),
    Selection((2,)),
    Selection((3,), rows=1, n=512**2, k=512**2 // 16),
    Attention((8, 14), Map(64, 6, 64)),
    Attention((20, 60), Map(109, 6, 64, window=14)),
    Growth((40,)),
    Layer((8, 14), fixed(64, 1024)),
    Layer((16, 40), fixed(128, 1024)),
    Layer((70, 75), fixed(256, 1024)),
    Layer((45, 105), fixed(512, 1024)),
)
QUICK: tuple[Case, ...] = (
    Gates((5, 8)),
    Selection((1,)),
    Attention((5, 8), Map(64, 6, 64)),
    Growth((5,), sides=(64, 128, 256)),
    Layer((4, 7), fixed(64, 1024)),
    Layer((7,), fixed(128, 1024)),
)
FULL_SECONDS, QUICK_SECONDS = (
    545.0,
    43.0,
)  # the rest of ten minutes, or of one, is for imports and the picture


def run(
    cases: tuple[Case, ...], timer: Timer, seconds: float, keep: Callable[[Case, dict], None]
) -> None:
    """Every record to ``keep`` as it comes."""
    rows = [(case, what, own) for case in cases for what, own in case.passes.items()]
    begin, names = time.monotonic(), [list(case.makers()) for case, *_ in rows]
    with tqdm(
        total=sum(own for *_, own in rows), unit="s", bar_format="{l_bar}{bar}| {elapsed}"
    ) as bar:
        for index, (case, what, own) in enumerate(rows):
            left = seconds - (time.monotonic() - begin)
            share = own / sum(other for *_, other in rows[index:])
            step = own / (len(names[index]) + 1)

            def progress(text: str, label=f"{case.group} {case}, {what}", step=step) -> None:
                bar.set_description(f"{label}: {text}")
                bar.update(step)

            # a slow machine takes longer rather than lose the peers
            keep(case, timer.measure(case, what, max(left * share, own / 2), progress))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)

    # the rows
    parser.add_argument("--quick", action="store_true", help="few sizes, a minute")
    groups = list(dict.fromkeys(case.group for case in FULL))
    parser.add_argument(
        "--only", nargs="+", choices=groups, metavar="GROUP", help=f"of {', '.join(groups)}"
    )
    parser.add_argument(
        "--seconds", type=float, help="for all rows: more on a slow or a busy machine"
    )
    parser.add_argument(
        "--output", type=Path, help="folder: benchmarks/results; with --fit, runs/benchmarks"
    )

    # in place of them
    parser.add_argument(
        "--fit", action="store_true", help="in place of the rows, constants of the cost model"
    )
    parser.add_argument(
        "--targets", action="store_true", help="in place of the rows, what is to be reached"
    )
    parser.add_argument(
        "--profile", action="store_true", help="in place of the rows, where the time of a call goes"
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", metavar="N", help="with --profile: maps of N x N tokens"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=profile.PARTS, metavar="PART",
        help=f"with --profile: of {'; '.join(profile.PARTS)}",
    )  # fmt: skip

    # checks
    args = parser.parse_args(argv)
    args.output = args.output or Path("runs/benchmarks" if args.fit else "benchmarks/results")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {args.seconds}")
    if sum((args.fit, args.targets, args.profile, bool(args.only))) > 1:
        parser.error("--only, --fit, --targets, --profile: expected one of them")
    if (args.sides or args.parts) and not args.profile:
        parser.error("--sides, --parts: expected with --profile")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)

    # in place of the rows
    if args.fit:
        return fit.main(args.output / "costs.json", args.quick)
    if args.targets:
        from . import targets  # whole models: timm, diffusers

        return targets.main(args.output, args.quick)
    if args.profile:
        sides = args.sides or (profile.QUICK_SIDES if args.quick else profile.SIDES)
        name = "profile_cpu" + "_quick" * args.quick
        budget = 0.3 if args.quick else 3.0
        return profile.main(list(sides), args.parts or profile.PARTS, args.output, name, budget)

    # the rows, and the time of all
    cases, seconds = (QUICK, QUICK_SECONDS) if args.quick else (FULL, FULL_SECONDS)
    if args.only:
        every = sum(sum(case.passes.values()) for case in cases)
        cases = tuple(case for case in cases if case.group in args.only)
        seconds *= sum(sum(case.passes.values()) for case in cases) / every

    # written after each
    begin = time.monotonic()
    found = {
        "machine": report.machine(),
        "command": shlex.join(
            ["python", "-m", "benchmarks.cpu", *(sys.argv[1:] if argv is None else argv)]
        ),
        "seconds": 0.0,
        "complete": False,
        "growth": [],
        "rows": [],
    }
    name = (
        "cpu" + "_quick" * args.quick + ("_" + "_".join(args.only) if args.only else "")
    )  # never over a whole run
    part = args.output / f"{name}_part"

    def keep(case: Case, record: dict) -> None:
        found["rows"].append(record)
        if isinstance(case, Growth):
            found["growth"] += report.growth(case, record)
        found["seconds"] = time.monotonic() - begin
        report.write(found, part)

    try:
        run(cases, Timer(), args.seconds or seconds, keep)
        found["complete"] = True
    except KeyboardInterrupt:
        print(f"Interrupted: what was measured is in {part}.*")

    # tables and a picture
    if not found["rows"]:
        return 1
    paths = report.write(found, args.output / name if found["complete"] else part)
    plots.plot(found["rows"], paths[0].with_suffix(".png"))
    if found["complete"]:
        for path in args.output.glob(f"{part.name}.*"):
            path.unlink()
    print(
        paths[1].read_text(),
        *(f"wrote {path}" for path in [*paths, paths[0].with_suffix(".png")]),
        sep="\n",
    )
    failed = [
        f"{row['case']}, {row['pass']}: {name}" for row in found["rows"] for name in row["failed"]
    ]
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed or not found["complete"] else 0


if __name__ == "__main__":
    sys.exit(main())
