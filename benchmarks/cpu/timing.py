"""Rounds in which all variants of a case take turns, and the record of them."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.measure import PASSES, Timing, attempt

from .cases import SPEED, Case
from .memory import probe


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, high = Timing(values).quartiles
    return {"median": statistics.median(values), "q1": low, "q3": high}


class Timer:
    """Measures a case within a given time.

    Args:
        fewest: rounds that every variant has, whatever the time.
        most: rounds that none exceeds.
    """

    def __init__(self, fewest: int = 3, most: int = 60):
        self.fewest, self.most = fewest, most

    def once(self, name: str, call: Callable) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def probe(self, case: Case, variant: str, what: str, threads: int, limit: float) -> dict:
        """See :func:`~benchmarks.cpu.memory.probe`."""
        return probe(case, variant, what, threads, limit)

    def rounds(
        self, calls: dict[str, Callable], until: float
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of every call of each, and why some failed; one call of each goes before to warm
        up."""
        cost, times, failed = {}, {}, {}

        def turn(name: str, kept: list[float]) -> None:
            seconds, why = attempt(lambda: self.once(name, calls[name]))
            if why is not None:
                failed[name] = why
                times.pop(name, None)
                return
            cost[name] = seconds
            kept.append(seconds)

        # to warm up
        for name in calls:
            times[name] = []
            turn(name, [])

        # round by round, as many as the time allows
        slow = (until - time.monotonic()) / 20
        for done in range(self.most):
            now = list(times)
            if done >= self.fewest:
                # a slow one would leave the others few rounds; unless it is what the only other one
                # is compared with
                quick = [name for name in now if cost[name] <= slow]
                now = quick if len(quick) > 1 else now
                if not now or time.monotonic() + sum(cost[name] for name in now) > until:
                    break
            for name in now:
                turn(name, times[name])
        return times, failed

    def measure(
        self, case: Case, what: str, seconds: float, progress: Callable[[str], None] = print
    ) -> dict:
        """The record of a case in one pass.

        Args:
            case, what: which.
            seconds: for everything, memory too.
            progress: told of every variant that is begun.
        """
        until, before = time.monotonic() + seconds, torch.get_num_threads()
        threads, makers, ratios = case.threads or before, case.makers(), case.ratios()
        mine = {ours for _, ours, _ in ratios}
        found, cost, failed = (
            {name: {"note": case.unfit(name, what), "peak_bytes": None} for name in makers},
            {},
            {},
        )

        # memory, each in a process of its own
        for name, entry in found.items() if case.probed else ():
            if entry["note"] is not None:
                continue
            progress(f"{name}, memory")
            seen = self.probe(case, name, what, threads, max(2.0, seconds / 2))
            entry |= {"peak_bytes": seen.get("peak_bytes"), "note": seen.get("too_long")}
            cost[name] = seen.get("seconds", 0.0)
            if "failed" in seen:
                failed[name] = seen["failed"]

        # what does not fit the time is left out
        left = max(
            until - time.monotonic(), seconds / 2
        )  # what starting processes took is not for the peers to pay
        for name in cost.keys() - mine:
            # the warm-up counts for nothing: this one was slow, all its memory came fresh from the
            # system
            if self.fewest * cost[name] > left:
                found[name]["note"] = (
                    f"{self.fewest} rounds do not fit the time: one call took {cost[name]:.1f} s"
                )

        # rounds of calls, in turns
        progress("rounds")
        torch.set_num_threads(threads)
        try:
            open_ = [
                name
                for name, entry in found.items()
                if entry["note"] is None and name not in failed
            ]
            calls = {name: makers[name]()[what] for name in open_}
            times, more = self.rounds(calls, until)
            errors = {name: case.error(calls[name]) for name in times if what == PASSES[0]}
        finally:
            torch.set_num_threads(before)

        # what was found
        failed |= more
        for name, raw in times.items():
            found[name] |= {**spread(raw), "raw": raw, "error": errors.get(name)}
            found[name]["predicted"] = case.predicted(name, what, threads)
        for name, why in failed.items():
            found[name]["note"] = f"failed: {why}"
        return {
            "group": case.group,
            "case": str(case),
            "pass": what,
            "threads": threads,
            "variants": found,
            "ratios": [ratio for one in ratios if (ratio := _ratio(*one, times))],
            "failed": sorted(mine & set(failed)),
        }


def _ratio(kind: str, ours: str, other: str, times: dict[str, list[float]]) -> dict | None:
    """Of each round, where both were measured."""
    if not times.get(ours) or not times.get(other):
        return None
    pairs = zip(times[ours], times[other], strict=False)
    values = [theirs / own if kind == SPEED else own / theirs for own, theirs in pairs]
    return {"kind": kind, "ours": ours, "other": other, **spread(values), "rounds": len(values)}
