"""Routed rows in place of plain torch: autograd, registration, torch.compile, torch.export, a
module's heavy branch."""

import pytest
import torch

from colt5_vision import ConditionalRoutedImageAttention
from colt5_vision.ops import backend, gather_normalize, join
from colt5_vision.ops.join import kernels as join_kernels
from colt5_vision.ops.routed_rows import kernels, triton
from tests.support.rows_cases import distinct, filled, randn, scatter_inputs, some_map


def test_twice_differentiable(device):
    out, rows, indices, gates, null = scatter_inputs("last", 1, 6, 5, 3, device=device)
    inputs = [t.requires_grad_() for t in (out, rows, gates, null)]

    def penalty(inputs, **call):
        out, rows, gates, null = inputs
        y = gather_normalize(out.sin(), indices, null, **call) * rows
        y = join(out, y, filled(indices, gates), null, **call).sin().sum()
        grads = torch.autograd.grad(y, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    index = indices.unsqueeze(-1).expand(-1, -1, 5)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    x = wide[0].sin().gather(1, index)
    y = (
        x
        / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        * wide[3]
        * wide[1]
        * wide[2].unsqueeze(-1)
        - wide[3]
    )
    base = wide[0] + wide[3]
    grads = torch.autograd.grad(base.scatter_add(1, index, y).sin().sum(), wide, create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in grads), wide)
    for a, b in zip(penalty(inputs), want):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["last", "first"])
def test_opcheck(device, layout):
    ops = torch.ops.colt5_vision
    x, weight = some_map(layout, 2, 33, 24, device=device), randn(24, seed=1, device=device)
    routes = distinct(2, 2, 5, limit=33, device=device)
    args = (x.requires_grad_(), routes, weight.requires_grad_(), 1e-6, torch.float32, None)
    torch.library.opcheck(ops.gather_normalize, args)
    y, scale = triton.gather_normalize_forward(
        x.detach(), routes, weight.detach(), 1e-6, torch.float32
    )
    for asked in ((True, True), (False, True), (True, False)):
        args = (y, x.detach(), routes, weight.detach(), scale, *asked, None)
        torch.library.opcheck(ops.gather_normalize_backward, args)


@pytest.fixture
def launched(monkeypatch):
    seen, real = [], backend.launch
    monkeypatch.setattr(
        backend,
        "launch",
        lambda kernel, *args, **options: (seen.append(kernel), real(kernel, *args, **options)),
    )
    return seen


def layer(x, matrix, indices, weight, gates, null, **call):
    """The heavy branch in small: gather and normalise, a matmul, joined with a Linear's output."""
    rows = gather_normalize(x, indices, weight, **call) @ matrix
    out = torch.nn.functional.linear(x, matrix)
    return join(out, rows, filled(indices, gates), null, **call).sin()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_over_two_sizes(device, launched, compiler):
    torch.compiler.reset()
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=compiler)
    shared = [
        randn(40, 40, seed=1, device=device),
        randn(40, seed=2, device=device),
        randn(40, seed=4, device=device),
    ]
    matrix, weight, null = (t.requires_grad_() for t in shared)
    for batch, num, slots in ((2, 63, 9), (3, 111, 20)):
        x = some_map("last", batch, num, 40, device=device).requires_grad_()
        gates = randn(batch, slots, seed=6, device=device).requires_grad_()
        args = (x, matrix, distinct(batch, slots, limit=num, device=device), weight, gates, null)
        inputs = [t for t in args if t.requires_grad]
        want = layer(*args, backend="eager")
        want = want, *torch.autograd.grad(want.sum(), inputs)
        launched.clear()
        got = fast(*args)
        got = got, *torch.autograd.grad(got.sum(), inputs)
        assert set(launched) == {
            kernels.gather_normalize_kernel,
            join_kernels.join_kernel,
            kernels.gather_normalize_backward_kernel,
            join_kernels.join_backward_kernel,
        }
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(fast(*args), want[0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_export(device, launched, train):
    class Layer(torch.nn.Module):
        def forward(self, *args):
            return layer(*args)

    x = some_map("last", 2, 63, 40, device=device)
    matrix, weight, null = (randn(*s, seed=1, device=device) for s in ((40, 40), (40,), (40,)))
    args = (
        x,
        matrix,
        distinct(2, 9, limit=63, device=device),
        weight,
        randn(2, 9, seed=6, device=device),
        null,
    )
    with torch.set_grad_enabled(train):
        program = torch.export.export(Layer(), args)
        launched.clear()
        found = program.module()(*args)
        assert launched == [kernels.gather_normalize_kernel, join_kernels.join_kernel]
        torch.testing.assert_close(found, layer(*args, backend="eager"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(program.run_decompositions({}).module()(*args), found)


def test_float64_has_no_kernel(device):
    out, rows, indices, _, null = (
        t.double() if t.is_floating_point() else t
        for t in scatter_inputs("last", 2, 9, 8, 3, device=device)
    )
    assert gather_normalize(out, indices, null, backend="auto").dtype == torch.float64
    with pytest.raises(
        RuntimeError, match="gather_normalize: backend 'triton' cannot run: .*float64"
    ):
        gather_normalize(out, indices, null)
    with pytest.raises(RuntimeError, match="join: backend 'triton' cannot run: .*float64"):
        join(out, rows, filled(indices))


@pytest.mark.parametrize("masked", [False, True])
def test_the_heavy_branch_of_a_module(device, launched, monkeypatch, masked):
    """Output and gradients of the sum fusion through these kernels equal plain torch's; others'
    operators run eagerly."""
    heads = {
        "light_dim_head": 8,
        "light_heads": 2,
        "heavy_dim_head": 8,
        "heavy_heads": 2,
        "light_window_size": 4,
    }
    torch.manual_seed(0)
    module = ConditionalRoutedImageAttention(
        16,
        num_heavy_tokens_q=6,
        num_heavy_tokens_kv=5,
        num_routed_kv=2,
        router_straight_through=False,
        **heads,
    ).to(device)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = randn(2, 16, 9, 7, device=device).requires_grad_()
    mask = randn(2, 9, 7, seed=8, device=device) < 0.3 if masked else None
    inputs, found = [x, *module.parameters()], {}
    for choice in ("eager", "triton"):
        monkeypatch.setenv(backend.VARIABLE, choice)
        launched.clear()
        out = module(x, mask=mask)
        weight = randn(*out.shape, seed=7, device=device)
        found[choice] = out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)
    own = {kernels.gather_normalize_kernel, join_kernels.join_kernel}
    own |= {kernels.gather_normalize_backward_kernel, join_kernels.join_backward_kernel}
    assert own <= set(launched)
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-3, atol=1e-4)
