"""router_logits on the CPU: its formula, its gradients, what it refuses."""

import pytest
import torch

from colt5_vision.ops import router_logits
from colt5_vision.ops.router_logits import eager, reference


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


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
    torch.testing.assert_close(got, reference.router_logits(x.to(wide), tokens.to(wide), 1e-6))
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
    logits, norm = eager.forward(x, tokens, 1e-6)
    torch.testing.assert_close(logits, router_logits(x, tokens))
    for a, b in zip(eager.backward(weight, x, tokens, logits, norm, 1e-6), want):
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
    assert torch.equal(
        router_logits(x, tokens, backend="eager"), router_logits(x, tokens, backend="auto")
    )
    with pytest.raises(RuntimeError, match="^router_logits: backend 'triton' cannot run: "):
        router_logits(x, tokens, backend="triton")
