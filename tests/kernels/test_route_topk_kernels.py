"""The radix select against the plain-torch total order: indices are equal, not close."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from colt5_vision.ops import backend, route_topk
from colt5_vision.ops.route_topk import eager, triton

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def several_programs(monkeypatch):
    """Programs of 16 entries or more, at most four of them a row."""
    monkeypatch.setattr(triton, "CHUNK", 16)
    monkeypatch.setattr(triton, "MOST_PROGRAMS", 4)


@pytest.mark.parametrize(
    ("n", "spread"),
    [(1, False), (63, False), (577, False), (1500, False), (111, True), (577, True)],
)
def test_lengths(randn, request, launches, n, spread):
    if spread:
        request.getfixturevalue("several_programs")
    scores = torch.cat(
        [randn(1, n), randn(1, n, seed=1).mul(2).round(), torch.ones_like(randn(1, n))]
    )
    for k in sorted({1, max(n // 8, 1), n - 1 or 1, n})[:: 2 if spread else 1]:
        found = triton.top_indices(scores, k)
        assert found.dtype == torch.int64
        assert torch.equal(found, eager.top_indices(scores, k))
    assert launches[:6] == ["histogram_kernel"] * 4 + ["count_kernel", "take_kernel"]


def test_long_rows(randn):
    for scores, k in ((randn(1, 20_011), 9000), (randn(2, 20_011).round(), 2501)):
        assert torch.equal(triton.top_indices(scores, k), eager.top_indices(scores, k))


@pytest.mark.usefixtures("several_programs")
def test_the_order_of_odd_floats(device):
    small = torch.tensor(1, dtype=torch.int32).view(torch.float32).item()
    values = [0.0, -0.0, small, -small, 1.0, -1.0, INF, -INF, NAN, 3e38, -3e38, 1.0000001]
    scores = torch.tensor(values * 4, device=device).repeat(2, 1)
    scores[1] = scores[1].flip(0)
    scores.view(torch.int32)[1, 5] = -1  # a NaN with its sign set
    for k in (1, 7, 20, 48):
        assert torch.equal(triton.top_indices(scores, k), eager.top_indices(scores, k))


@pytest.mark.usefixtures("several_programs")
@pytest.mark.parametrize("options", [{}, {"grid_size": (6, 10), "cell_size": 4}])
def test_masks_and_stratified(randn, launches, options):
    scores, mask = randn(2, 1, 60).mul(2).round(), randn(2, 1, 60, seed=1) > 0.8
    for given, k in (
        (None, 5),
        (mask, 5),
        (mask, 55),
        (mask, torch.tensor([[3], [60]], device=scores.device)),
    ):
        launches.clear()
        found = route_topk(scores, k, mask=given, **options)
        assert len(launches) == 6
        expected = route_topk(scores, k, mask=given, backend="eager", **options)
        assert len(launches) == 6 and all(map(torch.equal, found, expected))


def test_dtypes_layouts_and_a_batch_of_0(randn):
    scores = randn(60, 3).T
    assert torch.equal(route_topk(scores, 5)[0], route_topk(scores, 5, backend="eager")[0])
    assert torch.equal(
        route_topk(scores.bfloat16(), 50)[0], route_topk(scores.bfloat16(), 50, backend="eager")[0]
    )
    assert route_topk(scores[:0], 5)[0].shape == (0, 5)
    assert route_topk(scores[0], 5)[0].shape == (5,)
    assert not route_topk(scores.clone().requires_grad_(), 5)[0].requires_grad


def test_opcheck(randn):
    for scores in (randn(2, 3, 20), randn(20, 3).T):
        torch.library.opcheck(torch.ops.colt5_vision.top_indices.default, (scores, 4, "triton"))
        torch.library.opcheck(
            torch.ops.colt5_vision.top_indices.default, (scores.double(), 4, "eager")
        )


@pytest.mark.parametrize("asked", [None, "triton"])
def test_compile_without_recompilation(randn, launches, asked):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, m: route_topk(s, 9, mask=m, backend=asked),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for n in (40, 111):
        scores, mask = randn(2, n), randn(2, n, seed=1) > -1
        launches.clear()
        found = compiled(scores, mask)
        assert len(launches) == 6
        assert all(map(torch.equal, found, route_topk(scores, 9, mask=mask, backend="eager")))
    assert counter.frame_count == 1


def test_choice_of_backend(randn, launches, monkeypatch):
    scores = randn(2, 9)
    with pytest.raises(RuntimeError, match="route_topk.*float64"):
        route_topk(scores.double(), 2)
    with pytest.raises(ValueError, match="^backend:"):
        route_topk(scores, 2, backend="cuda")
    monkeypatch.setenv(backend.VARIABLE, "auto")
    route_topk(scores, 2)
    torch.compile(lambda s: route_topk(s, 2)[0], backend="aot_eager", fullgraph=True)(scores)
    assert not launches  # torch.topk until a measurement says otherwise
    route_topk(scores, 2, backend="triton")
    assert launches
