"""The kernels of grouped attention compile for every chip, as the launches of real calls would have
them."""

import pytest
import torch

from benchmarks.gpu.offline import check, compiled, recorded
from colt5_vision.ops import backend
from colt5_vision.ops.grouped_attention import triton as kernels
from colt5_vision.ops.grouped_attention.call import Call

pytestmark = pytest.mark.skipif(
    backend.INTERPRETED, reason="compiles, where TRITON_INTERPRET=1 interprets"
)


def launches(architecture, head_dim, *, every=True):
    """Of 16 tiles of 16 x 16 with 256 keys each; ``every``: with all that a call may have."""
    groups, size, heads, prefix = 16, 256, 2, 1 if every else 0
    shape = (3, 1, prefix + groups * size, heads, head_dim)
    q, k, v = torch.empty(shape, dtype=torch.bfloat16).transpose(2, 3)
    index = torch.zeros(1, 1, groups, size, dtype=torch.int64)
    further, mask = [None] * 4, None
    if every:
        pooled = torch.empty(2, 1, heads, groups, 4, head_dim, dtype=torch.bfloat16)
        further = [torch.zeros(index.shape), *pooled, torch.zeros(1, heads, groups, 4)]
        mask = torch.ones(1, q.shape[2], dtype=torch.bool)
    call = Call(q, k, v, index, index, *further, mask, prefix, 0.1)
    with recorded(architecture) as found:
        out, lse = kernels.forward(call)
        kernels.backward(torch.empty_like(out), out, lse, call)
    return found[:2] + found[3:]  # the backward gathers as the forward does


@pytest.mark.parametrize(
    ("architecture", "head_dim"), [(80, 256), (90, 64), (90, 128), (100, 128), (942, 128)]
)
def test_compiles_without_spills(architecture, head_dim):
    found = launches(architecture, head_dim)
    assert len(found) == 5
    for launch in found:
        resources = check(launch, architecture)
        if architecture == 80:  # the same tiles serve chips with less shared memory
            assert resources.shared <= 99 << 10


def test_rows_are_read_16_bytes_at_a_time():
    """Also where a head's stride is no multiple of 16 elements."""
    (launch,) = (x for x in launches(90, 40, every=False) if x.name == "forward_kernel")
    ptx = compiled(launch, 90).asm["ptx"]
    assert "ld.global.b16" not in ptx
    assert ", 0x10" in ptx  # asynchronous copies of 16 bytes
    assert "wgmma.mma_async" in ptx
