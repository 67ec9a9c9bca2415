"""What the tests of the attention operators share."""

import torch

from colt5_vision.ops import routed_window_attention
from colt5_vision.ops.routed_window_attention import reference


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def leaves(*shape, seed=0, dtype=torch.float64, count=3):
    return [randn(*shape, seed=seed + i, dtype=dtype).requires_grad_() for i in range(count)]


def distinct(rows, size, limit, seed=0):
    """int64 (*rows, size), distinct within a row."""
    return randn(*rows, limit, seed=seed).argsort(-1)[..., :size]


def out_and_grads(function, inputs):
    out = function(*inputs)
    grads = torch.autograd.grad(
        out, [x for x in inputs if x is not None], randn(*out.shape, seed=99).to(out.dtype)
    )
    return out.detach(), *grads


def assert_same(found, expected, atol=1e-9):
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)


def errors(found, exact):
    """Root mean square error of each, relative to the root mean square of the exact one."""
    pairs = [(a.detach().cpu().double(), b) for a, b in zip(found, exact, strict=True)]
    assert all(a.isfinite().all() for a, _ in pairs)
    return [
        float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6))
        for a, b in pairs
    ]


def operator(**call):
    return lambda q, k, v, weights=None: routed_window_attention(
        q, k, v, log_weights=weights, **call
    )


def dense(**call):
    return lambda q, k, v, weights=None: reference.routed_window_attention(
        q, k, v, log_weights=weights, **call
    )
