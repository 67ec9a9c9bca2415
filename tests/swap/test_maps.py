"""Several maps in one sequence: each has windows of its own, and keys are routed of all."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.swap.grouped import GROUPED, GroupedAttention
from colt5_vision.swap.learned import LEARNED
from colt5_vision.swap.sampled import KINDS, SampledAttention
from colt5_vision.swap.tiles import tiles_of
from colt5_vision.swap.volume import curve_of, fold_maps, window_of_token
from tests.support.attention_cases import leaves, randn

GRIDS = [
    (((1, 4, 6), (1, 4, 6)), 2),  # windows divide both
    (((1, 5, 7), (1, 3, 4), (1, 1, 2)), 3),  # neither, and one is smaller than a window
    (((2, 3, 5), (1, 4, 4)), (2, 2, 3)),  # a volume and a map
]


def attention(window, keys=0.25, router="sampled", **how):
    torch.manual_seed(0)
    kind = GroupedAttention if router in GROUPED else SampledAttention
    return kind(window_size=window, num_heavy_tokens_kv=keys, router=router, **how)


def count(grids):
    return sum(map(math.prod, grids))


def tensors(grids, prefix=0, batch=2):
    q, k, v = (randn(batch, 2, prefix + count(grids), 8, seed=i) for i in range(3))
    return q * 2, k, v


def dense_window(grids, window):
    """(N, N) bool: whether two tokens are of one map and share a window in it."""
    window = window if isinstance(window, tuple) else (1, window, window)
    blocks = []
    for grid in grids:
        places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3)
        cells = places // torch.tensor(window)
        blocks.append((cells[:, None] == cells).all(-1))
    return torch.block_diag(*blocks).bool()


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grids", "window"), GRIDS)
def test_windows_are_dense_attention_under_the_mask_of_blocks(grids, window, prefix, masked):
    q, k, v = tensors(grids, prefix)
    mask = F.pad(dense_window(grids, window), (prefix, 0, prefix, 0), value=True)[None, None]
    key_mask = None
    if masked:
        key_mask = randn(2, q.shape[2], seed=9) > -0.5
        key_mask[:, :1] = True
        mask = mask & key_mask[:, None, None]
    call = {"grid_size": grids, "num_prefix_tokens": prefix, "key_mask": key_mask}
    found = attention(window, router="window")(q, k, v, **call)
    sees = mask.expand(2, 2, -1, -1).any(-1, keepdim=True)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    close(found, torch.where(sees, expected, 0))


@pytest.mark.parametrize("router", [r for r in (*KINDS, *GROUPED) if r != "window"])
@pytest.mark.parametrize(("grids", "window"), GRIDS)
def test_every_key_routed_is_full_attention(grids, window, router):
    if router in GROUPED:  # in a tile of four, every query is a probe
        window = 8
    q, k, v = tensors(grids, 2)
    call = {"grid_size": grids, "num_prefix_tokens": 2}
    how = {"router": router}
    if router in LEARNED:
        how, call = how | {"dim": 4}, call | {"features": randn(2, count(grids), 4)}
    full = F.scaled_dot_product_attention(q, k, v)
    close(attention(window, 1.0, **how)(q, k, v, **call), full, 1e-10)
    few = attention(window, 0.2, **how)(q, k, v, **call)
    assert few.isfinite().all() and (few - full).abs().max() > 1e-3
    if router not in GROUPED:
        some = attention(window, 0.2, num_heavy_tokens_q=0.5, **how)(q, k, v, **call)
        assert some.isfinite().all() and (some - few).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["sampled", "grid", "random", "grouped"])
def test_keys_are_routed_of_every_map_and_told_in_its_order(router):
    """Where all keys are alike, each map has its share of them; nothing else is recorded."""
    grids = ((1, 8, 8), (1, 4, 8), (1, 5, 7))
    part, seen = attention(4, 43, router=router), []
    part.recorder = lambda *found: seen.append(found)
    q = k = v = torch.zeros(1, 1, count(grids), 4)
    part(q, k, v, grid_size=grids)
    ((indices, _, grid),) = seen
    assert grid == grids and indices.max() < count(grids)
    which = torch.repeat_interleave(torch.tensor([64, 32, 35]))
    found = which[indices[indices >= 0]].bincount(minlength=3)
    even = which.bincount() / len(which)
    assert (found / found.sum() - even).abs().max() < (0.15 if router == "random" else 0.05)


def test_biases_of_pairs_keep_their_tokens():
    grids, window = GRIDS[1]
    q, k, v = tensors(grids, 1)
    bias = randn(q.shape[2], q.shape[2], seed=5)
    call = {"grid_size": grids, "num_prefix_tokens": 1, "pair_bias": lambda i, j: bias[i, j]}
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    close(attention(window, 1.0)(q, k, v, **call), expected, 1e-10)


def test_gradients_reach_every_token():
    grids = ((1, 5, 7), (1, 4, 3))
    inputs = leaves(2, 2, count(grids), 8)
    out = attention(3)(*inputs, grid_size=grids)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(g.isfinite().all() and g.abs().sum(-1).gt(0).all() for g in grads)


grid = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(st.lists(grid, min_size=1, max_size=4), grid)
def test_a_fold_holds_every_token_once_and_its_windows(grids, window):
    folded = fold_maps(tuple(grids), window)
    filled = torch.ones(len(folded.token), dtype=torch.bool)
    filled = filled if folded.filled is None else folded.filled
    every = torch.arange(count(grids))
    assert torch.equal(folded.token[filled].sort().values, every)
    assert torch.equal(folded.token[folded.place], every)
    assert torch.equal(folded.curve.sort().values, folded.place.sort().values)
    number = window_of_token(tuple(grids), window, None)
    together = number[:, None] == number
    assert torch.equal(together, dense_window(grids, window))
    assert torch.equal(folded.place // folded.grid[1], number) and folded.window[0] == 1


def test_curves_and_tiles_follow_each_other():
    grids = ((1, 40, 30), (1, 20, 20), (1, 1, 3))
    curve, tiles = curve_of(grids, None), tiles_of(grids, (1, 4, 4), None)
    start = 0
    for own in grids:
        tokens = torch.arange(start, start + math.prod(own))
        assert torch.equal(curve[tokens].sort().values, tokens)
        inside = torch.isin(tiles, tokens)
        assert not (inside & ~inside[:, :1] & (tiles >= 0)).any()  # a tile is of one map
        start += len(tokens)
    assert torch.equal(tiles[tiles >= 0].sort().values, torch.arange(start)) and len(tiles) <= 40


@pytest.mark.parametrize(
    "grids", [((1, 4, 6), (1, 2)), ((1, 4, 6), 3), ((1, 4, 6), (1, 2, 2)), ((0, 1, 1), (1, 4, 6))]
)
def test_bad_grids(grids):
    q, k, v = tensors(((1, 4, 6),))
    for router in ("sampled", "grouped"):
        with pytest.raises((TypeError, ValueError), match="grid_size"):
            attention(2, router=router)(q, k, v, grid_size=grids)
