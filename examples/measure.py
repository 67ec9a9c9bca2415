"""What the examples measure with, and write tables with."""

import statistics
import time


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


def table(header: list[str], rows: list[list]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
