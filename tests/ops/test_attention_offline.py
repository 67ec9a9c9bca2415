"""The attention kernels compile for every chip, as the launches of real calls would have them."""

import pytest
import torch

from benchmarks.gpu.offline import SHARED_LIMIT, check, compiled, recorded
from colt5_vision.ops import backend
from colt5_vision.ops.routed_window_attention import triton as kernels
from colt5_vision.ops.routed_window_attention.geometry import Geometry
from tests.support.marks import further

pytestmark = pytest.mark.skipif(
    backend.INTERPRETED, reason="compiles, where TRITON_INTERPRET=1 interprets"
)


def launches(
    architecture,
    head_dim,
    *,
    prefix=0,
    mask=False,
    weights=False,
    own=True,
    queries=False,
    dtype=None,
):
    side, keys = 64, 256
    q, k, v = torch.empty(
        3, 1, prefix + side**2, 2, head_dim, dtype=dtype or torch.bfloat16
    ).transpose(2, 3)
    routed = torch.zeros(1, 1, keys, dtype=torch.int64)
    call = (
        routed,
        torch.zeros(1, 1, keys) if weights else None,
        torch.ones(1, q.shape[2], dtype=torch.bool) if mask else None,
        torch.arange(300)[None] if queries else None,
    )
    geometry = Geometry(prefix, side, side, (16, 16), 0.1, own)
    with recorded(architecture) as found:
        out, lse = kernels.forward(q, k, v, *call, geometry)
        kernels.backward(torch.empty_like(out), q, k, v, *call, out, lse, geometry)
    return found


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize("head_dim", [40, 128, *further(16, 32, 64, 80, 96, 160, 256)])
def test_compiles_without_spills(head_dim, architecture):
    for launch in launches(architecture, head_dim, prefix=1, mask=True, weights=True):
        found = check(launch, architecture)
        if architecture == 80:  # the same tiles serve chips with less shared memory
            assert found.shared <= 99 << 10


@pytest.mark.parametrize("architecture", SHARED_LIMIT)
@pytest.mark.parametrize(
    "options", [{"queries": True, "prefix": 77}, *further({}, {"weights": True, "own": False})]
)
def test_every_flag_compiles_without_spills(options, architecture):
    for launch in launches(architecture, 128, **options, dtype=torch.float16):
        check(launch, architecture)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("head_dim", [40, *further(72)])
def test_rows_are_read_16_bytes_at_a_time(head_dim, architecture):
    """Also where a head's stride is no multiple of 16 elements, which is what Triton looks for by
    itself; and the chip's own tensor cores multiply them."""
    for launch in launches(architecture, head_dim):
        if launch.name == "forward_kernel":
            ptx = compiled(launch, architecture).asm["ptx"]
            assert "ld.global.b16" not in ptx
            assert ", 0x10" in ptx  # asynchronous copies of 16 bytes
            assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[architecture] in ptx
