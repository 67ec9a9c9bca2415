"""GroupedAttention against scaled dot-product attention, and as a router of the swap."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from colt5_vision import RoutedAttentionConfig
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import SampledAttention
from colt5_vision.swap.tiles import alike_groups, tiles_of
from tests.support.attention_cases import leaves, randn

GRIDS = [(6, 7), (13, 5), (2, 5, 4), (1, 1)]
GRID, TOKENS = (9, 11), 99


def routing(keys=0.25, window=3):
    return GroupedAttention(window_size=window, num_heavy_tokens_kv=keys)


def tensors(prefix=0, batch=2, tokens=TOKENS, dtype=torch.float64):
    q, k, v = (randn(batch, 4, prefix + tokens, 8, seed=i).to(dtype) for i in range(3))
    return 2 * q, k, v


def some_mask(batch, prefix, tokens=TOKENS):
    mask = randn(batch, prefix + tokens, seed=21) > -0.3
    mask[:, :prefix] = True
    return mask


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_every_key_routed_is_full_attention(grid, prefix, masked):
    tokens = torch.Size(grid).numel()
    q, k, v = tensors(prefix, tokens=tokens)
    mask = some_mask(2, prefix, tokens) if masked and tokens > 1 else None
    want = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None, None], scale=0.3
    )
    call = {"grid_size": grid, "num_prefix_tokens": prefix, "key_mask": mask, "scale": 0.3}
    close(routing(1.0)(q, k, v, **call), want)
    close(routing(10**6)(q, k, v, **call), want)


@pytest.mark.parametrize("grid", [(6, 7), (40, 90), (109, 109), (5, 9, 4), (1, 300)])
@pytest.mark.parametrize("window", [2, 16])
def test_tiles_hold_every_token_once_and_are_few(grid, window):
    tiles = tiles_of(grid, (window,) * len(grid), None)
    held = tiles[tiles >= 0].sort().values
    assert torch.equal(held, torch.arange(torch.Size(grid).numel()))
    assert tiles.shape[1] % 4 == 0 and len(tiles) <= 40
    if grid == (40, 90):
        y, x = tiles // 90, tiles % 90
        spread = [t.masked_fill(tiles < 0, -1).amax(1) - t.amin(1) for t in (y, x)]
        assert max(s.max() for s in spread) < 90 / 2


def test_groups_are_of_alike_queries():
    """Two kinds of queries, one here and one there: no group has both."""
    kinds = randn(TOKENS, seed=5) > 0
    q, k, _ = tensors(batch=1)
    q = 0.05 * q + torch.where(kinds[:, None], 3.0, -3.0)
    tiles = tiles_of(GRID, (3, 3), None)
    groups = alike_groups(q, k, tiles, torch.arange(TOKENS), 0, None, 0.3)[0]
    assert torch.equal(
        groups.unflatten(0, (len(tiles), -1)).flatten(1).sort().values, tiles.sort().values
    )
    there, mixed = groups >= 0, 0
    for members, valid in zip(groups, there):
        mixed += len(kinds[members[valid]].unique()) > 1
    # a tile with an odd number of a kind has one group of both, at most
    assert mixed <= len(tiles) < len(groups) / 3


def test_keys_of_each_tile_are_those_it_attends_to():
    """Every tile's queries point at keys of its own."""
    grid, tokens = (16, 16), 256
    tiles = tiles_of(grid, (8, 8), None)
    q, k, v = (torch.zeros(1, 1, tokens, 16, dtype=torch.float64) for _ in range(3))
    q[..., :4], k[..., 4:], v[:] = 0, 0.1 * randn(tokens, 12, seed=1), randn(tokens, 16, seed=2)
    wanted = torch.arange(tokens).view(len(tiles), -1)[:, :6] + 3  # six keys for each tile
    for number, members in enumerate(tiles):
        axis = number % 4
        q[:, :, members, axis] = 12.0 + number
        k[:, :, wanted[number], axis] += 3.0
    seen = []
    part = routing(12, 8)
    part.recorder = lambda indices, weights, where: seen.append((indices, weights, where))
    out = part(q, k, v, grid_size=grid)
    indices, weights, where = seen[0]
    assert where == grid and indices.shape == weights.shape == (1, 12 * len(tiles))
    for number in range(len(tiles)):
        own = indices[0].view(len(tiles), 12)[number].tolist()
        assert set(wanted[number].tolist()) <= set(own)
    full = F.scaled_dot_product_attention(q, k, v)
    sampled = SampledAttention(window_size=8, num_heavy_tokens_kv=12)(q, k, v, grid_size=grid)
    assert (out - full).norm() < 0.3 * (sampled - full).norm()


def test_the_mean_query_of_a_group_gets_full_attention():
    """Queries that are all alike within a tile are their own probe."""
    tiles = tiles_of(GRID, (3, 3), None)
    q, k, v = tensors(2)
    for number, members in enumerate(tiles):
        q[:, :, members[members >= 0] + 2] = q[:, :, number + 2 : number + 3].clone()
    out = routing(5)(q, k, v, grid_size=GRID, num_prefix_tokens=2)
    close(out, F.scaled_dot_product_attention(q, k, v))


def test_more_keys_come_closer_and_draws_differ():
    q, k, v = tensors(1)
    full = F.scaled_dot_product_attention(q, k, v)
    call = {"grid_size": GRID, "num_prefix_tokens": 1}
    errors = [(routing(n)(q, k, v, **call) - full).norm() for n in (6, 25, 80)]
    assert errors[0] > errors[1] > errors[2] > 1e-3
    part = routing(6)
    fixed = part(q, k, v, **call)
    drawn = part(q, k, v, generator=torch.Generator().manual_seed(1), **call)
    assert torch.equal(part(q, k, v, **call), fixed) and not torch.equal(drawn, fixed)
    part.generator = torch.Generator().manual_seed(1)
    assert torch.equal(part(q, k, v, **call), drawn)


def test_a_batch_gives_what_its_samples_give():
    q, k, v = tensors(1, batch=3)
    mask, call = some_mask(3, 1), {"grid_size": GRID, "num_prefix_tokens": 1}
    whole = routing()(q, k, v, key_mask=mask, **call)
    for i in range(3):
        own = [x[i : i + 1] for x in (q, k, v)]
        close(routing()(*own, key_mask=mask[i : i + 1], **call), whole[i : i + 1])
    none = routing()(*(x[:0] for x in (q, k, v)), **call)
    assert none.shape == (0, 4, TOKENS + 1, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sample_leaves_the_others_unharmed(value):
    inputs = [x.float() for x in tensors(1, batch=3)]
    call = {"grid_size": GRID, "num_prefix_tokens": 1}
    want = routing()(*inputs, **call)
    for x in inputs:
        x[1] = value
    assert torch.equal(routing()(*inputs, **call)[::2], want[::2])


def test_masked_tokens_have_no_influence():
    inputs = [x.requires_grad_() for x in tensors(2)]
    mask = some_mask(2, 2)
    mask[0, 9:] = False  # fewer valid tokens than slots
    call = {"grid_size": GRID, "num_prefix_tokens": 2, "key_mask": mask}
    out, rows = routing(0.4)(*inputs, **call), mask[:, None, :, None]
    grads = torch.autograd.grad((out * rows).square().sum(), inputs)
    assert all((g * ~rows).abs().max() == 0 and g.isfinite().all() and g.any() for g in grads)
    hidden = [torch.where(rows, x.detach(), float("nan")) for x in inputs]
    close(routing(0.4)(*hidden, **call).where(rows, 0), out.where(rows, 0))
    short = {**call, "key_mask": mask[:, 2:]}
    close(routing(0.4)(*inputs, **short).where(rows, 0), out.where(rows, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_comes_close(dtype):
    exact, call = tensors(1), {"grid_size": GRID, "num_prefix_tokens": 1}
    out = routing(1.0)(*(x.to(dtype) for x in exact), **call)
    assert out.dtype == dtype
    limit = {torch.float32: 1e-5, torch.float16: 0.01}.get(dtype, 0.06)
    assert (out - F.scaled_dot_product_attention(*exact)).abs().max() < limit
    assert routing()(*(x.to(dtype) for x in exact), **call).isfinite().all()


def test_compiles_whole_and_copies():
    part, inputs = routing(), leaves(2, 4, TOKENS + 1, 8)
    call = {"grid_size": GRID, "num_prefix_tokens": 1, "key_mask": some_mask(2, 1)}
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    outs = [f(*inputs, **call) for f in (part, compiled)]
    close(*outs)
    close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs))
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(twin(*inputs, **call), outs[0])
        assert repr(twin) == repr(part) and "router='grouped'" in repr(part)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"pair_bias": lambda i, j: 0.0}, "pair_bias: expected None with router='grouped'"),
        ({"features": torch.zeros(1)}, "features: expected None"),
        ({"num_heavy_tokens_q": 4}, "num_heavy_tokens_q: expected None"),
        ({"grid_size": (9, 10)}, "grid_size: expected a product of 99"),
        ({"num_heavy_tokens_kv": 0}, "num_heavy_tokens_kv"),
        ({"window_size": 0}, "window_size"),
    ],
)
def test_bad_arguments_are_told(how, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        routing()(*tensors(), **({"grid_size": GRID} | how))


def test_a_configuration_makes_it_and_refuses_what_it_ignores():
    config = RoutedAttentionConfig(router="grouped", window_size=4, num_heavy_tokens_kv=7)
    assert repr(config.attention()) == repr(routing(7, 4))
    assert RoutedAttentionConfig.from_dict(config.to_dict()) == config
    for change in (
        {"num_heavy_tokens_q": 9},
        {"schedule": [{"min_tokens": 100, "num_heavy_tokens_q": 0.5}]},
    ):
        with pytest.raises(ValueError, match="^num_heavy_tokens_q: expected None"):
            RoutedAttentionConfig(router="grouped", **change)
