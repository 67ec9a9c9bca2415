"""The kernels of gather_normalize and join against formulas in float64; plain torch's
error is the budget."""

import pytest
import torch

from colt5_vision.ops import gather_normalize, join
from colt5_vision.ops.routed_rows import triton
from tests.support.rows_cases import (
    distinct,
    filled,
    gather,
    randn,
    scatter,
    scatter_inputs,
    some_map,
)

HALVES = [torch.float16, torch.bfloat16]


def within(found, plain, exact):
    for got, eager, want in zip(found, plain, exact, strict=True):
        assert got.shape == want.shape
        # not twice but three times plain torch's error: the interpreter cuts bfloat16 off instead
        # of rounding it
        budget = (eager - want).abs().max() * 1.5 + 2e-6 * want.abs().max()
        assert (got - want).abs().max() <= budget


def check_gather(x, indices, weight):
    grad = randn(*indices.shape, x.shape[-1], seed=5, device=x.device)
    exact = gather(x, indices, weight, grad, "eager", torch.float64)
    within(gather(x, indices, weight, grad), gather(x, indices, weight, grad, "eager"), exact)


def check_scatter(out, rows, indices, gates, null):
    grad = randn(*out.shape, seed=5, device=out.device)
    args = out, rows, indices, gates, null, grad
    within(scatter(*args), scatter(*args, "eager"), scatter(*args, "eager", torch.float64))


@pytest.mark.parametrize("layout", ["last", "first", "sliced"])
@pytest.mark.parametrize(
    "num, dim, routes, slots", [(63, 40, 1, 9), (111, 100, 3, 100), (577, 384, 2, 33)]
)
def test_gather_float32(device, layout, num, dim, routes, slots):
    x = some_map(layout, 2, num, dim, device=device)
    check_gather(
        x, distinct(2, routes, slots, limit=num, device=device), randn(dim, seed=1, device=device)
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_gather_halves(device, dtype, weight_dtype):
    x, weight = some_map("first", 2, 111, 100, dtype, device), randn(100, seed=1, device=device)
    check_gather(x, distinct(2, 2, 50, limit=111, device=device), weight.to(weight_dtype or dtype))


def test_gather_widens_as_autocast_asks(device):
    """CUDA's autocast runs rms_norm in float32: float32 rows of a half map, and a half gradient of
    it."""
    x, weight = (
        some_map("last", 2, 63, 40, torch.bfloat16, device).requires_grad_(),
        randn(40, seed=1, device=device),
    )
    index, grad = (
        distinct(2, 1, 9, limit=63, device=device),
        randn(2, 1, 9, 40, seed=5, device=device),
    )
    gather_rows = torch.ops.colt5_vision.gather_normalize
    out = gather_rows(x, index, weight, 1e-6, torch.float32, None)[0]
    want = gather_normalize(x.float(), index, weight)
    torch.testing.assert_close(out, want)
    found, want = (torch.autograd.grad(y, x, grad)[0] for y in (out, want))
    torch.testing.assert_close(found.float(), want.float(), rtol=1e-2, atol=1e-2)


def test_gather_of_one_row_of_indices_and_of_wide_rows(device):
    index = distinct(2, 5, limit=33, device=device)
    check_gather(
        some_map("last", 2, 33, 40, device=device), index, randn(40, seed=1, device=device)
    )
    check_gather(
        some_map("last", 2, 33, 2500, device=device), index, randn(2500, seed=1, device=device)
    )


def test_a_token_in_every_route_gets_the_sum_of_its_gradients(device):
    index = torch.tensor([[[3, 1], [3, 0], [2, 3]]], device=device)
    x, weight = some_map("last", 1, 5, 40, device=device), randn(40, seed=1, device=device)
    check_gather(x, index, weight)
    grad = randn(1, 3, 2, 40, seed=5, device=device)
    apart = [gather(x, index[:, r : r + 1], weight, grad[:, r : r + 1])[1] for r in range(3)]
    torch.testing.assert_close(gather(x, index, weight, grad)[1], sum(apart))


@pytest.mark.parametrize("layout", ["last", "first", "sliced"])
@pytest.mark.parametrize("num, dim, slots", [(63, 40, 9), (111, 100, 111), (577, 384, 33)])
def test_scatter_float32(device, layout, num, dim, slots):
    check_scatter(*scatter_inputs(layout, 2, num, dim, slots, device=device))


@pytest.mark.parametrize("dtype", HALVES)
def test_scatter_halves(device, dtype):
    out, rows, indices, gates, null = scatter_inputs("last", 2, 111, 100, 50, dtype, device)
    check_scatter(out, rows, indices, gates, null)
    check_scatter(out, rows.float(), indices, gates.to(dtype), null.to(dtype))


@pytest.mark.parametrize("with_gates, with_null", [(False, False), (True, False), (False, True)])
def test_scatter_without_gates_or_null(device, with_gates, with_null):
    out, rows, indices, gates, null = scatter_inputs("last", 2, 63, 40, 9, device=device)
    check_scatter(out, rows, indices, gates if with_gates else None, null if with_null else None)


def test_scatter_touches_routed_rows_only(device):
    """Rows elsewhere keep their bits, and the null token is traded in exactly."""
    out, rows, indices, gates, null = scatter_inputs("last", 2, 63, 40, 9, device=device)
    found = join(out, rows, filled(indices, gates))
    routed = torch.zeros(2, 63, dtype=torch.bool, device=device).scatter_(1, indices, True)
    assert torch.equal(found[~routed], out[~routed])
    assert (found[routed] != out[routed]).any(-1).all()
    zero = torch.zeros_like(out)
    found = join(zero, rows, filled(indices, torch.zeros_like(gates)), null)
    assert not found[routed].any()
    assert torch.equal(found[~routed], null.expand(2, 63, 40)[~routed])


def test_bad_samples_leave_the_others_alone(device):
    out, rows, indices, gates, null = scatter_inputs("last", 3, 63, 40, 9, device=device)
    grad, weight, routes = (
        randn(3, 63, 40, seed=5, device=device),
        randn(40, seed=1, device=device),
        indices[:, None],
    )
    clean = (
        scatter(out, rows, indices, gates, null, grad)[:4],
        gather(out, routes, weight, grad[:, None, :9])[:2],
    )
    rows[1, 2, 3], out[1, indices[1, 4]] = torch.nan, torch.inf
    bad = (
        scatter(out, rows, indices, gates, null, grad)[:4],
        gather(out, routes, weight, grad[:, None, :9])[:2],
    )
    for a, b in zip((*bad[0], *bad[1]), (*clean[0], *clean[1])):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert bad[0][0][1].isnan().any() and bad[1][0][1].isnan().any()


def test_batches_give_what_their_samples_give(device):
    out, rows, indices, gates, null = scatter_inputs("first", 3, 63, 40, 9, device=device)
    grad, weight = randn(3, 63, 40, seed=5, device=device), randn(40, seed=1, device=device)
    whole = (
        scatter(out, rows, indices, gates, null, grad)[:4]
        + gather(out, indices, weight, grad[:, :9])[:2]
    )
    for i in range(3):
        own = slice(i, i + 1)
        each = scatter(out[own], rows[own], indices[own], gates[own], null, grad[own])[:4]
        each += gather(out[own], indices[own], weight, grad[own, :9])[:2]
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, each))


def test_rows_of_zero_and_indices_out_of_range(device):
    x, weight = some_map("last", 1, 20, 40, device=device), randn(40, seed=1, device=device)
    x[0, 3] = 0
    index = torch.tensor([[3, 4, 5]], device=device)
    got = gather(x, index, weight, randn(1, 3, 40, seed=5, device=device))
    assert all(t.isfinite().all() for t in got) and not got[0][0, 0].any()
    # what the API's check on the CPU would refuse: an index beyond its sample must not reach the
    # neighbour's rows
    x, bad = (
        torch.cat([x, x, x]),
        torch.tensor([[[4]], [[3]], [[4]]], device=device).repeat(1, 1, 3),
    )
    bad[:, 0, 1:] = torch.tensor([20, -1])
    rows, scale = triton.gather_normalize_forward(x, bad, weight, 1e-6, torch.float32)
    assert rows[:, 0, 0].isfinite().all() and rows[:, 0, 1:].isnan().all()
    grad = randn(*rows.shape, seed=5, device=device)
    grad_x, grad_weight = triton.gather_normalize_backward(grad, x, bad, weight, scale)
    want = triton.gather_normalize_backward(
        grad[:, :, :1], x, bad[..., :1], weight, scale[..., :1].contiguous()
    )
    assert torch.equal(grad_x, want[0]) and torch.equal(grad_weight, want[1])


@pytest.mark.parametrize("batch, slots", [(0, 3), (2, 0)])
def test_nothing_to_do(device, batch, slots):
    x, index = (
        torch.ones(batch, 9, 40, device=device),
        torch.zeros(batch, slots, dtype=torch.int64, device=device),
    )
    weight = torch.ones(40, device=device)
    got = gather(x, index, weight, torch.ones(batch, slots, 40, device=device))
    assert got[0].shape == (batch, slots, 40) and not got[1].any() and not got[2].any()
    rows = torch.ones(batch, slots, 40, device=device)
    got = scatter(x, rows, index, rows[..., 0], weight, x)
    assert torch.equal(got[0], x.double() + 1) and (got[-1] == 9 * batch).all()
