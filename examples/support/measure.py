"""What the examples measure with, and write tables with."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def medians(calls: dict, repeats: int, warm_up: bool = False) -> dict[str, float]:
    """Seconds a call, taking turns so that a busy machine slows all of them alike."""
    for call in calls.values() if warm_up else ():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def added_memory(call: Callable) -> float:
    """Bytes by which a call raises the resident memory of this process at its peak; NaN but on
    Linux.

    For a process of its own: memory that an earlier call freed and the allocator kept would be used
        again unseen.
    """

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

    try:
        # the peak starts anew: loading has a higher one, and ru_maxrss would start with that of the
        # parent process
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except OSError:
        before = None
    call()
    return float("nan") if before is None else resident("VmHWM") - before


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
