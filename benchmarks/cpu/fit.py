"""``python -m benchmarks.cpu --fit``: constants of the cost model on this machine.

Full attention, the operator and the swap are timed in turns on some maps. Constants >= 0 are fitted
to these times by least squares of relative errors, outliers counting less. The file is for the
environment variable ``COLT5_VISION_COSTS``.
"""

import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from benchmarks.gpu.attention import inputs
from benchmarks.gpu.measure import PASSES, Map, both
from colt5_vision.ops import routed_window_attention
from colt5_vision.swap.cost import AMOUNTS, VARIABLE, Work, name_of
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import SampledAttention

from .cases import CPU
from .report import machine

# small maps tell what a call costs, large ones what a pair does
MAPS = (
    Map(24, 6, 64),
    Map(32, 2, 32),
    Map(32, 6, 64, window=8, share=8),
    Map(40, 8, 40, window=8),
    Map(48, 6, 64),
    Map(48, 2, 32, share=4),
    Map(64, 6, 64, window=8, share=4),
    Map(64, 2, 32),
    Map(64, 8, 40, share=32),
    Map(64, 6, 64),
    Map(96, 2, 32, window=8, share=8),
    Map(96, 6, 64, share=32),
    Map(112, 6, 64, window=14),
    Map(128, 2, 32),
)
QUICK = (Map(16, 2, 16, window=8), Map(24, 2, 16, window=8, share=4), Map(32, 2, 32, window=8))
_FAR = 0.1  # relative error from which a row counts less: another process got in its way
_SECONDS, _MOST = 0.6, 15  # of a map and a pass; rounds at most
_LARGEST = 10_000  # tokens of which full attention is timed, forward; backward: half of it


def work_of(size: Map) -> Work:
    keys = max(1, size.tokens // size.share)
    channels = size.heads * size.head_dim
    return Work(size.tokens, channels, size.window**2, keys, size.head_dim, size.batch)


def calls_of(size: Map) -> dict[str, dict]:
    """Both passes of each kind of attention."""
    x, grad, routed = inputs(size, CPU, torch.float32)
    grid = {"grid_size": (size.side, size.side)}
    how = {"window_size": size.window, "num_heavy_tokens_kv": routed.shape[1]}
    sampled, grouped = SampledAttention(**how), GroupedAttention(**how)
    chosen = grid | {"window_size": size.window, "routed_indices": routed}
    chosen["log_weights"] = torch.zeros(routed.shape)
    functions = {
        "full": scaled_dot_product_attention,
        "operator": lambda *x: routed_window_attention(*x, **chosen),
        "sampled": lambda *x: sampled(*x, **grid),
        "grouped": lambda *x: grouped(*x, **grid),
    }
    return {kind: both(function, x, grad) for kind, function in functions.items()}


def measured(maps: tuple[Map, ...], rounds: int) -> list[tuple[str, str, Work, float]]:
    """(pass, kind, work, seconds), the fastest of rounds in which all kinds take turns."""
    rows = []
    for size in tqdm(maps, desc="fit"):
        calls = calls_of(size)
        for what in PASSES:
            largest = _LARGEST if what == PASSES[0] else _LARGEST // 2
            kinds = [kind for kind in calls if kind != "full" or size.tokens <= largest]
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for kind in kinds:  # to warm up
                calls[kind][what]()
            begin = time.perf_counter()
            for turn in range(_MOST):
                if turn >= rounds and time.perf_counter() - begin > _SECONDS:
                    break
                for kind in kinds:
                    start = time.perf_counter()
                    calls[kind][what]()
                    times[kind].append(time.perf_counter() - start)
            work = work_of(size)
            rows += [(what, kind, work, min(times[kind])) for kind in kinds]
    return rows


def fitted(rows: list[tuple[str, str, Work, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Constants by pass, kind and amount."""
    found: dict[str, dict[str, dict[str, float]]] = {what: {} for what in PASSES}
    for what in PASSES:
        for kind, amounts in AMOUNTS.items():
            some = [(amounts(work), t) for w, k, work, t in rows if (w, k) == (what, kind)]
            names = list(some[0][0])
            parts = torch.tensor(
                [[work[name] / t for name in names] for work, t in some], dtype=torch.float64
            )
            # least squares again and again, a row far off counting less each time
            weight = torch.ones(len(some), 1, dtype=torch.float64)
            for _ in range(5):
                constants = _nonnegative(weight * parts, weight.squeeze(1))
                far = (parts @ constants - 1).abs().unsqueeze(1)
                weight = (1 + (far / _FAR) ** 2) ** -0.5
            found[what][kind] = dict(zip(names, constants.tolist()))
    return found


def _nonnegative(a: Tensor, b: Tensor) -> Tensor:
    """argmin |a x - b|² over x >= 0: the best among the solutions of all sets of columns."""
    size = a.norm(dim=0).clamp_min(1e-300)
    best, least = torch.zeros(a.shape[1], dtype=a.dtype), b.square().sum()
    for count in range(1, a.shape[1] + 1):
        for columns in itertools.combinations(range(a.shape[1]), count):
            some = (a / size)[:, columns]
            x = torch.linalg.lstsq(some, b.unsqueeze(1)).solution
            left = (some @ x - b.unsqueeze(1)).square().sum()
            if (x >= 0).all() and left < least:
                best, least = torch.zeros_like(best), left
                best[list(columns)] = x.squeeze(1)
    return best / size


def main(path: Path, quick: bool) -> int:
    rows = measured(QUICK if quick else MAPS, 2)
    about = machine()
    name = name_of(("cpu", torch.float32))
    found = {"machine": f"{about['cpu']}, torch {about['torch']}", "threads": about["threads"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    constants = fitted(rows)
    path.write_text(json.dumps({name: found | constants}, indent=1, allow_nan=False) + "\n")
    for what, kind, work, taken in rows:
        amounts = AMOUNTS[kind](work)
        guess = sum(constants[what][kind][each] * amount for each, amount in amounts.items())
        print(f"{what:18} {kind:8} {work} {1e3 * taken:.1f} ms, fitted {1e3 * guess:.1f}")
    print(f"wrote {path}; to use it: export {VARIABLE}={path.resolve()}")
    return 0
