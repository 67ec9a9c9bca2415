"""Systematic sampling of keys by their inclusion probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.ops import soft_topk
from colt5_vision.positions import morton_order
from colt5_vision.swap import sampling
from tests.support.attention_cases import randn
from tests.support.marks import further

GRID = (6, 7)
TOKENS = 42


def sample_tokens(gates, k, grid, mask=None, generator=None):
    """Along the Z-order curve."""
    order = morton_order(*grid, gates.device)
    return sampling.sample_tokens(gates, k, order, mask=mask, generator=generator)


@st.composite
def samplings(draw):
    """Gates (B, R, N) of soft_topk, their number, the map and its mask."""
    height, width, seed = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 1 << 16)),
    )
    tokens, batch, routes = height * width, draw(st.integers(1, 2)), draw(st.integers(1, 2))
    k = draw(st.integers(1, tokens))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scores = randn(batch, routes, tokens, seed=seed).to(dtype) * draw(
        st.sampled_from([0.0, 1.0, 10.0])
    )
    mask = (
        (randn(batch, tokens, seed=seed + 1) > draw(st.sampled_from([0.0, 1.0])))
        if draw(st.booleans())
        else None
    )
    wide = None if mask is None else mask.unsqueeze(1).expand(-1, routes, -1)
    return soft_topk(scores, k, eps=2.0, mask=wide), k, (height, width), mask


@settings(max_examples=200)
@given(samplings(), st.one_of(st.none(), st.integers(0, 99)))
def test_sample_is_distinct_valid_and_holds_every_certain_token(problem, seed):
    gates, k, grid, mask = problem
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    indices, valid = sample_tokens(gates, k, grid, mask, generator)
    assert indices.shape == valid.shape == (*gates.shape[:2], k)
    assert indices.dtype == torch.int64 and valid.dtype == torch.bool
    assert ((indices >= 0) & (indices < gates.shape[-1])).all()
    for b in range(gates.shape[0]):
        usable = gates.shape[-1] if mask is None else int(mask[b].sum())
        for r in range(gates.shape[1]):
            chosen = indices[b, r][valid[b, r]].tolist()
            assert len(set(chosen)) == len(chosen)
            assert len(chosen) == min(k, usable)
            assert mask is None or mask[b, chosen].all()
            assert (gates[b, r, chosen] > 0).all()
            certain = (gates[b, r] > 1 - 1e-9).nonzero().flatten().tolist()
            assert set(certain) <= set(chosen)


@settings(max_examples=20)
@given(st.integers(0, 1 << 16), st.integers(2, 20))
def test_certain_tokens_are_taken_in_every_draw(seed, k):
    gates = soft_topk(randn(1, 1, TOKENS, seed=seed) * 8, k, eps=2.0)
    certain = (gates[0, 0] == 1).nonzero().flatten().tolist()
    for draw in [None, *range(20)]:
        generator = None if draw is None else torch.Generator().manual_seed(draw)
        indices, valid = sample_tokens(gates, k, GRID, None, generator)
        assert valid.all()
        assert set(certain) <= set(indices[0, 0].tolist())


@pytest.mark.parametrize("masked", [True, *further(False)])
def test_tokens_are_drawn_as_often_as_their_gates_say(masked):
    mask = randn(1, TOKENS, seed=21) > -0.3 if masked else None
    gates = soft_topk(
        randn(1, 2, TOKENS) * 3,
        9,
        eps=2.0,
        mask=None if mask is None else mask[:, None].expand(1, 2, -1),
    )
    generator, draws, counts = torch.Generator().manual_seed(0), 4000, torch.zeros(1, 2, TOKENS)
    for _ in range(draws):
        indices, valid = sample_tokens(gates, 9, GRID, mask, generator)
        counts.scatter_add_(-1, indices, valid.float())
    # a frequency's deviation is at most .008
    assert (counts / draws - gates).abs().max() < 0.035
    assert (counts / draws)[gates == 0].sum() == 0
    assert (gates == 1).any() and ((gates > 0.05) & (gates < 0.95)).sum() > 8


def test_sample_is_spread_and_the_same_by_default():
    gates = torch.full((2, 1, 64), 0.25)
    indices, valid = sample_tokens(gates, 16, (8, 8))
    again, _ = sample_tokens(gates.clone(), 16, (8, 8))
    assert torch.equal(indices, again) and valid.all()
    y, x = indices[0, 0] // 8, indices[0, 0] % 8
    assert sorted((y // 2 * 4 + x // 2).tolist()) == list(range(16))  # one of each 2 x 2 cell
    drawn = {
        tuple(
            sample_tokens(gates, 16, (8, 8), generator=torch.Generator().manual_seed(s))[0][
                0, 0
            ].tolist()
        )
        for s in range(20)
    }
    assert len(drawn) > 1


def test_empty_slots_where_fewer_tokens_are_valid():
    mask = torch.zeros(3, TOKENS, dtype=torch.bool)
    mask[0, [3, 17, 40]] = mask[1, 5] = True
    gates = soft_topk(randn(3, TOKENS), 6, eps=2.0, mask=mask).unsqueeze(1)
    indices, valid = sample_tokens(gates, 6, GRID, mask)
    assert valid.sum(-1).flatten().tolist() == [3, 1, 0]
    assert sorted(indices[0, 0][valid[0, 0]].tolist()) == [3, 17, 40]
    assert indices[1, 0][valid[1, 0]].tolist() == [5]
