"""``router="learned_grouped"``: starts as ``"grouped"``, keeps its contract once it is trained."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.tiles import FARTHEST, away_from, tiles_of
from colt5_vision.swap.window import maps_of
from tests.support.attention_cases import randn

WIDTH = 12
GRIDS = {"map": (9, 11), "volume": (2, 5, 7), "maps": ((1, 6, 7), (1, 4, 9)), "one token": (1, 1)}


def routing(keys=0.3, router="learned_grouped", trained=True):
    how = {"router": router, "dim": WIDTH} if router == "learned_grouped" else {}
    torch.manual_seed(0)
    made = GroupedAttention(window_size=3, num_heavy_tokens_kv=keys, **how)
    if trained and how:
        for part in (made.correction, made.place):
            torch.nn.init.normal_(part[-1].weight)
    return made


def inputs(grid, prefix=0, dtype=torch.float64):
    """q, k, v, and the arguments of a call."""
    tokens = sum(torch.Size(one).numel() for one in maps_of(grid))
    q, k, v = (randn(2, 4, prefix + tokens, 8, seed=i).to(dtype) for i in range(3))
    call = {"grid_size": grid, "num_prefix_tokens": prefix}
    return (2 * q, k, v), call | {"features": randn(2, tokens, WIDTH, seed=3).to(dtype)}


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_untrained_it_is_grouped_and_trained_another_choice(grid):
    qkv, call = inputs(grid)
    features = call.pop("features")
    expected = routing(router="grouped")(*qkv, **call)
    assert torch.equal(routing(trained=False)(*qkv, features=features, **call), expected)
    found = routing()(*qkv, features=features, **call)
    assert found.isfinite().all() and (grid == (1, 1) or not torch.equal(found, expected))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_key_routed_is_full_attention(grid, masked):
    qkv, call = inputs(grid, prefix=2)
    mask = None
    if masked:
        mask = randn(2, qkv[0].shape[2], seed=9) > -0.5
        mask[:, :2] = True
    seen = None if mask is None else mask[:, None, None]
    full = F.scaled_dot_product_attention(*qkv, attn_mask=seen)
    close(routing(1.0)(*qkv, key_mask=mask, **call), full)


def test_trained_networks_change_what_is_drawn():
    """A key that its network raises is drawn for every tile, one near a tile for that tile."""
    qkv, call = inputs((9, 11))
    seen, made = [], routing(5, trained=False)
    made.recorder = lambda *found: seen.append(found[0].unflatten(1, (-1, 5)))
    made(*qkv, **call)
    with torch.no_grad():
        made.correction[0].weight.zero_()[0, 0] = 1
        made.correction[0].bias.zero_()
        made.correction[-1].weight.zero_()[0, 0] = 1
    call["features"] = torch.zeros_like(call["features"])
    call["features"][:, 17, 0] = 30
    made(*qkv, **call)
    before, raised = ((found == 17).any(-1) for found in seen)
    assert raised.all() and not before.all()

    with torch.no_grad():
        made.place[0].weight.zero_()[0, 1] = 1  # whether it lies within the tile
        made.place[0].bias.zero_()
        made.place[-1].weight.zero_()[0, 0] = 30
    call["features"].zero_()
    made(*qkv, **call)
    tiles = tiles_of((9, 11), (3, 3), None)
    own = [(seen[-1][:, i].unsqueeze(-1) == tile).any(-1) for i, tile in enumerate(tiles)]
    everywhere = [(seen[0][:, i].unsqueeze(-1) == tile).any(-1) for i, tile in enumerate(tiles)]
    assert torch.stack(own).float().mean() > 0.7 > torch.stack(everywhere).float().mean()


def test_a_batch_gives_what_its_samples_give_and_masked_tokens_have_no_influence():
    qkv, call = inputs((9, 11), prefix=1)
    mask = randn(2, 100, seed=21) > -0.3
    mask[:, :1] = True
    made = routing()
    expected = made(*qkv, key_mask=mask, **call)
    for i in range(2):
        own = call | {"features": call["features"][i : i + 1], "key_mask": mask[i : i + 1]}
        close(made(*(x[i : i + 1] for x in qkv), **own), expected[i : i + 1], 1e-6)

    off = ~mask[:, None, :, None]
    junk = [x.masked_fill(off, float("nan")) for x in qkv]
    call["features"] = call["features"].masked_fill(~mask[:, 1:, None], 7.0)
    found = made(*junk, key_mask=mask, **call)
    kept = mask[:, None, :, None].expand_as(found)
    close(found[kept], expected[kept], 1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.003)]
)
def test_runs_in_lower_precision(dtype, tolerance):
    """As near as its roundings where all keys are drawn; few keys may be others."""
    qkv, call = inputs((9, 11), dtype=dtype)
    out = routing(1.0)(*qkv, **call)
    full = F.scaled_dot_product_attention(*(x.double() for x in qkv))
    assert out.dtype == dtype and (out - full).norm() < tolerance * full.norm()
    some = routing(trained=False)(*qkv, **call)
    assert some.dtype == dtype and 0.05 < (some - full).norm() / full.norm() < 1


def test_compiles_whole_copies_and_takes_a_gradient():
    qkv, call = inputs((9, 11), dtype=torch.float32)
    made = routing()
    expected = made(*qkv, **call)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(*qkv, **call), expected)
    close(torch.compile(made, fullgraph=True)(*qkv, **call), expected, 1e-4)
    leaves = [x.requires_grad_() for x in qkv]
    made(*leaves, **call).square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)


def test_bad_arguments_are_told():
    qkv, call = inputs((9, 11))
    del call["features"]
    with pytest.raises(ValueError, match=r"^features: expected \(2, 99, 12\).*got None"):
        routing()(*qkv, **call)
    for shape in ((2, 99, 5), (2, 98, 12), (1, 99, 12), (2, 1, 12), (99, 12)):
        with pytest.raises(ValueError, match=r"^features: expected \(2, 99, 12\)"):
            routing()(*qkv, features=torch.zeros(shape), **call)
    with pytest.raises(TypeError, match="^dim"):
        GroupedAttention(window_size=3, num_heavy_tokens_kv=3, router="learned_grouped")
    for name, value in (("dim", 4), ("device", "cpu")):
        with pytest.raises(ValueError, match=f"^{name}: expected None with router='grouped'"):
            GroupedAttention(window_size=3, num_heavy_tokens_kv=3, **{name: value})
    with pytest.raises(ValueError, match="^router: expected one of"):
        GroupedAttention(window_size=3, num_heavy_tokens_kv=3, router="sampled")


@pytest.mark.parametrize("grid", [(9, 11), (40, 90), (5, 9, 4), ((1, 6, 7), (1, 4, 9))])
def test_how_far_tokens_are_from_tiles(grid):
    tiles = tiles_of(
        grid, (3, 3) if len(grid) == 2 and isinstance(grid[0], int) else (1, 3, 3), None
    )
    away = away_from(tiles, grid)
    inside = torch.zeros_like(away, dtype=torch.bool)
    for tile, row in zip(tiles, inside):
        row[tile[tile >= 0]] = True
    assert torch.equal(away < 1, inside) and away.min() >= 0 and away.max() <= FARTHEST
    if grid == (9, 11):  # 3 x 3 tokens around (1, 1): (1, 7) is 6 tokens away, in halves of 3
        assert away[0, 18] == pytest.approx(4)
    if grid == ((1, 6, 7), (1, 4, 9)):
        first = (tiles < 42).all(1)
        assert (away[first, 42:] == FARTHEST).all() and (away[~first, :42] == FARTHEST).all()
