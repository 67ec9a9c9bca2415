"""The kernels of soft and hard top-k compile for chips that are not here, without spills."""

import pytest
import torch

from colt5_vision.ops import backend
from colt5_vision.ops.soft_topk import eps_schedule

pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip(
        "the interpreter stands in for the compiler: unset TRITON_INTERPRET",
        allow_module_level=True,
    )

from benchmarks.gpu.offline import TARGETS, check, recorded
from colt5_vision.ops.route_topk import triton as hard
from colt5_vision.ops.soft_topk import triton as soft
from colt5_vision.ops.soft_topk import triton_descent as descent

SIZES = (577, 65_536, 262_144, 1_000_000)


def launches_of(architecture, n):
    """Names of the launches of each operator for one row of ``n``, and the launches."""
    scores, k, num_valid = torch.empty(1, n), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.int64)
    schedule, found = eps_schedule(50, 0.1, 1.0, 0.9), {}
    with recorded(architecture) as launches:

        def keep(name):
            found[name] = launches.copy()
            launches.clear()

        soft.forward(scores, k, num_valid, 0.03)
        keep("soft")
        soft.backward(scores, scores, 0.03)
        keep("soft backward")
        iterates = descent.forward(scores, k, num_valid, schedule)[1]
        keep("descent")
        descent.backward(scores, scores, scores, iterates, k, schedule)
        keep("descent backward")
        hard.top_indices(scores, 512)
        keep("hard")
    return found


def test_launches_do_not_grow_with_the_row():
    count = {n: {name: len(found) for name, found in launches_of(90, n).items()} for n in SIZES}
    short = {"soft": 2, "soft backward": 2, "descent": 2, "descent backward": 3, "hard": 6}
    assert count[577] == short
    assert count[65_536] == {**short, "soft": 3, "descent": 50}
    assert count[1_000_000] == {**short, "soft": 9, "descent": 50}


@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_compile(architecture):
    seen = set()
    for n in SIZES:
        for found in launches_of(architecture, n).values():
            for launch in found:
                constants = [(name, value) for name, value in launch.args.items() if name.isupper()]
                wide = [
                    name
                    for name, x in launch.args.items()
                    if isinstance(x, int) and abs(x) >= 1 << 31
                ]
                key = (launch.name, *constants, *wide, *launch.options.items())
                if key not in seen:
                    seen.add(key)
                    check(launch, architecture)
    assert len(seen) == 19
