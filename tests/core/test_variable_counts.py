"""Token counts as a tensor, one per sample: the router, and every module over maps."""

import functools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from colt5_vision import (
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    CoordinateDescentRouter,
)
from colt5_vision.checks import check_token_count
from colt5_vision.ops import backend, soft_topk
from colt5_vision.ops.soft_topk import eager
from tests.support.module_cases import (
    CASES,
    DIM,
    apply,
    assert_same,
    build,
    gradients,
    image,
    some_mask,
)

SLOTS = 8
NAMES = {
    "sum": ["num_heavy_tokens_kv"],
    "sum-q": ["num_heavy_tokens_q", "num_heavy_tokens_kv"],
    "sum-2-rotary": ["num_heavy_tokens_kv"],
    "sum-q-soft": ["num_heavy_tokens_q", "num_heavy_tokens_kv"],
    "softmax": ["num_heavy_tokens_kv"],
    "softmax-q": ["num_heavy_tokens_q", "num_heavy_tokens_kv"],
    "softmax-2-rotary": ["num_heavy_tokens_kv"],
    "softmax-cells": ["num_heavy_tokens_kv"],
    "softmax-mean": ["num_heavy_tokens_kv"],
    "ff": ["num_heavy_tokens"],
    "ff-tokens": ["num_heavy_tokens"],
    "block": ["num_heavy_attn_tokens_kv", "num_heavy_ff_tokens"],
    "block-softmax-q": [
        "num_heavy_attn_tokens_q",
        "num_heavy_attn_tokens_kv",
        "num_heavy_ff_tokens",
    ],
}
every_map_module = pytest.mark.parametrize("name", NAMES)
masked_or_not = pytest.mark.parametrize("masked", [False, True])
interpreted = pytest.mark.skipif(backend.INTERPRETED, reason="fake CUDA tensors meet real launches")


def slotted(name, **counts):
    """The case with ``SLOTS`` slots for every count, or others."""
    case = CASES[name]
    return case._replace(
        build=functools.partial(case.build, **{**dict.fromkeys(NAMES[name], SLOTS), **counts})
    )


def sample_mask(masked):
    """Of 3 samples of 63 tokens; one has fewer valid tokens than it may route."""
    if not masked:
        return None
    mask = some_mask()
    mask[1], mask[1, :2, 3] = False, True
    return mask


def varied(name, values):
    """Another order of the counts for every argument."""
    return {argument: torch.tensor(values).roll(i) for i, argument in enumerate(NAMES[name])}


@every_map_module
@masked_or_not
def test_a_batch_gives_what_its_samples_give_with_their_counts(name, masked):
    case = slotted(name)
    module, x, mask = build(case), image(), sample_mask(masked)
    counts = varied(name, [3, 7, 20])  # what exceeds the slots is cut
    out, grads = gradients(case, module, x, mask, **counts)
    assert all(grad.isfinite().all() for grad in grads)
    singles = []
    for i in range(3):
        numbers = {argument: min(int(count[i]), SLOTS) for argument, count in counts.items()}
        own = None if mask is None else mask[i : i + 1]
        singles.append(gradients(case, module, x[i : i + 1], own, at=i, **numbers))
    torch.testing.assert_close(out, torch.cat([one[0] for one in singles]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        grads[0], torch.cat([one[1][0] for one in singles]), atol=1e-5, rtol=1e-5
    )
    for grad, *parts in zip(grads[1:], *(one[1][1:] for one in singles), strict=True):
        torch.testing.assert_close(grad, sum(parts), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out[0], apply(case, module, x, mask)[0]), "the counts do not matter"


@every_map_module
@masked_or_not
def test_counts_of_all_slots_change_nothing(name, masked):
    case = slotted(name)
    module, x, mask = build(case), image(), sample_mask(masked)
    full = dict.fromkeys(NAMES[name], torch.tensor([SLOTS, 10**9, SLOTS]))
    assert_same(
        gradients(case, module, x, mask, **full), gradients(case, module, x, mask), rtol=0, atol=0
    )


@every_map_module
@masked_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_are_of_the_valid_tokens(name, masked, dtype):
    case = slotted(name, **dict.fromkeys(NAMES[name], 1.0))
    module, x, mask = build(case), image(), sample_mask(masked)
    shares = {
        argument: share.to(dtype) for argument, share in varied(name, [0.5, 0.1, 0.001]).items()
    }
    valid = [63] * 3 if mask is None else mask.flatten(1).sum(1).tolist()
    counts = {
        argument: torch.tensor([max(1, int(float(s) * v + 0.5)) for s, v in zip(share, valid)])
        for argument, share in shares.items()
    }
    got, want = (gradients(case, module, x, mask, **how) for how in (shares, counts))
    assert_same(got, want, rtol=0, atol=0)


@every_map_module
@pytest.mark.parametrize("values", [[3, 2, 5], [0.5, 0.01, 1.0]])
def test_a_wholly_masked_sample(name, values):
    case = slotted(name)
    module, x, mask = build(case), image(), some_mask()
    mask[1] = False
    out, grads = gradients(case, module, x, mask, **varied(name, values))
    assert torch.equal(out[1], x[1] if case.residual else torch.zeros_like(x[1]))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1] == 0).all()


@pytest.mark.parametrize("null", [True, False])
def test_an_empty_query_slot_leaves_its_token_alone(null):
    """The null token gives way to a heavy output, not to an empty slot that points at a valid
    token."""
    case = slotted("sum-q", use_null_q_tokens=null)
    module, x = build(case), image()
    counts = torch.tensor([2, 8, 1])
    with torch.no_grad():
        out = apply(case, module, x, num_heavy_tokens_q=counts).flatten(1, 2)
        flat = x.flatten(1, 2)
        routing = module.attend.q_router(flat, num_tokens=SLOTS, counts=counts)
        light = module.attend.light_attn(flat, (9, 7), None)
        if null:
            light = light + module.attend.null_q_token
    for i, count in enumerate(counts.tolist()):
        routed = torch.zeros(63, dtype=torch.bool)
        routed[routing.indices[i, 0, :count]] = True
        assert torch.equal(out[i, ~routed], light[i, ~routed])
        assert (out[i, routed] != light[i, routed]).any(-1).all()


def tokens(batch=4, num=42, dtype=torch.float64):
    return torch.randn(batch, num, DIM, generator=torch.Generator().manual_seed(0), dtype=dtype)


def router(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return CoordinateDescentRouter(DIM, **kwargs).to(dtype)


SETTINGS = {
    "exact": {},
    "iterated": {"n_iters": 15},
    "cells": {"cell_size": 4},
    "cells-iterated": {"cell_size": 4, "n_iters": 15},
    "mean": {"router": "mean_query"},
    "random": {"router": "random"},
    "grid": {"router": "grid"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_routing_of_each_sample(setting, masked, straight_through):
    module = router(
        straight_through=straight_through,
        num_routing_tokens=2,
        fetch_k_ratio=1.1,
        **SETTINGS[setting],
    )
    x, counts = tokens().requires_grad_(), [3, 9, 1, 30]
    mask = torch.rand(4, 42, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    if masked:
        mask[1] = torch.arange(42) < 4  # fewer than its count
    routing = module(x, num_tokens=12, counts=torch.tensor(counts), mask=mask, grid_size=(6, 7))
    assert all(field.shape == (4, 2, 12) for field in routing)
    left = [42] * 4 if mask is None else mask.sum(1).tolist()
    assert routing.mask.sum(-1).tolist() == [[min(c, v, 12)] * 2 for c, v in zip(counts, left)]
    empty = ~routing.mask
    assert (routing.gates[empty] == 0).all() and (routing.log_weights[empty] == -math.inf).all()
    for i, count in enumerate(counts):
        own = None if mask is None else mask[i : i + 1]
        one = module(x[i : i + 1], num_tokens=min(count, 12), mask=own, grid_size=(6, 7))
        filled = routing.mask[i, 0].sum()
        for field, want in zip(routing, one):
            torch.testing.assert_close(field[i, :, :filled], want[0, :, :filled])
    full = module(x, num_tokens=12, counts=torch.full((4,), 12), mask=mask, grid_size=(6, 7))
    assert all(
        torch.equal(a, b)
        for a, b in zip(full, module(x, num_tokens=12, mask=mask, grid_size=(6, 7)))
    )
    if routing.gates.requires_grad:
        (grad,) = torch.autograd.grad(
            (routing.gates * torch.rand(4, 2, 12, dtype=torch.float64)).sum(), x
        )
        assert grad.isfinite().all() and grad[0].abs().max() > 0


def test_soft_gates_sum_to_each_samples_budget():
    module, x = router(straight_through=False), tokens()
    counts = torch.tensor([3, 40, 8, 17])
    routing = module(x, num_tokens=1.0, counts=counts)
    logits = module.logits(x)
    want = soft_topk(logits, (counts * 9 / 8).clamp_max(42).double().unsqueeze(-1)).gather(
        -1, routing.indices
    )
    assert torch.equal(routing.gates, torch.where(routing.mask, want, 0))


def test_only_the_head_of_the_rows_is_sorted(monkeypatch):
    seen, forward = [], eager.soft_topk_forward
    monkeypatch.setattr(
        eager, "soft_topk_forward", lambda *args: (seen.append(args[-1]), forward(*args))[1]
    )
    router()(tokens().requires_grad_(), num_tokens=8, counts=torch.tensor([1, 2, 8, 3]))
    router(cell_size=6)(
        tokens().requires_grad_(), num_tokens=8, counts=torch.tensor([1, 2, 8, 3]), grid_size=(6, 7)
    )
    assert seen == [9, 9]  # 8 slots times 9 / 8, of 42 tokens, or of the 36 of a cell


@pytest.mark.parametrize("slots", range(1, 38))
def test_the_share_of_the_only_cell_may_be_rounded_up(slots):
    module, x = (
        router(torch.float32, cell_size=9, fetch_k_ratio=1.1),
        tokens(2, dtype=torch.float32).requires_grad_(),
    )
    assert module(x, num_tokens=slots, grid_size=(6, 7)).mask.all()


@masked_or_not
def test_soft_topk_with_a_bound(masked):
    x, k = (
        torch.randn(3, 50, dtype=torch.float64).mul(3).requires_grad_(),
        torch.tensor([2.0, 5.5, 7.0]).double(),
    )
    mask = torch.rand(3, 50) < 0.5 if masked else None
    weight = torch.randn(3, 50)
    want = soft_topk(x, k, mask=mask, eps=0.3)
    for bound in (7, 7.5, 49, 50, 10**9):
        got = soft_topk(x, k, mask=mask, eps=0.3, max_k=bound)
        torch.testing.assert_close(got, want)
        grads = (
            torch.autograd.grad((gates * weight).sum(), x, retain_graph=True)[0]
            for gates in (got, want)
        )
        torch.testing.assert_close(*grads)
    for error, name, how in [
        (ValueError, "k", {"max_k": 6.9}),
        (ValueError, "max_k", {"max_k": 0}),
        (ValueError, "max_k", {"max_k": math.nan}),
        (TypeError, "max_k", {"max_k": "7"}),
        (TypeError, "max_k", {"max_k": torch.tensor(7)}),
        (ValueError, "max_k", {"max_k": 7, "k": 3}),
    ]:
        with pytest.raises(error, match=rf"^{name}: .*got"):
            soft_topk(x, **{"k": k, **how})


BAD = [
    (ValueError, torch.tensor([3, 3])),
    (ValueError, torch.tensor(3)),
    (ValueError, torch.full((3, 1), 3)),
    (ValueError, torch.tensor([3, 0, 1])),
    (ValueError, torch.tensor([0.5, 0.0, 1.0])),
    (ValueError, torch.tensor([0.5, 1.5, 1.0])),
    (ValueError, torch.tensor([0.5, math.nan, 1.0])),
    (TypeError, torch.tensor([True, True, True])),
    (TypeError, torch.ones(3, dtype=torch.complex64)),
    (TypeError, [3, 3, 3]),
]


@every_map_module
def test_errors_name_the_argument(name):
    case = slotted(name)
    module, x = build(case), image()
    for argument in NAMES[name]:
        for error, bad in BAD:
            with pytest.raises(error, match=rf"^{argument}: expected .*got"):
                apply(case, module, x, **{argument: bad})


def test_errors_of_the_router_and_of_a_module_without_query_router():
    for error, bad in [*BAD, (TypeError, 3)]:
        with pytest.raises(error, match=r"^counts: expected .*got"):
            router()(tokens(3), num_tokens=SLOTS, counts=bad)
    case = slotted("sum")
    with pytest.raises(ValueError, match=r"^num_heavy_tokens_q: .*without a query router"):
        apply(case, build(case), image(), num_heavy_tokens_q=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name, dynamic", [("sum-q", None), ("softmax-cells", None), ("ff", True)])
def test_compile_traces_whole_and_serves_all_counts(name, dynamic):
    torch.compiler.reset()
    case = slotted(name)
    module, x, mask = build(case), image(), sample_mask(True)
    graphs, seen = CompileCounterWithBackend("aot_eager"), []
    fast = torch.compile(
        functools.partial(apply, case, module), fullgraph=True, backend=graphs, dynamic=dynamic
    )
    for values in ([3, 7, 20], [1, 8, 2]):
        counts = varied(name, values)
        want = gradients(case, module, x, mask, **counts)
        assert_same(gradients(case, module, x, mask, fast, **counts), want, atol=1e-5, rtol=1e-4)
        seen.append(graphs.frame_count)
    assert seen[0] == seen[1], "other values were compiled anew"


@pytest.mark.parametrize(
    "name, values",
    [("sum-q", [3, 7, 20]), ("ff-tokens", [0.02, 0.1, 1.0]), ("block-softmax-q", [0.02, 0.1, 1.0])],
)
def test_export_with_counts_as_inputs(name, values):
    case = slotted(name)
    module = build(case).eval()

    def native(x):
        return {"tokens": x.flatten(1, 2), "last": x, "first": x.permute(0, 3, 1, 2)}[case.layout]

    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, **{argument: {0: batch} for argument in NAMES[name]}}
    with torch.no_grad():
        counts = varied(name, values)
        program = torch.export.export(
            module, (native(image()),), counts, dynamic_shapes=shapes
        ).module()
        for samples in (3, 5):
            x = native(image(samples, seed=samples))
            counts = varied(name, (values * 2)[1 : 1 + samples])
            torch.testing.assert_close(program(x, **counts), module(x, **counts))


@interpreted
@pytest.mark.parametrize("values", [torch.int64, torch.float32])
def test_nothing_reads_counts_on_an_accelerator(values):
    """On fake CUDA tensors, which have no values: reading one raises. Training, so that soft gates
    are computed."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        kind = {"device": "cuda", "dtype": torch.float32}
        heads = {
            "light_heads": 2,
            "heavy_heads": 2,
            "light_dim_head": 8,
            "heavy_dim_head": 8,
            "light_window_size": 4,
        }
        counts = torch.empty(3, dtype=values, device="cuda")
        module = ConditionalRoutedFeedForward(DIM, num_heavy_tokens=6, **kind)
        gates = CoordinateDescentRouter(DIM, cell_size=4, device="cuda")
        x = torch.empty(3, 63, DIM, device="cuda")
        mask = torch.empty(3, 63, dtype=torch.bool, device="cuda")
        assert gates(x, num_tokens=6, counts=counts, mask=mask, grid_size=(9, 7)).gates.shape == (
            3,
            1,
            6,
        )
        with torch.no_grad():
            assert module(x, mask=mask, num_heavy_tokens=counts).shape == x.shape
            for fusion in ("sum", "softmax"):
                attention = ConditionalRoutedImageAttention(
                    DIM, num_heavy_tokens_q=6, num_heavy_tokens_kv=5, fusion=fusion, **heads, **kind
                )
                image = x.mT.unflatten(2, (9, 7))
                how = {
                    "num_heavy_tokens_q": counts,
                    "num_heavy_tokens_kv": counts,
                    "mask": mask.view(3, 9, 7),
                }
                assert attention(image, **how).shape == image.shape


@pytest.mark.parametrize("count", [0, -1, 1.5, math.nan])
def test_a_count_out_of_range_is_told_both_kinds(count):
    expected = r"^keys: expected an int >= 1 or a float in \(0, 1\], got "
    with pytest.raises(ValueError, match=expected):
        check_token_count("keys", count)
