"""``python -m benchmarks.cpu --profile``: where the time of a call goes, and how near it is to what
its FLOPs allow.

``torch.profiler`` records one call. Named functions of the library get a range from outside, and a
backward belongs to the step of its forward. Within the fused operators the kind of an operation
tells the step. The time of the whole call is measured without the profiler.
"""

import contextlib
import importlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.gpu.attention import FLOPS, inputs, pairs, routed_layer
from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision._torch_internals import flash_cpu
from colt5_vision.ops import routed_window_attention
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import SampledAttention
from support.measure import table

from .cases import CPU
from .report import machine

STEPS = (
    "projections", "logits", "probes", "selection", "gather", "windows", "routed part", "join",
    "scatter", "rest",
)  # fmt: skip
# functions that are a step, by where callers look them up
NAMED = {
    "torch.nn:Linear.forward": "projections",
    "torch.nn:RMSNorm.forward": "projections",
    "colt5_vision.router:CoordinateDescentRouter.logits": "logits",
    "colt5_vision.router:CoordinateDescentRouter.forward": "selection",
    "colt5_vision.branches:normalized_rows": "gather",
    "colt5_vision.branches:scaled_dot_product_attention": "routed part",
    "colt5_vision.sum_fusion:join": "join",
    "colt5_vision.swap.sampled:SampledAttention.probe": "probes",
    "colt5_vision.swap.sampled:correction": "probes",
    "colt5_vision.swap.sampled:SampledAttention.route": "selection",
    "colt5_vision.swap.grouped:alike_groups": "selection",
    "colt5_vision.swap.grouped:_probe": "probes",
    "colt5_vision.swap.grouped:_draw": "selection",
    "colt5_vision.swap.grouped:_estimate": "probes",
    "colt5_vision.swap.grouped:_by_token": "probes",
}
FUSED = ("colt5_vision::routed_window_attention", "colt5_vision::grouped_attention")
_RANGE = "step: "
_SDPA = "_scaled_dot_product_flash_attention_for_cpu"
_READS = {"gather", "index"}
_WRITES = {"scatter", "scatter_", "scatter_add", "scatter_add_", "index_add_", "index_put_"}
_COPIES = {
    "cat", "copy_", "clone", "contiguous", "pad", "constant_pad_nd", "to", "flatten",
}  # fmt: skip
_QUERIES = 4096  # of full attention, as many as its rate is measured with
HOW = (
    "Shares are of profiled calls, the median of three short ones. ms: the fastest of up to five "
    "calls without the profiler; with one thread, its CPU time. "
    "*Bound*: the time that the FLOPs of the attended pairs, and of the projections in a layer, "
    "take at the rate of SDPA, measured in the same run with at most 4,096 queries over all keys. "
    "*Over SDPA*: full attention at that rate, over the call (a layer: with its projections). A "
    "bound counts no probes and no routing. Norms are among the projections. In a grouped swap, "
    "*routed part* is the attention of the tiles."
)


@dataclass(frozen=True)
class Part:
    """Something to profile at a map."""

    name: str
    size: Map

    def make(self) -> tuple[dict[str, Callable], float]:
        """Both passes, and FLOPs of a forward: of the pairs and the projections."""
        size = self.size
        grid = {"grid_size": (size.side, size.side)}
        if self.name.startswith("layer"):
            return self._layer()
        x, grad, routed = inputs(size, CPU, torch.float32)
        per_pair = 4 * size.heads * size.head_dim
        if self.name == "operator":
            weights = torch.zeros(routed.shape)
            call = grid | {"routed_indices": routed, "log_weights": weights}
            call |= {"window_size": size.window}
            attend = lambda *x: routed_window_attention(*x, **call)
        else:
            how = {"window_size": size.window, "num_heavy_tokens_kv": 1 / size.share}
            kind = GroupedAttention if self.name.endswith("grouped") else SampledAttention
            module = kind(**how)
            attend = lambda *x: module(*x, **grid)
        count = pairs(size, routed)["union"]
        if self.name.endswith("grouped"):
            count = size.batch * size.tokens * routed.shape[1]
        return both(attend, x, grad), per_pair * count

    def _layer(self) -> tuple[dict[str, Callable], float]:
        torch.manual_seed(0)
        size = self.size
        layer = routed_layer(size, self.name.split()[-1], CPU, torch.float32)
        x = torch.randn(size.batch, size.side, size.side, size.heads * size.head_dim)
        calls = both(layer, [x], torch.ones_like(x), tuple(layer.parameters()))
        seen = {flash_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
        with FlopCounterMode(display=False, custom_mapping=seen) as counter:
            calls[PASSES[0]]()
        return calls, counter.get_total_flops()


PARTS = ("operator", "layer, softmax", "layer, sum", "swap, sampled", "swap, grouped")
SIDES, QUICK_SIDES = (64, 109, 128, 256), (32, 64)


def part(name: str, side: int) -> Part:
    """At the sizes of the targets: 6 heads x 64, a layer of 64 channels, keys 1/16."""
    window = 14 if side == 109 else 16
    heads, head_dim = (2, 32) if name.startswith("layer") else (6, 64)
    return Part(name, Map(side, heads, head_dim, window=window))


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Each function of ``NAMED`` runs in a range.

    Raises:
        LookupError: for a name that the library does not have.
    """
    with contextlib.ExitStack() as stack:
        for place, step in NAMED.items():
            module, path = place.split(":")
            *holders, name = path.split(".")
            owner = importlib.import_module(module)
            for holder in holders:
                owner = getattr(owner, holder)
            if not hasattr(owner, name):
                raise LookupError(f"NAMED: {place}: the library has no such function")
            stack.enter_context(mock.patch.object(owner, name, _in_range(owner, name, step)))
        yield


def _in_range(owner, name: str, step: str) -> Callable:
    function = getattr(owner, name)

    @wraps(function)
    def run(*args, **kwargs):
        with record_function(_RANGE + step):
            return function(*args, **kwargs)

    return run


def shares(call: Callable) -> dict[str, float]:
    """Of each step, its part of the time of a call."""
    # a call, watched
    recorder = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with named(), recorder as found, record_function("whole"):
        call()
    events = found.events()

    # the time of each step; an event is of the step around it, one of backward of its forward's
    tops = sorted((e for e in events if e.cpu_parent is None), key=lambda e: e.time_range.start)
    times: Counter[str] = Counter()
    forward: dict[int, str] = {}  # of a node of autograd, by its number, the step of its forward

    def walk(event, step: str) -> None:
        if event.name.startswith(_RANGE):
            step = event.name.removeprefix(_RANGE)
        elif event.name.startswith("autograd::engine") and event.sequence_nr in forward:
            step = forward[event.sequence_nr]
        elif event.sequence_nr >= 0 and event.scope == 0:
            forward[event.sequence_nr] = step
        if event.name.startswith(FUSED):
            _fused(event, times)
            return
        times[step] += event.self_cpu_time_total
        for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
            walk(child, step)

    # as shares
    for event in tops:
        walk(event, "rest")
    whole = sum(times.values())
    return {step: times[step] / whole for step in STEPS}


def middle(several: list[dict[str, float]]) -> dict[str, float]:
    """The median share of each step, all of them 1 together: of several calls one may be stopped in
    a step."""
    medians = {step: statistics.median(one[step] for one in several) for step in STEPS}
    whole = sum(medians.values())
    return {step: share / whole for step, share in medians.items()}


def _fused(event, times: Counter) -> None:
    """The steps within a fused operator, forward or backward, by the kind of each operation and its
    place among the calls of SDPA."""
    inside = _within(event, times)
    attends = [i for i, one in enumerate(inside) if _SDPA in one.name]
    first, last = (attends[0], attends[-1]) if attends else (len(inside), len(inside))
    alike = [i for i in attends if _alike(inside[i])]
    for i, one in enumerate(inside):
        kind = one.name.removeprefix("aten::")
        if _SDPA in one.name:
            # a window has as many queries as keys; where as many are routed, windows come first
            own = event.name.startswith(FUSED[0]) and i in alike
            own = own and (i == first or alike != attends)
            step = "windows" if own else "routed part"
        elif kind in _WRITES:
            step = "scatter" if i > first else "rest"
        elif kind == "reshape":
            step = "gather"
        elif kind in _READS | _COPIES:
            behind = i > last if kind in _READS else i > first
            step = "scatter" if behind else "gather"
        else:
            step = "join" if i > first else "rest"
        times[step] += one.cpu_time_total


def _within(event, times: Counter) -> list:
    """The operations of a fused operator in their order, beneath what autograd wraps them in."""
    times["rest"] += event.self_cpu_time_total
    inside = sorted(event.cpu_children, key=lambda e: e.time_range.start)
    if any(_SDPA in one.name for one in inside):
        return inside
    wrapped = [one for one in inside if one.name.startswith(("GeneratedBackward", *FUSED))]
    if not wrapped:
        return inside
    found = []
    for one in inside:
        found += _within(one, times) if one in wrapped else [one]
    return found


def _alike(event) -> bool:
    """Whether a call of SDPA, forward or backward, has as many keys as queries."""
    shapes = [shape for shape in event.input_shapes if len(shape) == 4]
    query, key = shapes[1:3] if "backward" in event.name else shapes[:2]
    return query[2] == key[2]


def rates(size: Map) -> dict[str, float]:
    """FLOP/s of full attention in both passes, of a forward and of a backward as they are
    counted."""
    x, grad, _ = inputs(size, CPU, torch.float32)
    some = min(_QUERIES, size.tokens)
    x[0], grad = x[0][:, :, :some], grad[:, :, :some]
    flops = 4 * size.batch * size.heads * size.head_dim * some * size.tokens
    calls = both(scaled_dot_product_attention, x, grad)
    return {what: flops * FLOPS[what] / seconds(call, 2.0) for what, call in calls.items()}


def seconds(call: Callable, budget: float, most: int = 5) -> float:
    """The fastest of calls within a time, at least one; one more goes before, to warm up.

    Of one thread the CPU time, which no other process disturbs.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    times: list[float] = []
    while not times or (len(times) < most and sum(times) < budget):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def measure(one: Part, rate: dict[str, float], budget: float) -> list[dict]:
    """A record for each pass."""
    calls, flops = one.make()
    size, found = one.size, []
    full = 4.0 * size.batch * size.heads * size.head_dim * size.tokens**2
    if one.name.startswith("layer"):
        full += 8.0 * size.batch * size.tokens * (size.heads * size.head_dim) ** 2
    for what in PASSES:
        taken = seconds(calls[what], budget)
        often = 3 if taken < 1 else 1
        found.append(
            {
                "part": one.name,
                "size": asdict(size),
                "pass": what,
                "ms": 1e3 * taken,
                "bound": flops * FLOPS[what] / rate[what] / taken,
                "over_sdpa": full * FLOPS[what] / rate[what] / taken,
                "shares": middle([shares(calls[what]) for _ in range(often)]),
                "machine": machine(),
            }
        )
    return found


def markdown(rows: list[dict]) -> str:
    """The table."""
    # about the run
    about = rows[-1]["machine"]
    lines = ["# Where the time goes on a CPU", ""]
    lines += ["`python -m benchmarks.cpu --profile`, sizes one after the other. Not run on a GPU."]
    lines += [
        "",
        f"- cpu: {about['cpu']}, {about['threads']} threads",
        f"- torch: {about['torch']}",
    ]
    lines += [f"- date: {about['date']}", "", HOW]

    # a table a part
    for name in dict.fromkeys(row["part"] for row in rows):
        some = [row for row in rows if row["part"] == name]
        size = Map(**some[0]["size"])
        lines += ["", f"## {name.capitalize()}", ""]
        lines += [f"{size.heads} heads x {size.head_dim}, batch {size.batch}, keys 1/{size.share}."]
        cells = [
            [
                f"{row['size']['side']}², window {row['size']['window']}",
                row["pass"],
                f"{row['ms']:.0f}",
                f"{row['bound']:.0%}",
                f"{row['over_sdpa']:.2f}",
                *(_percent(row["shares"][step]) for step in STEPS),
            ]
            for row in some
        ]
        lines += ["", *table(["map", "pass", "ms", "of bound", "over SDPA", *STEPS], cells)]
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 5e-4 else "–"


def main(sides: list[int], parts: Sequence[str], folder: Path, name: str, budget: float) -> int:
    """Profile and write; rows of other sizes that the file has already stay."""
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for side in sides:
        rate: dict[tuple[int, int], dict[str, float]] = {}
        for which in parts:
            one = part(which, side)
            shape = (one.size.heads, one.size.head_dim)
            if shape not in rate:
                rate[shape] = rates(replace(one.size, batch=1))
            new = measure(one, rate[shape], budget)
            key = lambda row: (row["part"], row["size"]["side"], row["pass"])
            mine = {key(row) for row in new}
            rows = [row for row in rows if key(row) not in mine] + new
            order = {each: i for i, each in enumerate(PARTS)}
            rows.sort(key=lambda r: (order[r["part"]], r["size"]["side"], PASSES.index(r["pass"])))
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n")
            path.with_suffix(".md").write_text(markdown(rows))
            print(which, side, *(f"{r['ms']:.0f} ms, {r['bound']:.0%}" for r in new), flush=True)
    print(path.with_suffix(".md").read_text())
    return 0
