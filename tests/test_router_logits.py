"""router_logits on the CPU: its formula, its gradients, what it refuses, and the routers that share it."""

import pytest
import torch

from colt5_vision import (
    ConditionalRoutedImageAttention,
    CoordinateDescentRouter,
    attention,
    branches,
)
from colt5_vision.branches import shared_logits
from colt5_vision.ops import router_logits
from colt5_vision.ops.router_logits import reference
from colt5_vision.router import learned_logits

HEADS = {"light_dim_head": 8, "light_heads": 2, "light_window_size": 4, "heavy_dim_head": 8, "heavy_heads": 2}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_inputs(per_sample, dtype=torch.float64):
    return randn(2, 9, 5, dtype=dtype), randn(*(2,) * per_sample, 3, 5, seed=1, dtype=dtype)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_formula(per_sample, dtype):
    x, tokens = some_inputs(per_sample, dtype)
    x[0, 2] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    got = router_logits(x, tokens)
    assert got.dtype == wide and got.shape == (2, 3, 9)
    for b in range(2):
        for i in range(9):
            own = (tokens[b] if per_sample else tokens).to(wide)
            want = own @ x[b, i].to(wide) / max(float(x[b, i].to(wide).norm()), 1e-6)
            torch.testing.assert_close(got[b, :, i], want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(router_logits(x, tokens), got)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients(per_sample):
    x, tokens = (t.requires_grad_() for t in some_inputs(per_sample))
    assert torch.autograd.gradcheck(router_logits, (x, tokens))
    assert torch.autograd.gradgradcheck(router_logits, (x, tokens))


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_backward_by_hand_is_autograds(per_sample):
    x, tokens = some_inputs(per_sample)
    x[0, 2], x[1, 3] = 0, 1e-9 * x[1, 3]
    weight = randn(2, 3, 9, seed=2)
    x, tokens = x.requires_grad_(), tokens.requires_grad_()
    want = torch.autograd.grad(router_logits(x, tokens), (x, tokens), weight)
    logits, norm = reference.forward(x, tokens, 1e-6)
    torch.testing.assert_close(logits, router_logits(x, tokens))
    for a, b in zip(reference.backward(weight, x, tokens, logits, norm, 1e-6), want):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "error, name, call",
    [
        (TypeError, "x", {"x": None}),
        (TypeError, "x", {"x": torch.ones(2, 9, 5, dtype=torch.long)}),
        (ValueError, "x", {"x": randn(9, 5)}),
        (TypeError, "tokens", {"tokens": [1.0]}),
        (TypeError, "tokens", {"tokens": torch.ones(3, 5, dtype=torch.long)}),
        (ValueError, "tokens", {"tokens": randn(5)}),
        (ValueError, "tokens", {"tokens": randn(3, 4)}),
        (ValueError, "tokens", {"tokens": randn(0, 5)}),
        (ValueError, "tokens", {"tokens": randn(3, 3, 5)}),
        (ValueError, "tokens", {"tokens": randn(3, 5).to("meta")}),
        (ValueError, "eps", {"eps": 0}),
        (ValueError, "eps", {"eps": float("nan")}),
        (TypeError, "eps", {"eps": "small"}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_errors_name_the_argument(error, name, call):
    arguments = {"x": randn(2, 9, 5), "tokens": randn(3, 5), **call}
    with pytest.raises(error, match=rf"^{name}: expected "):
        router_logits(arguments.pop("x"), arguments.pop("tokens"), **arguments)


def test_meta_and_backends():
    assert router_logits(randn(2, 9, 5).to("meta"), randn(3, 5).to("meta")).shape == (2, 3, 9)
    x, tokens = some_inputs(False)
    assert torch.equal(router_logits(x, tokens, backend="eager"), router_logits(x, tokens, backend="auto"))
    with pytest.raises(RuntimeError, match="^router_logits: backend 'triton' cannot run: "):
        router_logits(x, tokens, backend="triton")


@pytest.mark.parametrize("scale", [None, 3.0])
def test_learned_logits_of_several_routers(scale):
    options = {} if scale is None else {"cosine_sim_routing": True, "cosine_sim_scale": scale}
    routers = [CoordinateDescentRouter(16, num_routing_tokens=r, **options).double() for r in (1, 3)]
    routers.append(CoordinateDescentRouter(16, dtype=torch.float32))
    x = randn(2, 30, 16)
    for logits, router in zip(learned_logits(routers, x), routers, strict=True):
        torch.testing.assert_close(logits, router.logits(x))
        given, alone = router(x, num_tokens=7, logits=logits), router(x, num_tokens=7)
        assert all(torch.equal(a, b) for a, b in zip(given, alone))
    with pytest.raises(ValueError, match=r"^routers\[1\]: expected learned routing tokens"):
        learned_logits([routers[0], CoordinateDescentRouter(16, router="grid")], x)
    with pytest.raises(ValueError, match="^x: expected"):
        learned_logits(routers, x[..., :8])


def test_given_logits_are_what_is_routed_by():
    x, logits = randn(2, 30, 16), randn(2, 2, 30, seed=1).requires_grad_()
    router = CoordinateDescentRouter(16, num_routing_tokens=2)
    routing = router(x, num_tokens=7, logits=logits)
    assert torch.equal(routing.indices, logits.topk(7).indices)
    routing.gates.square().cumsum(-1).sum().backward()
    assert logits.grad.abs().max() > 0 and router.routing_token.grad is None
    for name, bad in (
        ("logits", {"logits": logits[:, :1]}),
        ("logits", {"logits": logits.long()}),
        ("generator", {"logits": logits, "generator": torch.Generator()}),
        ("query", {"logits": logits, "query": randn(2, 1, 30, 8)}),
        ("routing_tokens", {"logits": logits, "routing_tokens": randn(2, 2, 16)}),
        ("x", {"logits": logits, "x": x[..., :8]}),
        ("mask", {"logits": logits, "mask": torch.ones(2, 29, dtype=torch.bool)}),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
            router(**{"x": x, "num_tokens": 7, **bad})


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
@pytest.mark.parametrize("options", [{}, {"cosine_sim_routing": True}], ids=["plain", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_module_gives_what_separate_routers_give(fusion, options, masked, monkeypatch):
    torch.manual_seed(0)
    module = ConditionalRoutedImageAttention(
        16, num_heavy_tokens_q=6, num_heavy_tokens_kv=5, num_routed_kv=2, fusion=fusion, router_kwargs=options, **HEADS
    ).double()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = randn(2, 16, 9, 7).requires_grad_()
    mask = randn(2, 9, 7, seed=3) < 0.3 if masked else None
    calls, weight, inputs = [], randn(2, 16, 9, 7, seed=2), [x, *module.parameters()]
    real = torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda t, *args, **kw: (calls.append(t.shape), real(t, *args, **kw))[1]
    )

    def run():
        calls.clear()
        out = module(x, mask=mask)
        return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)

    shared, reads = run(), calls.count((2, 63, 16))
    for room in (attention, branches):
        monkeypatch.setattr(room, "shared_logits", lambda *_: ({}, {}))
    apart = run()
    assert (reads, calls.count((2, 63, 16))) == (1, 2), "one norm of the map for both routers"
    torch.testing.assert_close(shared, apart)
    assert all(router.routing_token.grad is None for router in (module.q_router, module.kv_router))
    assert all(g.abs().max() > 1e-6 for g in shared[1][1:3])


def test_routers_that_compare_differently_share_nothing():
    routers = [CoordinateDescentRouter(5, normalize=normalize) for normalize in (True, False)]
    assert shared_logits(*routers, randn(2, 9, 5)) == ({}, {})
    assert all(shared_logits(router, router, randn(2, 9, 5)) != ({}, {}) for router in routers)


@pytest.mark.parametrize("kind", ["mean_query", "random", "grid"])
def test_other_kinds_share_nothing(kind):
    module = ConditionalRoutedImageAttention(
        16, num_heavy_tokens_q=6, num_heavy_tokens_kv=5, fusion="softmax", router=kind, **HEADS
    )
    assert shared_logits(module.q_router, module.kv_router, randn(2, 63, 16, dtype=torch.float32)) == ({}, {})
    every = ConditionalRoutedImageAttention(16, num_heavy_tokens_kv=5, **HEADS)
    assert shared_logits(every.q_router, every.kv_router, None) == ({}, {})
    assert module(randn(2, 16, 9, 7, dtype=torch.float32)).isfinite().all()
