"""The teacher of a distillation, where tokens are masked: it learns from the others alone."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision import RoutedAttentionConfig
from colt5_vision.swap.adapter import LayerSpec
from colt5_vision.swap.learned import LEARNED
from colt5_vision.swap.reroute import RoutedLayer
from colt5_vision.swap.site import Scope
from colt5_vision.swap.switches import Switches
from colt5_vision.swap.teacher import Teacher, _ask_tiles
from colt5_vision.swap.tiles import group_of_token, tiles_of
from colt5_vision.swap.window import maps_of

GRIDS = {"map": (4, 6), "volume": (2, 3, 5), "maps": ((1, 4, 5), (1, 3, 4))}
HEADS, WIDTH = 2, 8


def inputs(grid, prefix, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + sum(map(math.prod, maps_of(grid)))
    shape = 3, 2, HEADS, tokens, WIDTH
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).unbind()


def taught(q, k, v, grid, prefix, key_mask=None, bias=None, router="learned"):
    """Output, error over that of the first router, and the router's gradients."""
    window = 2 if router == "learned" else 6  # a query that is a group of its own has no error
    config = RoutedAttentionConfig(window_size=window, num_heavy_tokens_kv=6, router=router)
    torch.manual_seed(0)
    attention = config.attention(dim=HEADS * WIDTH)
    torch.nn.init.normal_(attention.correction[-1].weight)
    layer = RoutedLayer("attn", LayerSpec(), config, attention, Scope(), Switches())
    teacher = Teacher(16)
    teacher.generator.manual_seed(0)
    out = teacher(
        layer,
        q,
        k,
        v,
        grid_size=grid,
        num_prefix_tokens=prefix,
        features=k[:, :, prefix:].transpose(1, 2).flatten(2),
        key_mask=key_mask,
        pair_bias=bias,
        scale=None,
        group=None,
    )
    gradients = [p.grad for p in attention.parameters()]
    assert all(g.isfinite().all() for g in gradients) and gradients[0].abs().max() > 0
    return out, torch.tensor(teacher.errors[layer]), gradients


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("router", LEARNED)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_masked_tokens_beside_the_map_are_as_if_they_were_not_there(grid, router):
    q, k, v = inputs(grid, 4)
    mask = torch.ones(2, k.shape[2], dtype=torch.bool)
    mask[:, :2] = False
    found = taught(q, k, v, grid, 4, mask, router=router)
    expected = taught(*(x[:, :, 2:] for x in (q, k, v)), grid, 2, router=router)
    close(found[0][:, :, 2:], expected[0])
    close(found[1:], expected[1:])


def falling(i, j):
    return (i - j).abs().double() * -0.1


@pytest.mark.parametrize(
    ("router", "bias"), [("learned", None), ("learned", falling), ("learned_grouped", None)]
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_what_stands_in_masked_tokens_of_the_map_has_no_influence(grid, router, bias):
    q, k, v = inputs(grid, 1)
    mask = torch.ones(2, k.shape[2], dtype=torch.bool)
    mask[0, -7:] = False
    expected = taught(q, k, v, grid, 1, mask, bias, router)
    dense = torch.zeros(())
    if bias is not None:
        place = torch.arange(k.shape[2])
        dense = bias(place[:, None], place)
    dense = dense.to(q.dtype).masked_fill(~mask[:, None, None], -torch.inf)
    full = scaled_dot_product_attention(q, k, v, attn_mask=dense)
    valid = mask[:, None, :, None].expand_as(full)
    close(expected[0][valid], full[valid])

    other = inputs(grid, 1, seed=1)
    q, k, v = (torch.where(mask[:, None, :, None], x, 9 * y) for x, y in zip((q, k, v), other))
    found = taught(q, k, v, grid, 1, mask, bias, router)
    close(found[0][valid], full[valid])
    close(found[1:], expected[1:])


def test_the_cost_of_a_key_is_what_a_query_loses_beyond_its_probe():
    q, k, v = (x[:1] for x in inputs(GRIDS["map"], 1))
    tokens, made = q.shape[2] - 1, RoutedAttentionConfig(router="learned_grouped", window_size=4)
    attention = made.attention(dim=HEADS * WIDTH)
    out = scaled_dot_product_attention(q, k, v)
    how = {"grid_size": GRIDS["map"], "num_prefix_tokens": 1, "key_mask": None, "scale": None}
    features = k[:, :, 1:].transpose(1, 2).flatten(2)
    rows = torch.arange(tokens)
    asked = {"features": features, "window_size": (4, 4), "pair_bias": None, "group": None}
    _, _, cost = _ask_tiles(attention, q, k, v, out, rows, **how, **asked)

    # by definition, one query after the other
    tiles = tiles_of(GRIDS["map"], (4, 4), None)
    probes = attention.probe(q, k, v, tiles, GRIDS["map"], 1, None, None)
    group = group_of_token(probes.groups, tokens)[0]
    share = (q @ k.mT * WIDTH**-0.5).softmax(-1)[0]
    expected = torch.zeros(len(tiles), tokens, dtype=torch.float64)
    for head in range(HEADS):
        attended = torch.cat([x[0, head] for x in probes.attention])
        for i in range(tokens):
            own = share[head, i + 1, 1:, None] * (v[0, head, 1:] - out[0, head, i + 1])
            g = group[i]
            probed = attended[g, 1:, None] * (v[0, head, 1:] - probes.out[0, head, g])
            tile = next(t for t, held in enumerate(tiles) if (held == i).any())
            expected[tile] += (own - probed).square().sum(-1)
    assert cost.min() >= 0 and cost.max() > 0.01
    close(cost[0], expected)
