"""Timing on a GPU, the sizes that are measured, and the records that every step yields."""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from colt5_vision.ops.backend import VARIABLE


@dataclass(frozen=True)
class Map:
    """A square map that attention works on."""

    side: int
    heads: int
    head_dim: int
    batch: int = 1
    window: int = 16
    share: int = 16  # one key of so many is routed

    @property
    def tokens(self) -> int:
        return self.side**2

    def __str__(self) -> str:
        shape = f"{self.side}x{self.side}, {self.heads} x {self.head_dim}, batch {self.batch}"
        return f"{shape}, window {self.window}, keys 1/{self.share}"


@dataclass(frozen=True)
class Sizes:
    maps: tuple[Map, ...]  # the first is the one that targets are about
    gates: tuple[tuple[int, int], ...]  # rows, n; the first likewise
    selection: tuple[int, ...]
    latency: int
    graph: Map
    compiled: tuple[
        tuple[int, int], ...
    ]  # heights and widths; a square one first would make dynamo hold all to be square
    seconds: float  # for one side-by-side comparison, warm-up aside
    dtype: torch.dtype = torch.bfloat16
    compile_backend: str = "inductor"
    most_selected: int = 8192


FULL = Sizes(
    maps=(
        Map(256, 24, 128),
        Map(64, 8, 64),
        Map(128, 8, 64),
        Map(64, 8, 40, batch=2),
        Map(128, 8, 80, batch=2),
    ),
    gates=((1, 65536), (8, 65536), (1, 1_000_000)),
    selection=(4096, 65536, 1_000_000),
    latency=65536,
    graph=Map(48, 8, 64),
    compiled=((36, 28), (40, 56)),
    seconds=2.0,
)
QUICK = Sizes(
    maps=(Map(256, 24, 128), Map(128, 8, 64)),
    gates=((1, 65536),),
    selection=(65536,),
    latency=65536,
    graph=Map(32, 4, 64),
    compiled=((36, 28), (40, 56)),
    seconds=0.5,
)


@dataclass
class Timing:
    """Milliseconds of each repeat, and bytes allocated at the peak of one call beyond what was
    there before it."""

    ms: list[float]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = (
            statistics.quantiles(self.ms, n=4, method="inclusive")
            if len(self.ms) > 1
            else self.ms * 3
        )
        return low, high


def reason(error: BaseException) -> str:
    """One line for a table; out of memory says how much was asked for in its own first line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


def attempt(call: Callable) -> tuple[object, str | None]:
    """What a call gives, and None; or None, and why it failed: kernels and peers fail in any way, a
    table says how."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001
        return None, reason(error)


class Timer:
    """Times calls on a CUDA device. What needs one is in the small methods, which a test
    replaces."""

    def __init__(self, device: torch.device, seconds: float, most: int = 50):
        self.device, self.seconds, self.most = device, seconds, most
        self._flushed = self._flush_buffer()

    def _flush_buffer(self) -> Tensor:
        # several times the L2 of any GPU so far; written between repeats so that each starts from
        # device memory
        return torch.empty(256 << 20, dtype=torch.int8, device=self.device)

    def once(self, call: Callable, calls: int, flush: bool) -> float:
        """Milliseconds of one call, from ``calls`` in a row."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush:
            self._flushed.zero_()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_bytes(self, call: Callable) -> int | None:
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def capture(self, call: Callable) -> tuple[Callable, object]:
        """A CUDA graph of ``call``: a function that replays it, and the tensors that a replay
        writes."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        # warm-up on a side stream, as torch asks for: compiles kernels, creates handles and
        # workspaces
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = call()
        return graph.replay, written

    def _prepare(self, make: Callable[[], Callable]) -> tuple[Callable, int | None]:
        call = make()
        for _ in range(2):  # warm-up: kernels compiled, memory in torch's cache
            call()
        return call, self.peak_bytes(call)

    def compare(
        self, makers: dict[str, Callable[[], Callable]], *, calls: int = 1, flush: bool = True
    ) -> dict[str, Timing | str]:
        """Times taking turns; a maker or call that fails gives the reason in place of its timing.

        Args:
            makers: functions that prepare a call (compile, build a mask) and return it.
            calls: in a row in one repeat, for calls too short to time alone.
            flush: empty the L2 before each repeat.
        """
        ready, found, times = {}, {}, {}
        for name, make in makers.items():
            prepared, why = attempt(lambda make=make: self._prepare(make))
            self.free()
            if why is not None:
                found[name] = why
                continue
            ready[name], peak = prepared
            found[name], times[name] = Timing([], peak), []
        start = time.perf_counter()
        while ready and len(next(iter(times.values()))) < self.most:
            done = min(len(values) for values in times.values())
            if done >= 3 and time.perf_counter() - start > self.seconds:
                break
            for name, call in list(ready.items()):
                elapsed, why = attempt(lambda call=call: self.once(call, calls, flush))
                if why is None:
                    times[name].append(elapsed)
                    continue
                found[name] = why
                del ready[name], times[name]
        for name in ready:
            found[name].ms = times[name]
        return found


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Every operator inside runs this backend, those inside modules too, or says why it cannot."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def on(name: str, call: Callable) -> Callable:
    def run(*args):
        with using(name):
            return call(*args)

    return run


def kernels(device: torch.device) -> str:
    """The backend that is ours in a table. Only the tests come here without a GPU."""
    return "triton" if device.type == "cuda" else "eager"


def forward(function: Callable, inputs: list[Tensor]) -> Callable:
    @torch.no_grad()
    def run():
        return function(*inputs)

    return run


def forward_backward(
    function: Callable, inputs: list[Tensor], grad: Tensor, others: tuple[Tensor, ...] = ()
):
    """Gradients of fresh leaves of ``inputs`` (no accumulator outlives a call, as CUDA graphs need)
    and of ``others``."""

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), [*leaves, *others], grad, allow_unused=True)

    return run


PASSES = ("forward", "forward + backward")


def both(
    function: Callable,
    inputs: list[Tensor],
    grad: Tensor,
    others: tuple[Tensor, ...] = (),
    backend: str | None = None,
) -> dict[str, Callable]:
    """Both of ``PASSES`` as calls, on a backend: chosen around the whole call, for a backward
    chooses anew."""
    calls = {
        "forward": forward(function, inputs),
        "forward + backward": forward_backward(function, inputs, grad, others),
    }
    return calls if backend is None else {what: on(backend, call) for what, call in calls.items()}


def tensors(result) -> list[Tensor | None]:
    return [result] if isinstance(result, Tensor) else list(result)


def relative_error(found, expected) -> float:
    """Largest relative norm of the difference over tensors; infinite where a value is not
    finite."""
    worst = 0.0
    found, expected = tensors(found), tensors(expected)
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} results, expected {len(expected)}")
    for a, b in zip(found, expected, strict=True):
        if a is None and b is None:
            continue
        # a few rows at a time: the copies in float32 of a large map would not fit beside it
        a, b = a.reshape(-1), b.reshape(-1)
        difference = size = 0.0
        for some, same in zip(a.split(1 << 26), b.split(1 << 26), strict=True):
            difference += float((some.double() - same.double()).square().sum())
            size += float(same.double().square().sum())
        error = (difference / max(size, 1e-60)) ** 0.5
        worst = max(worst, error) if error < float("inf") else float("inf")
    return worst


def flops_of(timing: Timing | str | None, flops: float | None) -> float | None:
    """TFLOP/s."""
    return flops / timing.median / 1e9 if flops and isinstance(timing, Timing) else None


def _fields(timing: Timing | str | None, flops: float | None) -> dict | None:
    if not isinstance(timing, Timing):
        return None
    low, high = timing.quartiles
    return {
        "median_ms": timing.median,
        "q1_ms": low,
        "q3_ms": high,
        "repeats": len(timing.ms),
        "raw_ms": timing.ms,
        "peak_bytes": timing.peak_bytes,
        "tflops": flops_of(timing, flops),
    }


def row(
    name: str,
    what: str,
    found: dict[str, Timing | str],
    ours: str,
    peer: str | None = None,
    flops: dict[str, float] | None = None,
) -> dict:
    """A record of ``ours`` beside ``peer``; a failure of ours fails the run, one of a peer's is
    only told."""
    flops = flops or {}
    mine, theirs = found[ours], found.get(peer)
    why = [
        f"{who}: {text}" for who, text in ((ours, mine), (peer, theirs)) if isinstance(text, str)
    ]
    timed = isinstance(mine, Timing) and isinstance(theirs, Timing)
    return {
        "kind": "timing",
        "name": name,
        "what": what,
        "ours": ours,
        "peer": peer,
        "ours_timing": _fields(mine, flops.get(ours)),
        "peer_timing": _fields(theirs, flops.get(peer)),
        "ratio": theirs.median / mine.median if timed else None,
        "reason": "; ".join(why) or None,
        "failed": isinstance(mine, str),
    }


def rows(name: str, what: str, found: dict, ours: str, flops: dict | None = None) -> Iterator[dict]:
    """``ours`` beside each of the others."""
    for peer in found:
        if peer != ours:
            yield row(name, what, found, ours, peer, flops)


def check(name: str, passed: bool | None, detail: str) -> dict:
    """A record of a check; ``passed`` None: it could not be made here, and the detail says why."""
    verdict = {True: "passed", False: "failed", None: "not run"}[passed]
    return {
        "kind": "check",
        "name": name,
        "verdict": verdict,
        "detail": detail,
        "failed": passed is False,
    }


def agreement(
    name: str, call: Callable, reference: Callable, timer: Timer, tolerance: float = 2e-2
) -> dict:
    """A check that two calls give the same; the reference failing (out of memory, say) is no
    failure of ours."""
    expected, why = attempt(reference)
    if why is not None:
        timer.free()
        return check(name, None, f"reference: {why}")
    error, why = attempt(lambda: relative_error(call(), expected))
    timer.free()
    if why is not None:
        return check(name, False, why)
    return check(name, error <= tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}")
