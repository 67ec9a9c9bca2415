"""``python -m benchmarks.gpu``: on a machine with a GPU, eight minutes at most, or two with
``--quick``; without one it measures nothing.

Each step runs in a process of its own within its time, so that a crash or a long compilation costs
that step alone.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from colt5_vision.ops import backend

from . import attention, correctness, report, routing
from .measure import FULL, QUICK, Sizes, Timer, attempt, check
from .sweep import sweep

STEPS: dict[str, Callable] = {
    "tests": correctness.tests,
    "opcheck": correctness.opcheck,
    "attention": attention.attention,
    "layer": attention.layer,
    "gates": routing.gates,
    "grouped": attention.grouped,
    "graphs": correctness.graphs,
    "compiled": correctness.compiled,
    "selection": routing.selection,
    "router": routing.router,
    "ceilings": attention.ceilings,
    "flex": attention.flex,
    "sanitizer": correctness.sanitizer,
    "sweep": sweep,
}
# seconds of each, what matters most first; what one leaves over, the later ones have
FULL_SECONDS = {
    "tests": 90, "opcheck": 25, "attention": 60, "layer": 35, "gates": 60, "grouped": 20,
    "graphs": 15, "compiled": 30, "selection": 20, "router": 20, "ceilings": 10, "flex": 50,
    "sanitizer": 45,
}  # fmt: skip
QUICK_SECONDS = {
    "opcheck": 20,
    "attention": 22,
    "layer": 17,
    "gates": 22,
    "selection": 12,
    "router": 12,
    "ceilings": 5,
}
SWEEP_SECONDS = 540


def run_steps(
    names: list[str], device: torch.device, sizes: Sizes, timer: Timer, keep: Callable[[dict], None]
) -> None:
    """Every record of every step to ``keep`` as it comes; a step that raises ends with a record
    that says so."""
    for name in names:
        _, why = attempt(
            lambda name=name: [keep({"step": name, **r}) for r in STEPS[name](device, sizes, timer)]
        )
        if why is not None:
            keep({"step": name, **check(f"step {name}", False, why)})
        timer.free()


def child(names: list[str], sizes: Sizes, records: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = Timer(device, sizes.seconds)
    with records.open("a") as file:

        def keep(record: dict) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()  # a step that is ended keeps what it had
            print(report.line(record), flush=True)

        run_steps(names, device, sizes, timer, keep)


def run_child(command: list[str], records: Path, seconds: float, names: list[str]) -> list[dict]:
    """Records of a process that runs these steps; one more if it did not end well."""
    # neither an interpreted kernel nor a backend chosen outside may pass for a measurement
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", backend.VARIABLE)
    }

    # the process, with an end
    start, text = time.monotonic(), None
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(max(1.0, seconds))
        if status != 0:
            text = f"its process ended with status {status}"
    except subprocess.TimeoutExpired:
        text = f"ended after its {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # with what it started: compilers, pytest's workers
            process.wait()

    # what it wrote, and what is missing
    lines = records.read_text().splitlines() if records.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    if text is not None:
        missing = [name for name in names if name not in {r["step"] for r in found}]
        name = f"step {' '.join(names)}" + (f" (nothing of {' '.join(missing)})" if missing else "")
        found.append(
            {
                "step": names[-1],
                **check(name, False, f"{text}, {time.monotonic() - start:.0f} s in all"),
            }
        )
        print(report.line(found[-1]), flush=True)
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few sizes, two minutes at most")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, metavar="NAME", help=f"steps to run: {', '.join(STEPS)}"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="launch configurations of the attention kernels, alone"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder")
    parser.add_argument("--commit", help="to record, where this copy is no git checkout")
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)  # of a child
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("No GPU here: nothing was measured, nothing was written.")
        return 1
    sizes, seconds = (QUICK, QUICK_SECONDS) if args.quick else (FULL, FULL_SECONDS)
    names = args.only or (["sweep"] if args.sweep else list(seconds))
    if args.records:
        child(names, sizes, args.records)
        return 0

    # a step that this run does not have by itself gets the time of a full run
    budget = FULL_SECONDS | {"sweep": SWEEP_SECONDS} | seconds
    # a quick run has no time to start many processes
    groups = [names] if args.quick else [[name] for name in names]
    suffix = "".join(f"_{name}" for name in ("sweep", "quick") if getattr(args, name))
    suffix += "_part" if args.only else ""  # never over a whole run's results
    found = {
        "machine": report.machine(torch.device("cuda", torch.cuda.current_device()), args.commit),
        "command": shlex.join(
            ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]
        ),
        "suffix": suffix,
        "records": [],
    }

    # after each process the whole report anew: a run that is ended leaves what it had
    begin, deadline = time.monotonic(), 0.0
    unfinished = args.output / f"gpu_unfinished{suffix}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for index, group in enumerate(groups):
        deadline += sum(budget[name] for name in group)
        file = unfinished / f"{index}.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu", "--records", str(file), "--only", *group]
        command += ["--quick"] if args.quick else []
        records = run_child(command, file, deadline - (time.monotonic() - begin), group)
        found["records"] += records
        found["targets"] = [] if names == ["sweep"] else report.targets(found["records"], sizes)
        found["seconds"] = time.monotonic() - begin
        paths = report.write(found, args.output)
    shutil.rmtree(unfinished)

    # what came out
    print(report.markdown(found), *(f"wrote {path}" for path in paths), sep="\n")
    failed = [record for record in found["records"] if record["failed"]]
    print(f"{len(failed)} failed" + "".join(f"\n  {report.line(record)}" for record in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
