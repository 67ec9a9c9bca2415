"""Nothing between two launches looks at a value: a CUDA graph can capture forward and backward of
every operator.

Run on fake CUDA tensors, which have no values: reading one (``item``, ``tolist``, a size by
    ``nonzero``) raises.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from benchmarks.gpu.offline import recorded
from colt5_vision import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention
from colt5_vision.ops import backend
from colt5_vision.ops.grouped_attention import triton as groups
from colt5_vision.ops.grouped_attention.call import Call
from colt5_vision.ops.join import triton as branches
from colt5_vision.ops.route_topk import triton as selection
from colt5_vision.ops.routed_rows import triton as rows
from colt5_vision.ops.routed_window_attention import triton as attention
from colt5_vision.ops.routed_window_attention.geometry import Geometry
from colt5_vision.ops.router_logits import triton as router
from colt5_vision.ops.soft_topk import triton as gates
from colt5_vision.ops.soft_topk import triton_descent as descent

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="launches are kept, not made")


@pytest.fixture
def launches():
    """The launches made on fake CUDA tensors by whatever runs in the test."""
    chip = SimpleNamespace(multi_processor_count=132)
    with (
        recorded(90) as found,
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: chip),
        FakeTensorMode(allow_non_fake_inputs=False),
    ):
        yield found


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def index(*shape):
    return empty(*shape, dtype=torch.int64)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("queries", [True, False])
def test_attention(launches, own, queries):
    q, k, v = (empty(2, 4, 3 + 35, 40, dtype=torch.bfloat16) for _ in range(3))
    call = (
        index(2, 2, 6),
        empty(2, 2, 6),
        empty(2, 38, dtype=torch.bool),
        index(2, 5) if queries else None,
    )
    geometry = Geometry(3, 5, 7, (3, 3), 0.1, own)
    out, lse = attention.forward(q, k, v, *call, geometry)
    grads = attention.backward(torch.empty_like(out), q, k, v, *call, out, lse, geometry)
    assert len(launches) == 12
    assert out.device.type == "cuda" and [x.shape for x in grads] == [
        x.shape for x in (q, k, v, call[1])
    ]


def test_groups(launches):
    q, k, v = (empty(2, 4, 3 + 35, 40, dtype=torch.bfloat16) for _ in range(3))
    pooled = (*(empty(2, 4, 4, 2, 40, dtype=torch.bfloat16) for _ in range(2)), empty(2, 4, 4, 2))
    further = (empty(2, 2, 4, 6), *pooled)
    call = Call(q, k, v, index(2, 2, 4, 9), index(2, 2, 4, 6), *further, None, 3, 0.1)
    call = call._replace(key_mask=empty(2, 38, dtype=torch.bool))
    out, lse = groups.forward(call)
    grads = groups.backward(torch.empty_like(out), out, lse, call)
    assert len(launches) == 6
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v, *further)]


@pytest.mark.parametrize("n", [577, 65536])
def test_gates(launches, n):
    scores, k, valid = empty(3, n), empty(3, 1), index(3, 1)
    found = gates.forward(scores, k, valid, 0.1)
    gates.backward(torch.empty_like(found), found, 0.1)
    schedule = [max(4.0 * 0.7**t, 1.0) for t in range(21)]
    found, iterates = descent.forward(scores, k, valid, schedule)
    descent.backward(torch.empty_like(found), scores, found, iterates, k, schedule)
    assert len(launches) > 4


def test_the_others(launches):
    x, grad = empty(2, 600, 64, dtype=torch.bfloat16), empty(2, 4, 100, 64, dtype=torch.bfloat16)
    assert selection.top_indices(empty(3, 65536), 512).shape == (3, 512)
    logits, norm = router.forward(x, empty(4, 64), 1e-6)
    router.backward(torch.empty_like(logits), x, empty(4, 64), logits, norm, 1e-6)
    out, scale = rows.gather_normalize_forward(x, index(2, 4, 100), empty(64), 1e-6, torch.bfloat16)
    rows.gather_normalize_backward(
        torch.empty_like(out), x, index(2, 4, 100), empty(64), scale, True, True
    )
    branches.forward(x, grad[:, 0], index(2, 100), empty(2, 100), empty(64))
    branches.backward(x, grad[:, 0], index(2, 100), empty(2, 100))
    assert len(launches) > 6


@pytest.mark.parametrize("fusion", ["softmax", "sum"])
@torch.no_grad()
def test_what_modules_do_around_them(launches, fusion):
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    heads = {
        "light_heads": 2,
        "heavy_heads": 2,
        "light_dim_head": 32,
        "heavy_dim_head": 32,
        "fusion": fusion,
    }
    counts = {"num_heavy_tokens_q": 1 / 4, "num_heavy_tokens_kv": 1 / 8, "num_routed_kv": 2}
    module = ConditionalRoutedImageAttention(
        64, **heads, **counts, light_window_size=8, rotary_emb=True, **kind
    )
    x, mask = empty(2, 64, 20, 30, dtype=torch.bfloat16), empty(2, 20, 30, dtype=torch.bool)
    assert module(x, mask=mask).shape == x.shape
    assert (
        ConditionalRoutedFeedForward(64, num_heavy_tokens=1 / 4, **kind)(x, mask=mask).shape
        == x.shape
    )


def test_a_look_would_be_noticed(launches):
    for look in (
        lambda x: x.max().item(),
        lambda x: x.nonzero(),
        lambda x: x.cpu().tolist(),
        lambda x: bool(x.any()),
    ):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            look(empty(3))
