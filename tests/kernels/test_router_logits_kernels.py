"""The kernels of router_logits against its formula in float64, with plain torch's error as the
budget."""

import pytest
import torch

from colt5_vision.ops import backend, router_logits
from colt5_vision.ops.router_logits import triton as kernels
from tests.support.rows_cases import randn, some_map

HALVES = [torch.float16, torch.bfloat16]


def run(x, tokens, weight, choice=None, dtype=None):
    """Logits and gradients, or those of the formula in ``dtype``."""
    x, tokens = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, tokens))
    out = router_logits(x, tokens, backend=choice)
    return [
        t.double()
        for t in (out.detach(), *torch.autograd.grad(out, (x, tokens), weight.to(out.dtype)))
    ]


def check(x, tokens):
    shape = (x.shape[0], tokens.shape[-2], x.shape[1])
    weight = randn(*shape, seed=5, device=x.device)
    exact = run(x, tokens, weight, "eager", torch.float64)
    for got, plain, want in zip(
        run(x, tokens, weight), run(x, tokens, weight, "eager"), exact, strict=True
    ):
        assert got.shape == want.shape
        # not twice but three times plain torch's error: the interpreter cuts bfloat16 off instead
        # of rounding it
        budget = (plain - want).abs().max() * 1.5 + 2e-6 * want.abs().max()
        assert (got - want).abs().max() <= budget


@pytest.mark.parametrize("layout", ["last", "first", "sliced"])
@pytest.mark.parametrize("num, dim, routes", [(63, 40, 1), (111, 100, 3), (577, 384, 2)])
def test_float32(device, layout, num, dim, routes):
    check(some_map(layout, 2, num, dim, device=device), randn(routes, dim, seed=1, device=device))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num, dim, layout", [(63, 40, "first"), (111, 384, "last")])
def test_halves(device, dtype, num, dim, layout):
    check(some_map(layout, 2, num, dim, dtype, device), randn(2, dim, seed=1, device=device))


@pytest.mark.parametrize("routes", [1, 2, 16])
def test_tokens_of_each_sample(device, routes):
    check(some_map("last", 3, 63, 40, device=device), randn(3, routes, 40, seed=1, device=device))


def test_more_channels_than_a_block_holds(device):
    check(some_map("last", 1, 33, 1100, device=device), randn(2, 1100, seed=1, device=device))
    check(some_map("first", 1, 33, 1100, device=device), randn(2, 1100, seed=1, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_another_dtype(device, dtype):
    x, tokens = (
        some_map("last", 1, 63, 40, device=device),
        randn(2, 40, seed=1, dtype=dtype, device=device),
    )
    assert router_logits(x, tokens).dtype == torch.float32
    torch.testing.assert_close(router_logits(x, tokens), router_logits(x, tokens, backend="eager"))
    check(x, tokens.float())


def test_rows_of_nothing(device):
    """|x| = 0, and |x| below the least norm: the gradient is that of the clamped norm, and
    finite."""
    x = some_map("last", 2, 63, 40, device=device)
    x[0, 3], x[1, 60:] = 0, 0
    x[0, 5] *= 5e-7 / x[0, 5].norm()
    tokens, weight = randn(2, 40, seed=1, device=device), randn(2, 2, 63, seed=5, device=device)
    got, want = run(x, tokens, weight), run(x, tokens, weight, "eager", torch.float64)
    assert all(t.isfinite().all() for t in got) and (got[0][0, :, 3] == 0).all()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    at = (weight[0, :, 3].double() @ tokens.double()) / 1e-6
    torch.testing.assert_close(got[1][0, 3], at, rtol=1e-5, atol=1e-5)


def test_a_bad_sample_leaves_the_others_alone(device):
    x, tokens = some_map("last", 3, 63, 40, device=device), randn(3, 2, 40, seed=1, device=device)
    weight = randn(3, 2, 63, seed=5, device=device)
    clean = run(x, tokens, weight)
    x[1, 7, 2], x[1, 9] = torch.nan, torch.inf
    for a, b in zip(run(x, tokens, weight), clean):
        assert torch.equal(a[[0, 2]], b[[0, 2]]) and a[1].isnan().any()


def test_a_batch_gives_what_its_samples_give(device):
    x, tokens = some_map("first", 3, 63, 40, device=device), randn(3, 2, 40, seed=1, device=device)
    weight = randn(3, 2, 63, seed=5, device=device)
    for i, whole in enumerate(zip(*run(x, tokens, weight))):
        for a, b in zip(whole, run(x[i : i + 1], tokens[i : i + 1], weight[i : i + 1])):
            assert torch.equal(a, b[0])


def test_the_same_in_every_run_and_no_more_than_was_asked(device, monkeypatch):
    x, tokens = (
        some_map("last", 2, 111, 40, device=device),
        randn(2, 40, seed=1, device=device).requires_grad_(),
    )
    weight = randn(2, 2, 111, seed=5, device=device)
    (first,) = torch.autograd.grad(router_logits(x, tokens), tokens, weight)
    (again,) = torch.autograd.grad(router_logits(x, tokens), tokens, weight)
    assert torch.equal(first, again)
    seen = []
    real = backend.launch
    monkeypatch.setattr(
        backend, "launch", lambda *args, **options: (seen.append(options), real(*args, **options))
    )
    torch.autograd.grad(router_logits(x, tokens), tokens, weight)
    torch.autograd.grad(router_logits(x.requires_grad_(), tokens.detach()), x, weight)
    asked = [(o["WITH_X"], o["WITH_TOKENS"]) for o in seen if "WITH_X" in o]
    assert asked == [(False, True), (True, False)] and len(seen) == 4


@pytest.mark.parametrize("batch, num", [(0, 5), (2, 0)])
def test_nothing_to_do(device, batch, num):
    x, tokens = (
        torch.zeros(batch, num, 40, device=device).requires_grad_(),
        randn(2, 40, device=device).requires_grad_(),
    )
    out = router_logits(x, tokens)
    assert out.shape == (batch, 2, num)
    grads = torch.autograd.grad(out.sum(), (x, tokens))
    assert grads[0].shape == x.shape and not grads[1].any()


@pytest.mark.parametrize("layout", ["last", "first"])
def test_opcheck(device, layout):
    x = some_map(layout, 2, 33, 24, device=device).requires_grad_()
    for tokens in (randn(2, 24, seed=1, device=device), randn(2, 3, 24, seed=1, device=device)):
        torch.library.opcheck(
            torch.ops.colt5_vision.router_logits, (x, tokens.requires_grad_(), 1e-6, None)
        )
        inputs = [t.detach() for t in (x, tokens)]
        logits, norm = kernels.forward(*inputs, 1e-6)
        for with_x, with_tokens in ((True, True), (False, True), (True, False)):
            args = (logits + 1, *inputs, logits, norm, 1e-6, with_x, with_tokens, None)
            torch.library.opcheck(torch.ops.colt5_vision.router_logits_backward, args)


def test_compiled_whole_over_two_sizes(device, monkeypatch):
    seen = []
    real = backend.launch
    monkeypatch.setattr(
        backend,
        "launch",
        lambda kernel, *args, **options: (seen.append(kernel), real(kernel, *args, **options)),
    )
    torch.compiler.reset()
    fast = torch.compile(
        lambda x, tokens: router_logits(x, tokens).sin(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    tokens = randn(2, 40, seed=1, device=device).requires_grad_()
    for batch, num in ((2, 63), (3, 111)):
        x = some_map("first", batch, num, 40, device=device).requires_grad_()
        seen.clear()
        got = torch.autograd.grad(fast(x, tokens).sum(), (x, tokens))
        assert seen == [kernels.router_logits_kernel, kernels.router_logits_backward_kernel]
        want = torch.autograd.grad(
            router_logits(x, tokens, backend="eager").sin().sum(), (x, tokens)
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_twice_differentiable(device):
    x, tokens = (
        randn(1, 4, 5, device=device).requires_grad_(),
        randn(2, 5, seed=1, device=device).requires_grad_(),
    )

    def penalty(**call):
        grads = torch.autograd.grad(
            router_logits(x, tokens, **call).sin().sum(), (x, tokens), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, tokens))

    x64, tokens64 = (t.detach().double().requires_grad_() for t in (x, tokens))
    out = ((x64 @ tokens64.T) / x64.norm(dim=-1, keepdim=True)).sin().sum()
    grads = torch.autograd.grad(out, (x64, tokens64), create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in grads), (x64, tokens64))
    for a, b in zip(penalty(), want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing(device):
    x, tokens = some_map("last", 2, 63, 40, device=device), randn(2, 40, seed=1, device=device)
    want = router_logits(x, tokens)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(router_logits(x, tokens), want)
        torch.testing.assert_close(router_logits(x, tokens, backend="eager"), want)


def test_float64_has_no_kernel(device):
    x, tokens = randn(1, 5, 8, dtype=torch.float64, device=device), randn(2, 8, device=device)
    assert router_logits(x, tokens, backend="auto").dtype == torch.float64
    with pytest.raises(RuntimeError, match="router_logits: backend 'triton' cannot run: .*float64"):
        router_logits(x, tokens, backend="triton")
