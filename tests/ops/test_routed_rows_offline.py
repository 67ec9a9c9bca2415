"""The kernels of router_logits, of routed rows and of join, compiled for chips that are not here:
no spills, no GPU needed."""

import pytest
import torch

from colt5_vision.ops import backend

pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip(
        "the interpreter stands in for the compiler: unset TRITON_INTERPRET",
        allow_module_level=True,
    )

from benchmarks.gpu.offline import TARGETS, check, recorded
from colt5_vision.ops.join import triton as join_kernels
from colt5_vision.ops.routed_rows import triton as rows_kernels
from colt5_vision.ops.router_logits import triton as logits_kernels
from tests.support.marks import further

CASES = [
    (torch.bfloat16, 768, 2, True),
    (torch.float32, 3072, 2, False),
    (torch.bfloat16, 100, 2, False),  # no multiple of 16: an address for each element
    *further(
        (torch.bfloat16, 384, 2, False),
        (torch.float16, 64, 3, True),
        (torch.float32, 384, 16, True),
        (torch.bfloat16, 1280, 1, True),
    ),
]


def some_map(dtype, dim, channels_first):
    """(B, N, C) tokens of a map of 48 x 48."""
    if channels_first:
        return torch.empty(2, dim, 48, 48, dtype=dtype).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.empty(2, 48 * 48, dim, dtype=dtype)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype, dim, routes, channels_first", CASES)
def test_router_logits(architecture, dtype, dim, routes, channels_first):
    x = some_map(dtype, dim, channels_first)
    with recorded(architecture) as launches:
        tokens = torch.empty(routes, dim)
        logits, norm = logits_kernels.forward(x, tokens, 1e-6)
        logits_kernels.backward(torch.empty_like(logits), x, tokens, logits, norm, 1e-6)
    assert [launch.name for launch in launches] == [
        "router_logits_kernel",
        "router_logits_backward_kernel",
    ]
    for launch in launches:
        check(launch, architecture)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype, dim, routes, channels_first", CASES)
def test_routed_rows(architecture, dtype, dim, routes, channels_first):
    x = some_map(dtype, dim, channels_first)
    index = torch.empty(2, min(routes, 2), 144, dtype=torch.int64)
    weight = torch.empty(dim)
    with recorded(architecture) as launches:
        out, scale = rows_kernels.gather_normalize_forward(x, index, weight, 1e-6, dtype)
        rows_kernels.gather_normalize_backward(out, x, index, weight, scale)
    names = ["gather_normalize", *["gather_normalize_backward"] * index.shape[1]]
    assert [launch.name for launch in launches] == [f"{name}_kernel" for name in names]
    for launch in launches:
        check(launch, architecture)


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype, dim, routes, channels_first", CASES)
def test_join(architecture, dtype, dim, routes, channels_first):
    x, heavy = some_map(dtype, dim, channels_first), torch.empty(2, 144, dim, dtype=dtype)
    index, gates = torch.empty(2, 144, dtype=torch.int64), torch.empty(2, 144)
    with recorded(architecture) as launches:
        join_kernels.forward(x, heavy, index, gates, torch.empty(dim, dtype=dtype))
        join_kernels.backward(x, heavy, index, gates)
    assert [launch.name for launch in launches] == ["join_kernel", "join_backward_kernel"]
    for launch in launches:
        check(launch, architecture)
