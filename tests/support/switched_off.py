"""Calls of the attention operators with a key that its log weight, or log mass, of -inf removes."""

import torch

from tests.support.attention_cases import distinct, randn

INF = float("inf")
GRID = {"grid_size": (4, 5), "window_size": (2, 3)}


def inputs(prefix, dtype):
    """q, k, v (2, 4, P + 20, 8)."""
    return [randn(2, 4, prefix + 20, 8, seed=s, dtype=dtype) for s in range(3)]


def broken(x, value, rows, prefix):
    """``x`` (B, heads, P + N, ...) with ``value`` in tokens ``rows`` (B, R) of the heads of each
    route."""
    x, share = x.clone(), x.shape[1] // rows.shape[1]
    for b in range(rows.shape[0]):
        for h in range(x.shape[1]):
            x[b, h, prefix + rows[b, h // share]] = value
    return x


def removed_route(prefix, dtype=torch.float64):
    """Leaves, keywords, and the tokens (B, R) that the first slot of each route holds, removed."""
    routed = distinct((2, 2), 5, 20, 3)
    weights = randn(2, 2, 5, seed=4, dtype=dtype)
    weights[..., 0] = -INF
    call = {"routed_indices": routed, "num_prefix_tokens": prefix, **GRID}
    return [*inputs(prefix, dtype), weights], call, routed[..., 0]


def removed_group(prefix, dtype=torch.float64):
    """The same of three groups, which share no key: leaves with pooled keys, of which the first is
    off; groups and keys; tokens (B, 1), which the first group lists."""
    members = distinct((2, 2), 18, 20, 5).unflatten(-1, (3, 6))
    keys = distinct((2, 1), 12, 20, 6).unflatten(-1, (3, 4))
    weights = randn(2, 1, 3, 4, seed=7, dtype=dtype)
    weights[:, :, 0, 0] = -INF
    pooled = [randn(2, 4, 3, 2, 8, seed=s, dtype=dtype) for s in (8, 9)]
    mass = randn(2, 4, 3, 2, seed=10, dtype=dtype)
    mass[..., 0] = -INF
    leaves = [*inputs(prefix, dtype), weights, *pooled, mass]
    return leaves, (members, keys), keys[:, :, 0, 0]
