"""What attention is expected to take, full and routed: a layer is routed where that pays.

Seconds are a sum over the work of a call (pairs of query and key, elements that are copied, calls)
of an amount times a constant. ``python -m benchmarks.cpu --fit`` fits the constants on a machine.
The library comes with those of two cores; the environment variable ``COLT5_VISION_COSTS`` names a
file of others. For a device without constants there is no estimate.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import TokenCount, token_count

__all__ = ["VARIABLE", "Costs", "Place", "Work", "known_costs", "read_costs"]

VARIABLE = "COLT5_VISION_COSTS"
SHIPPED = Path(__file__).with_name("costs.json")
Place = tuple[str, torch.dtype]
"""Type of a device, and a dtype."""
PASSES = ("forward", "forward + backward")
_TILES = 25  # at most, of a grouped map
_HEAD_DIM = 64  # where a layer does not tell
_LARGEST = 1 << 24  # tokens


class Work(NamedTuple):
    """Attention over a map.

    Attributes:
        tokens: N of the map.
        channels: heads times head_dim.
        window: tokens of a window.
        keys: routed keys.
    """

    tokens: int
    channels: int
    window: int
    keys: int
    head_dim: int = _HEAD_DIM
    batch: int = 1


@dataclass(frozen=True, eq=False)
class Costs:
    """Constants of a device and a dtype.

    Attributes:
        machine: where they were fitted.
        threads: of torch, then.
        constants: by pass, kind of attention and name of the amount, seconds for one of it.
    """

    machine: str
    threads: int
    constants: Mapping[str, Mapping[str, Mapping[str, float]]]

    def seconds(
        self, kind: str, work: Work, what: str = PASSES[0], threads: int | None = None
    ) -> float:
        """What a call is expected to take.

        Args:
            kind: among ``AMOUNTS``.
            what: among ``PASSES``.
            threads: that share the work, but for what each call costs by itself; None: torch's.
        """
        threads = torch.get_num_threads() if threads is None else threads
        share = self.threads / threads
        each = self.constants[what][kind]
        amounts = AMOUNTS[kind](work)
        return sum(
            each[name] * amount * (1 if name == "calls" else work.batch * share)
            for name, amount in amounts.items()
        )

    def speedup(
        self,
        tokens: int,
        channels: int,
        *,
        router: str,
        window_size: int | tuple[int, ...],
        num_heavy_tokens_kv: TokenCount,
        others: int = 0,
    ) -> float:
        """How many times as fast as full attention a routed layer is expected to be, in a forward
        of batch 1.

        Args:
            tokens: of the map.
            channels: heads times head_dim; heads are taken to be 64 wide.
            router, window_size, num_heavy_tokens_kv: see
                :class:`~colt5_vision.RoutedAttentionConfig`.
            others: tokens of a text or other images in its sequence: they see all and are seen by
                all, routed or not.
        """
        sides = (window_size, window_size) if isinstance(window_size, int) else window_size
        sides = sides if len(sides) > 1 else 2 * sides
        keys = 0
        if router != "window":
            keys = token_count("num_heavy_tokens_kv", num_heavy_tokens_kv, tokens)
        work = Work(tokens, channels, math.prod(sides), keys, min(_HEAD_DIM, channels))
        # at the threads they were fitted with: no choice depends on how many there are today
        seconds = functools.partial(self.seconds, threads=self.threads)
        routed, full = seconds(_KINDS.get(router, "operator"), work), seconds("full", work)
        whole = seconds("full", work._replace(tokens=tokens + others))
        return whole / max(routed + whole - full, 1e-12)

    def least_tokens(self, min_speedup: float, channels: int, **how) -> int:
        """From how many tokens on a layer is expected to gain ``min_speedup``; arguments as of
        :meth:`speedup`. At most 16,777,216, where it never does."""
        return _least_tokens(self, min_speedup, channels, tuple(how.items()))


@functools.lru_cache(maxsize=4096)  # layers ask alike, each for several numbers of other tokens
def _least_tokens(costs: Costs, min_speedup: float, channels: int, how: tuple) -> int:
    low, high, how = 0, _LARGEST, dict(how)
    while high - low > 1:
        middle = (low + high) // 2
        pays = costs.speedup(middle, channels, **how) >= min_speedup
        low, high = (low, middle) if pays else (middle, high)
    return high


def _full(work: Work) -> dict[str, float]:
    n, c, heads = work.tokens, work.channels, work.channels / work.head_dim
    return {"products": n * n * c, "pairs": n * n * heads, "copied": n * c, "calls": 1.0}


def _operator(work: Work) -> dict[str, float]:
    n, c, heads = work.tokens, work.channels, work.channels / work.head_dim
    return {
        "products": n * (min(work.window, n) + work.keys) * c,
        "routed pairs": n * work.keys * heads,
        "copied": n * c,
        "gathered": work.keys * c,
        "calls": 1.0,
    }


def _grouped(work: Work) -> dict[str, float]:
    n, c, heads = work.tokens, work.channels, work.channels / work.head_dim
    tiles = min(_TILES, math.ceil(n / work.window))
    return {
        "products": n * work.keys * c,
        "routed pairs": n * work.keys * heads,
        "copied": n * c,
        "gathered": tiles * work.keys * c,
        "probed": 4 * tiles * n * heads,
        "calls": 1.0,
    }


AMOUNTS = {"full": _full, "operator": _operator, "sampled": _operator, "grouped": _grouped}
"""By kind of attention, its amounts of work. ``"operator"``: keys are chosen already. Choosing a
sample costs in proportion to what is copied, and in each call."""
_KINDS = {  # of routers
    "sampled": "sampled",
    "learned": "sampled",
    "grouped": "grouped",
    "learned_grouped": "grouped",
}


def known_costs() -> dict[Place, Costs]:
    """Of the file that the environment names, or of the library's own."""
    return read_costs(Path(os.environ.get(VARIABLE) or SHIPPED))


def name_of(place: Place) -> str:
    """Of its constants in a file."""
    device, dtype = place
    return f"{device}, {str(dtype).removeprefix('torch.')}"


@functools.lru_cache(maxsize=8)
def read_costs(path: Path) -> dict[Place, Costs]:
    """Constants of a file, by device and dtype.

    Raises:
        ValueError: if it is no such file, saying which and what is wrong.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE}: expected a JSON file of benchmarks.cpu --fit, got {path}: {error}"
        ) from error
    where = f"{VARIABLE}: {path}"
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{where}: expected a mapping of devices, got {found!r}")
    return {_place(name, where): _checked(one, f"{where}: {name}") for name, one in found.items()}


def _place(name: str, where: str) -> Place:
    device, _, dtype = name.partition(", ")
    known = {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
    if f"torch.{dtype}" not in known:
        raise ValueError(f"{where}: expected names as 'cpu, float32', got {name!r}")
    return device, known[f"torch.{dtype}"]


def _checked(one: Any, where: str) -> Costs:
    expected = {"machine", "threads", *PASSES}
    if not isinstance(one, dict) or set(one) != expected:
        got = sorted(one) if isinstance(one, dict) else repr(one)
        raise ValueError(f"{where}: expected {sorted(expected)}, got {got}")
    threads = one["threads"]
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"{where}: threads: expected an int >= 1, got {threads!r}")
    sample = Work(1, 1, 1, 1, 1)
    for what in PASSES:
        for kind, amounts in AMOUNTS.items():
            given = one[what].get(kind) if isinstance(one[what], dict) else None
            names = sorted(amounts(sample))
            if not isinstance(given, dict) or sorted(given) != names:
                raise ValueError(f"{where}: {what}: {kind}: expected {names}, got {given!r}")
            for name, value in given.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not (number and math.isfinite(value) and value >= 0):
                    raise ValueError(
                        f"{where}: {what}: {kind}: {name}: expected a number >= 0, got {value!r}"
                    )
    return Costs(str(one["machine"]), threads, {what: one[what] for what in PASSES})
