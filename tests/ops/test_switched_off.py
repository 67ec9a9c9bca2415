"""A key that is switched off does not matter, whatever stands in it: 0 times NaN would be NaN."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from colt5_vision.ops import PooledKeys, grouped_attention, routed_window_attention
from colt5_vision.ops.grouped_attention import reference as grouped_reference
from colt5_vision.ops.routed_window_attention import reference as window_reference
from tests.support.switched_off import broken, removed_group, removed_route

VALUES = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
PATHS = pytest.mark.parametrize("path", ["fused", "plain", "reference"])


def outcome(function, leaves, path):
    """Output and gradients; a specification is not asked for gradients."""
    given = [x.detach().requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.MATH) if path == "plain" else nullcontext():
        out = function(*given)
        if path == "reference":
            return (out.detach(),)
        return out.detach(), *torch.autograd.grad(out.sin().sum(), given)


def check(function, clean, spoilt, path):
    found, want = (outcome(function, leaves, path) for leaves in (spoilt, clean))
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def by_window(path):
    found = path == "reference"
    return window_reference.routed_window_attention if found else routed_window_attention


@VALUES
@PATHS
def test_a_removed_routed_key(path, value):
    """No query of the map reads it, in its own window neither."""
    (q, k, v, weights), call, tokens = removed_route(0)

    def function(q, k, v, weights):
        return by_window(path)(q, k, v, log_weights=weights, **call)

    spoilt = [q, *(broken(x, value, tokens, 0) for x in (k, v)), weights]
    check(function, [q, k, v, weights], spoilt, path)


@VALUES
@PATHS
def test_a_removed_key_that_the_prefix_reads(path, value):
    (q, k, v, weights), call, tokens = removed_route(2)
    with sdpa_kernel(SDPBackend.MATH) if path == "plain" else nullcontext():
        want = by_window(path)(q, k, v, log_weights=weights, **call)
        k, v = (broken(x, value, tokens, 2) for x in (k, v))
        found = by_window(path)(q, k, v, log_weights=weights, **call)
    torch.testing.assert_close(found[:, :, 2:], want[:, :, 2:], rtol=1e-9, atol=1e-9)
    assert not found[:, :, :2].isfinite().all(-1).any()


@VALUES
@PATHS
def test_a_key_removed_beyond_its_window(path, value):
    """Where weights hold beyond the own window only, the window still reads it, and nobody else."""
    (q, k, v, weights), call, tokens = removed_route(0)
    call["weight_own_window"] = False
    window = window_reference.window_of(4, 5, (2, 3))
    apart = window[tokens][..., None] != window  # (B, R, N)
    apart = apart.repeat_interleave(2, 1)
    with sdpa_kernel(SDPBackend.MATH) if path == "plain" else nullcontext():
        want = by_window(path)(q, k, v, log_weights=weights, **call)
        k, v = (broken(x, value, tokens, 0) for x in (k, v))
        found = by_window(path)(q, k, v, log_weights=weights, **call)
    torch.testing.assert_close(found[apart], want[apart], rtol=1e-9, atol=1e-9)
    assert not found[~apart].isfinite().all(-1).any()


@VALUES
@PATHS
def test_a_key_that_a_group_removes(path, value):
    leaves, (members, keys), tokens = removed_group(0)
    operator = grouped_reference.grouped_attention if path == "reference" else grouped_attention

    def function(q, k, v, weights, *pooled):
        return operator(q, k, v, members, keys, PooledKeys(*pooled), log_weights=weights)

    spoilt = list(leaves)
    spoilt[1], spoilt[2] = (broken(x, value, tokens, 0) for x in leaves[1:3])
    spoilt[4], spoilt[5] = (x.clone() for x in leaves[4:6])
    spoilt[4][..., 0, :] = spoilt[5][..., 0, :] = value
    check(function, leaves, spoilt, path)
