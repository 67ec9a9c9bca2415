"""join by its kernels, against its reference and plain torch."""

import pytest
import torch

from colt5_vision.ops import join
from colt5_vision.ops.join import reference, triton
from colt5_vision.routing import Routing
from tests.support.rows_cases import randn, scatter_inputs, some_map

KERNELS = ["join_kernel", "join_backward_kernel"]


def some_inputs(layout, batch, num, dim, slots, dtype=torch.float32, device="cpu"):
    """The last slot of each sample is empty: it points at a routed token and holds NaN."""
    light, heavy, indices, gates, null = scatter_inputs(
        layout, batch, num, dim, slots, dtype, device
    )
    mask = torch.ones_like(indices, dtype=torch.bool)
    mask[:, -1] = False
    indices[:, -1] = indices[:, 0]
    heavy[:, -1] = float("nan")
    gates[:, -1] = float("nan")
    return light, heavy, Routing(indices, gates, gates, mask), null


def run(function, light, heavy, routing, null, grad, dtype=None):
    given = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (light, heavy, routing.gates, null)
    ]
    out = function(given[0], given[1], routing._replace(gates=given[2]), given[3])
    wanted = [t for t in given if t is not None]
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    return [t.double() for t in (out.detach(), *grads)]


def by_reference(light, heavy, routing, null):
    gates = torch.where(routing.mask, routing.gates, 0)
    return reference.join(light, heavy, torch.where(routing.mask, routing.indices, -1), gates, null)


def check(inputs, launches, tolerance=1e-5):
    grad = randn(*inputs[0].shape, seed=5, device=inputs[0].device)
    got = run(join, *inputs, grad)
    assert launches == KERNELS
    want = run(by_reference, *inputs, grad, torch.float64)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("with_null", [True, False])
@pytest.mark.parametrize("layout", ["last", "first", "sliced"])
@pytest.mark.parametrize("num, dim, slots", [(63, 40, 9), (20, 300, 17)])
def test_float32(device, launches, layout, num, dim, slots, with_null):
    *inputs, null = some_inputs(layout, 2, num, dim, slots, device=device)
    check((*inputs, null if with_null else None), launches)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_halves(device, launches, dtype, tolerance):
    light, heavy, routing, null = some_inputs("last", 2, 63, 100, 50, dtype, device)
    routing = routing._replace(gates=routing.gates.float())
    check((light, heavy, routing, null.to(dtype)), launches, tolerance)


def test_the_map_is_fresh(device, launches):
    light, heavy, routing, null = some_inputs("last", 2, 63, 40, 9, device=device)
    before = light.clone()
    join(light, heavy, routing, null)
    assert torch.equal(light, before) and launches == KERNELS[:1]
    zero = torch.zeros((), device=device).expand_as(light)
    got = join(zero, heavy, routing, null)
    torch.testing.assert_close(got, join(torch.zeros_like(light), heavy, routing, null))
    assert not zero.any()


def test_twice_differentiable(device):
    light, heavy, routing, null = some_inputs("last", 1, 6, 5, 3, device=device)

    def penalty(function, dtype):
        given = (light, heavy, routing.gates, null)
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        out = function(leaves[0], leaves[1], routing._replace(gates=leaves[2]), leaves[3])
        grads = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for a, b in zip(penalty(join, torch.float32), penalty(by_reference, torch.float64)):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["last", "first"])
def test_opcheck(device, layout):
    light, heavy, routing, null = some_inputs(layout, 2, 33, 24, 5, device=device)
    index = torch.where(routing.mask, routing.indices, -1)
    gates = torch.where(routing.mask, routing.gates, 0)
    heavy = heavy.nan_to_num(1.0)
    given = [t.detach().requires_grad_() for t in (light, heavy, gates, null)]
    args = (given[0], given[1], index, given[2], given[3], None)
    torch.library.opcheck(torch.ops.colt5_vision.join, args)
    args = (light, heavy, index, gates, True, None)
    torch.library.opcheck(torch.ops.colt5_vision.join_backward, args)


@pytest.mark.parametrize("batch, slots", [(0, 3), (2, 0)])
def test_nothing_to_do(device, batch, slots):
    light, null = torch.ones(batch, 9, 40, device=device), torch.ones(40, device=device)
    index = torch.zeros(batch, slots, dtype=torch.int64, device=device)
    gates = torch.ones(batch, slots, device=device)
    routing = Routing(index, gates, gates, torch.ones_like(index, dtype=torch.bool))
    got = run(join, light, light[:, :slots], routing, null, light)
    assert torch.equal(got[0], light.double() + 1)
    assert (got[-1] == 9 * batch).all()


def test_indices_out_of_range_are_passed_over(device):
    """What the API's check on the CPU would refuse must not reach the neighbour's rows."""
    x, null = some_map("last", 3, 20, 40, device=device), randn(40, seed=1, device=device)
    rows, gates = randn(3, 3, 40, seed=2, device=device), randn(3, 3, seed=3, device=device)
    bad = torch.tensor([[4], [3], [4]], device=device).repeat(1, 3)
    bad[:, 1:] = torch.tensor([20, -1])
    rows[:, 1:] = float("nan")
    found = triton.forward(x, rows, bad, gates, null)
    want = triton.forward(x, rows[:, :1], bad[:, :1], gates[:, :1], null)
    assert torch.equal(found, want) and not torch.equal(found, x)
    found = triton.backward(x, rows, bad, gates)
    want = triton.backward(x, rows[:, :1], bad[:, :1], gates[:, :1])
    for both, one in zip(found[:2], want[:2]):
        assert torch.equal(both[:, :1], one) and not both[:, 1:].any()
    torch.testing.assert_close(found[2], want[2])
