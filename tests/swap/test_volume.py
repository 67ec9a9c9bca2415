"""3-D windows over volumes (T, H, W): any sizes, ragged at the far borders."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.swap.sampled import KINDS, SampledAttention
from colt5_vision.swap.volume import fold_volume, window_of_token
from tests.support.attention_cases import leaves, randn
from tests.support.marks import exhaustive


def attention(window, keys=0.25, **how):
    torch.manual_seed(0)
    return SampledAttention(window_size=window, num_heavy_tokens_kv=keys, **how)


def tensors(grid, prefix=0, batch=2):
    length = prefix + grid[0] * grid[1] * grid[2]
    q, k, v = (randn(batch, 2, length, 8, seed=i) for i in range(3))
    return q * 2, k, v


def dense_window(grid, window):
    """(N, N) bool: whether two tokens share a 3-D window, from their coordinates."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    cells = [(x // side).flatten() for x, side in zip((t, h, w), window)]
    return torch.stack([c[:, None] == c for c in cells]).all(0)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


GRIDS = [
    ((4, 6, 8), (2, 3, 4)),  # all sides divide
    ((5, 7, 3), (2, 3, 2)),  # none does
    ((3, 5, 7), (2, 5, 4)),
    ((7, 2, 5), (3, 4, 9)),  # windows as large as the volume
    ((2, 9, 4), (1, 4, 4)),  # single frames
    ((6, 1, 5), (4, 1, 2)),
]


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_windows_are_dense_attention_under_the_3d_mask(grid, window, prefix, masked):
    q, k, v = tensors(grid, prefix)
    mask = dense_window(grid, window)
    mask = F.pad(mask, (prefix, 0, prefix, 0), value=True)[None, None]
    key_mask = None
    if masked:
        key_mask = randn(2, prefix + len(mask[0, 0]) - prefix, seed=9) > -0.5
        key_mask[:, :1] = True
        mask = mask & key_mask[:, None, None]
    call = {"grid_size": grid, "num_prefix_tokens": prefix, "key_mask": key_mask}
    found = attention(window, router="window")(q, k, v, **call)
    sees = mask.expand(2, 2, -1, -1).any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(found, torch.where(sees, expected, 0))


@pytest.mark.parametrize("router", [r for r in KINDS if r != "window"])
@pytest.mark.parametrize(("grid", "window"), GRIDS[:3])
def test_every_key_routed_is_full_attention(grid, window, router):
    q, k, v = tensors(grid, 2)
    how = {"router": router} | ({"dim": 4} if router == "learned" else {})
    call = {"grid_size": grid, "num_prefix_tokens": 2}
    if router == "learned":
        call["features"] = randn(2, q.shape[2] - 2, 4)
    full = F.scaled_dot_product_attention(q, k, v)
    close(attention(window, 1.0, **how)(q, k, v, **call), full, 1e-10)
    few = attention(window, 0.2, num_heavy_tokens_q=0.5, **how)(q, k, v, **call)
    assert few.isfinite().all() and (few - full).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["sampled", "grid", "random"])
def test_routed_keys_are_spread_over_the_volume(router):
    grid = (8, 8, 8)
    part = attention((3, 3, 3), 64, router=router)
    volume = fold_volume(grid, (3, 3, 3))
    q = k = v = torch.zeros(1, 1, volume.token.shape[0], 4)
    mask = volume.filled.unsqueeze(0)
    where = {"grid_size": volume.grid, "curve": volume.curve, "key_mask": mask}
    call = {"window_size": volume.window, **where}
    probes = part.probe(q, k, v, **call) if part.samples else None
    indices, _ = part.route(q, k, 64, probes=probes, **where)
    assert mask[0, indices[0]].all()
    token = volume.token[indices[0]]
    cell = (token // 64 // 2) * 16 + (token // 8 % 8 // 2) * 4 + token % 8 // 2
    counts = cell.bincount(minlength=64)
    assert counts.max() <= (5 if router == "random" else 2)
    if router != "random":
        assert (counts == 1).sum() >= 56


def test_one_or_two_numbers_are_windows_of_single_frames():
    grid = (3, 6, 6)
    q, k, v = tensors(grid)
    expected = attention((1, 4, 2))(q, k, v, grid_size=grid)
    close(attention((4, 2))(q, k, v, grid_size=grid), expected)
    square = attention((1, 3, 3))(q, k, v, grid_size=grid)
    close(attention(3)(q, k, v, grid_size=grid), square)
    q, k, v = tensors((1, 6, 6))
    close(attention((5, 3, 3))(q, k, v, grid_size=(6, 6)), attention(3)(q, k, v, grid_size=(6, 6)))


def test_biases_of_pairs_keep_their_tokens():
    grid, window = (3, 5, 4), (2, 2, 2)
    q, k, v = tensors(grid, 1)
    bias = randn(61, 61, seed=5)
    call = {"grid_size": grid, "num_prefix_tokens": 1, "pair_bias": lambda i, j: bias[i, j]}
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    close(attention(window, 1.0)(q, k, v, **call), expected, 1e-10)
    mask = F.pad(dense_window(grid, window), (1, 0, 1, 0), value=True)
    bias_in_window = bias.masked_fill(~mask, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_in_window)
    close(attention(window, router="window")(q, k, v, **call), expected, 1e-10)


def test_gradients_reach_every_token():
    inputs = leaves(2, 2, 105, 8)
    out = attention((2, 3, 2))(*inputs, grid_size=(5, 7, 3))
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(g.isfinite().all() and g.abs().sum(-1).gt(0).all() for g in grads)


@exhaustive
def test_compiles_with_sizes_that_change():
    torch.compiler.reset()
    part = attention((2, 3, 2))
    fast = torch.compile(part, fullgraph=True, dynamic=True, backend="eager")
    for grid in ((4, 6, 5), (5, 7, 3)):
        q, k, v = tensors(grid)
        close(fast(q, k, v, grid_size=grid), part(q, k, v, grid_size=grid), 1e-10)


sides = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(st.tuples(sides, sides, sides), st.tuples(sides, sides, sides))
def test_a_fold_holds_every_token_once_and_its_windows(grid, window):
    volume = fold_volume(grid, window)
    tokens = grid[0] * grid[1] * grid[2]
    filled = torch.ones(len(volume.token), dtype=torch.bool)
    filled = filled if volume.filled is None else volume.filled
    assert sorted(volume.token[filled].tolist()) == list(range(tokens))
    assert torch.equal(volume.token[volume.place], torch.arange(tokens))
    assert sorted(volume.curve.tolist()) == sorted(volume.place.tolist())
    place = volume.place
    row, column = place // volume.grid[1], place % volume.grid[1]
    cells = torch.stack([row // volume.window[0], column // volume.window[1]])
    together = (cells[:, :, None] == cells[:, None]).all(0)
    assert torch.equal(together, dense_window(grid, window))
    number = window_of_token(grid, window, None)
    assert torch.equal(number[:, None] == number, together)
    sides = [-(-n // min(w, n)) * min(w, n) for n, w in zip(grid, window)]
    assert len(volume.token) <= sides[0] * sides[1] * sides[2]


@pytest.mark.parametrize("window", [0, (1, 2, 3, 4), (2, 0), (1, 2.0, 3), "3", ()])
def test_bad_windows(window):
    with pytest.raises((TypeError, ValueError), match="window_size"):
        attention(window)
