"""A training step beside another busy process, and alone, by how OpenMP's threads wait.

    python -m benchmarks.busy              # two minutes on two cores
    python -m benchmarks.busy --seconds 1  # one

The step is that of ``make demo``: ``colt5_vit_nano_patch8_192``, 16 images of 192 x 192. Each
setting of the environment has a process of its own, in turn, and the table gives the median of all
its steps. The Makefile's setting is the last but one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

SETTINGS = {
    "as torch comes": {},
    "freed memory kept": {
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
    },
    "threads sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
SETTINGS["sleep soon, memory kept"] = SETTINGS["freed memory kept"] | {"GOMP_SPINCOUNT": "1500"}
SETTINGS["one thread"] = {"OMP_NUM_THREADS": "1"}


def steps(seconds: float) -> list[float]:
    """Seconds of each training step of some seconds, three at least."""
    import timm
    import torch

    import colt5_vision.models  # noqa: F401

    torch.manual_seed(0)
    model = timm.create_model("colt5_vit_nano_patch8_192", num_classes=10)
    images, labels = torch.randn(16, 3, 192, 192), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> float:
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step(), step()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        times.append(step())
    return times


def measured(environment: dict[str, str], seconds: float) -> list[float]:
    """:func:`steps` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.busy", "--step", "--seconds", str(seconds)]
    out = subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout
    return [float(line) for line in out.split()]


def medians(rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each setting, the settings in turn."""
    times = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, environment in SETTINGS.items():
            times[name] += measured(environment, seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=3, help="of each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(*steps(args.seconds), sep="\n")
        return

    alone = medians(args.rounds, args.seconds)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = medians(args.rounds, args.seconds)
    finally:
        other.kill()
        other.wait()

    first = alone["as torch comes"]
    print("| setting | alone, s | beside a busy process, s | to the first, alone |")
    print("|---|---|---|---|")
    for name in SETTINGS:
        print(f"| {name} | {alone[name]:.3f} | {beside[name]:.3f} | {beside[name] / first:.2f} |")


if __name__ == "__main__":
    main()
