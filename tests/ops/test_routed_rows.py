"""gather_normalize on the CPU."""

import pytest
import torch
from torch.nn.functional import rms_norm

from colt5_vision.ops import gather_normalize
from colt5_vision.ops.routed_rows import eager, reference
from colt5_vision.routing import gather_tokens

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def distinct(*shape, limit, seed=3):
    return randn(*shape[:-1], limit, seed=seed).argsort(-1)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_gather_is_rms_norm_of_the_rows(dtype, shape):
    x, weight, indices = randn(2, 9, 5, dtype=dtype), randn(5, seed=1), distinct(*shape, limit=9)
    got = gather_normalize(x, indices, weight, eps=1e-3)
    want = reference.gather_normalize(x.double(), indices, weight, 1e-3)
    assert got.dtype == dtype and got.shape == (*shape, 5)
    torch.testing.assert_close(got, want.to(dtype))
    for other in FLOATS:  # whatever nn.RMSNorm makes of mixed dtypes, also under autocast
        rows = gather_tokens(x, indices)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                norm = rms_norm(rows, (5,), weight.to(other), 1e-3)
                assert torch.equal(gather_normalize(x, indices, weight.to(other), eps=1e-3), norm)


def test_gather_gradients():
    x, weight, indices = (
        randn(2, 9, 5).requires_grad_(),
        randn(5, seed=1).requires_grad_(),
        distinct(2, 3, 4, limit=9),
    )

    def call(x, weight):
        return gather_normalize(x, indices, weight)

    assert torch.autograd.gradcheck(call, (x, weight)) and torch.autograd.gradgradcheck(
        call, (x, weight)
    )
    grad = randn(2, 3, 4, 5, seed=5)
    out, scale = eager.gather_normalize_forward(x, indices, weight, 1e-6, torch.float64)
    torch.testing.assert_close(out, call(x, weight))
    want = torch.autograd.grad(call(x, weight), (x, weight), grad)
    found = eager.gather_normalize_backward(
        grad, x.detach(), indices, weight.detach(), scale.detach()
    )
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)


INT = torch.int64


@pytest.mark.parametrize(
    "error, name, call",
    [
        (TypeError, "x", {"x": None}),
        (ValueError, "x", {"x": randn(9, 5)}),
        (TypeError, "indices", {"indices": [1]}),
        (TypeError, "indices", {"indices": torch.zeros(2, 3, dtype=torch.int32)}),
        (ValueError, "indices", {"indices": torch.zeros(3, 3, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.zeros(2, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.zeros(2, 1, 1, 3, dtype=INT)}),
        (ValueError, "indices", {"indices": torch.full((2, 3), 9)}),
        (ValueError, "indices", {"indices": torch.full((2, 3), -1)}),
        (ValueError, "indices", {"indices": torch.zeros(2, 3, dtype=INT, device="meta")}),
        (TypeError, "weight", {"weight": None}),
        (ValueError, "weight", {"weight": randn(4)}),
        (ValueError, "weight", {"weight": randn(5).to("meta")}),
        (ValueError, "eps", {"eps": -1.0}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_gather_errors_name_the_argument(error, name, call):
    given = {"x": randn(2, 9, 5), "indices": distinct(2, 3, limit=9), "weight": randn(5), **call}
    with pytest.raises(error, match=rf"^{name}: expected "):
        gather_normalize(given.pop("x"), given.pop("indices"), given.pop("weight"), **given)


def test_meta_and_backends():
    x, indices, weight = randn(2, 9, 5), distinct(2, 4, limit=9), randn(5, seed=4)
    with pytest.raises(RuntimeError, match="^gather_normalize: backend 'triton' cannot run: "):
        gather_normalize(x, indices, weight, backend="triton")
    x, indices, weight = (t.to("meta") for t in (x, indices, weight))
    assert gather_normalize(x, indices, weight).shape == (2, 4, 5)
