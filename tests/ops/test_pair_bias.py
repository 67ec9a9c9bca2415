"""routed_window_attention with a bias of (query, key) pairs against dense attention with the whole
bias."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.ops import routed_window_attention
from tests.support.attention_cases import (
    assert_same,
    distinct,
    leaves,
    operator,
    out_and_grads,
    randn,
)
from tests.support.dense import window_of

gathered = sys.modules["colt5_vision.ops.routed_window_attention.gathered"]
INF = float("inf")


def lookup(table):
    """(B or 1, heads or 1, L, L) as a function of positions."""
    batch, heads = (
        torch.arange(n).view(shape)
        for n, shape in zip(table.shape, ((-1, 1, 1, 1, 1), (1, -1, 1, 1, 1)))
    )
    return lambda i, j: table[batch, heads, i, j]


def dense_with_bias(
    *,
    grid_size,
    window_size,
    routed_indices,
    num_prefix_tokens,
    key_mask,
    query_indices,
    scale,
    weight_own_window=True,
):
    """Plain attention over all keys, its mask built pair by pair."""

    def run(q, k, v, weights, table):
        (batch, heads, length, dim), prefix = q.shape, num_prefix_tokens
        window = window_of(*grid_size, window_size)
        seen = torch.zeros(batch, heads, length, length, dtype=torch.bool)
        seen[..., :prefix] = seen[..., :prefix, :] = True
        seen[..., prefix:, prefix:] = window[:, None] == window[None, :]
        bias = torch.zeros(batch, heads, length, dtype=q.dtype)
        if weights is not None:  # empty slots leave it unused: a gradient of 0
            bias = bias + 0 * weights.sum()
        routes = 1 if routed_indices.ndim == 2 else routed_indices.shape[1]
        share = heads // routes
        indices = routed_indices.reshape(batch, routes, -1)
        columns, values, where = [], [], []
        for b in range(batch):
            for h in range(heads):
                for slot, j in enumerate(indices[b, h // share].tolist()):
                    if j >= 0:
                        seen[b, h, prefix:, prefix + j] = True
                        columns.append((b, h, prefix + j))
                        where.append((b, h // share, slot))
        if weights is not None and columns:
            values = weights.reshape(batch, routes, -1)[tuple(torch.tensor(where).T)]
            bias = bias.index_put(tuple(torch.tensor(columns).T), values.to(q.dtype))
        image = torch.arange(length) >= prefix  # prefix queries see every key as it is
        logits = q @ k.mT * (dim**-0.5 if scale is None else scale)
        weighed = image[:, None].expand(length, length).clone()
        if not weight_own_window:
            weighed[prefix:, prefix:] &= window[:, None] != window[None, :]
        logits = logits + bias.unsqueeze(2) * weighed + (0 if table is None else table)
        if key_mask is not None:
            full = torch.ones(batch, length, dtype=torch.bool)
            full[:, length - key_mask.shape[1] :] = key_mask
            seen &= full[:, None, None]
        seen = seen & (logits > -INF)
        alive = seen.any(-1, keepdim=True)
        out = logits.masked_fill(~seen, -INF).masked_fill(~alive, 0).softmax(-1) * alive @ v
        if query_indices is None:
            return out
        rows = [torch.cat([torch.arange(prefix), row + prefix]) for row in query_indices]
        return torch.stack([out[b][:, rows[b]] for b in range(batch)])

    return run


def with_bias(call):
    def run(q, k, v, weights, table):
        bias = lookup(table) if table is not None else lambda i, j: torch.zeros((), dtype=q.dtype)
        return operator(pair_bias=bias, **call)(q, k, v, weights)

    return run


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 1 << 16))
    batch, (heads, routes) = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)])),
    )
    height, width, prefix = (
        draw(st.integers(1, 7)),
        draw(st.integers(1, 7)),
        draw(st.sampled_from([0, 0, 1, 3])),
    )
    tokens = height * width
    length = prefix + tokens
    q, k, v = leaves(batch, heads, length, draw(st.sampled_from([1, 3, 8])), seed=seed)
    shape = draw(st.sampled_from([None, (1, 1), (1, heads), (batch, heads), (batch, 1)]))
    table = None if shape is None else randn(*shape, length, length, seed=seed + 3).requires_grad_()
    routed = distinct((batch, routes), draw(st.integers(0, min(tokens, 9))), tokens, seed)
    if draw(st.booleans()):  # empty slots
        routed = torch.where(randn(*routed.shape, seed=seed + 4) > 0.5, -1, routed)
    weights = (
        randn(*routed.shape, seed=seed + 5) if routed.shape[-1] and draw(st.booleans()) else None
    )
    if routes == 1 and draw(st.booleans()):
        routed, weights = routed[:, 0], None if weights is None else weights[:, 0]
    masked = draw(st.sampled_from([0, 0, tokens, length]))
    call = {
        "grid_size": (height, width),
        "window_size": draw(
            st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
        ),
        "num_prefix_tokens": prefix,
        "scale": draw(st.sampled_from([None, 0.1, 1.0])),
        "routed_indices": routed,
        "key_mask": randn(batch, masked, seed=seed + 6) > draw(st.sampled_from([-1, 0.5]))
        if masked
        else None,
        "query_indices": distinct((batch,), draw(st.integers(1, tokens)), tokens, seed + 7)
        if draw(st.booleans())
        else None,
        "weight_own_window": draw(st.booleans()),
    }
    return [q, k, v, None if weights is None else weights.requires_grad_(), table], call


@pytest.mark.parametrize("held", [1 << 25, 1, 700])
def test_equals_dense_attention_with_the_bias(held, monkeypatch):
    monkeypatch.setattr(gathered, "_LOGITS", held)  # one step for all windows, one each, a few

    @settings(max_examples=100)
    @given(problems())
    def check(problem):
        inputs, call = problem
        if inputs[4] is None:  # a bias of 0 without a gradient
            inputs, run = inputs[:4], [with_bias(call), dense_with_bias(**call)]
            assert_same(*(out_and_grads(lambda *x, f=f: f(*x, None), inputs) for f in run))
        else:
            assert_same(
                *(out_and_grads(f, inputs) for f in (with_bias(call), dense_with_bias(**call)))
            )

    check()


def call_of(height, width, keys, *, prefix=0, batch=2, **how):
    call = {
        "routed_indices": distinct((batch, 1), keys, height * width),
        "scale": None,
        "query_indices": None,
    }
    call |= {
        "grid_size": (height, width),
        "window_size": 3,
        "num_prefix_tokens": prefix,
        "key_mask": None,
    }
    return call | how


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 7), (1, 11), (9, 2)])
def test_every_token_routed_is_full_attention_with_the_bias(prefix, grid):
    tokens = grid[0] * grid[1]
    inputs = leaves(2, 4, prefix + tokens, 8)
    table = randn(2, 4, prefix + tokens, prefix + tokens, seed=7).requires_grad_()
    call = call_of(*grid, tokens, prefix=prefix)
    found = out_and_grads(lambda *x: with_bias(call)(*x[:3], None, x[3]), [*inputs, table])
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert_same(
        found, out_and_grads(lambda q, k, v, t: sdpa(q, k, v, attn_mask=t), [*inputs, table])
    )
    assert found[4].any()


@pytest.mark.parametrize("held", [1 << 25, 1])
def test_minus_infinity_removes_a_pair_and_a_row_without_keys_gives_zero(held, monkeypatch):
    monkeypatch.setattr(gathered, "_LOGITS", held)
    inputs, call = leaves(2, 4, 2 + 35, 8), call_of(5, 7, 6, prefix=2)
    off = randn(2, 4, 37, 37, seed=8) > 0.7
    off[:, :, [1, 20]] = True
    off[0, 2, 9] = True
    table = randn(2, 4, 37, 37, seed=9).masked_fill(off, -INF).requires_grad_()
    weights = randn(2, 1, 6, seed=5).requires_grad_()
    found = out_and_grads(with_bias(call), [*inputs, weights, table])
    assert_same(found, out_and_grads(dense_with_bias(**call), [*inputs, weights, table]))
    assert found[0][:, :, [1, 20]].abs().max() == 0 and found[0][0, 2, 9].abs().max() == 0
    assert found[0][:, :, 3].all()
    assert found[5][off].abs().max() == 0


def test_a_masked_sample_gives_zero_and_finite_gradients():
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[1] = False
    inputs, call = leaves(2, 2, 35, 8), call_of(5, 7, 6, key_mask=mask)
    table = randn(1, 2, 35, 35, seed=9).requires_grad_()
    out, *grads = out_and_grads(
        with_bias(call), [*inputs, randn(2, 1, 6, seed=5).requires_grad_(), table]
    )
    assert out[1].abs().max() == 0 and out[0].all()
    assert all(g.isfinite().all() for g in grads)
    assert all(g[1].abs().max() == 0 for g in grads[:3])


def test_masked_keys_are_not_read():
    mask = randn(2, 35, seed=3) > 0
    inputs, call = [x.detach() for x in leaves(2, 2, 35, 8)], call_of(5, 7, 6, key_mask=mask)
    table = randn(1, 2, 35, 35, seed=9)
    expected = with_bias(call)(*inputs, None, table)
    for i in (1, 2):
        inputs[i] = inputs[i].masked_fill(~mask[:, None, :, None], float("nan"))
    table = table.expand(2, -1, -1, -1).masked_fill(~mask[:, None, None], float("nan"))
    assert torch.equal(with_bias(call)(*inputs, None, table), expected)


def test_a_weight_of_minus_infinity_removes_its_key():
    inputs, call = leaves(2, 2, 35, 8), call_of(5, 7, 6)
    table = randn(1, 2, 35, 35, seed=9)
    weights = randn(2, 1, 6, seed=5)
    weights[..., 2:] = -INF
    window = window_of(5, 7, 3)
    kept = {**call, "routed_indices": call["routed_indices"][..., :2]}
    found = with_bias(call)(*inputs, weights, table)
    expected = with_bias(kept)(*inputs, weights[..., :2], table)
    # within its window a routed key is the routed one, here removed
    removed = call["routed_indices"][:, 0, 2:]
    for b in range(2):
        rows = torch.tensor([w not in window[removed[b]].tolist() for w in window.tolist()])
        assert rows.any()
        assert_same([found[b][:, rows]], [expected[b][:, rows]])
        assert (found[b][:, ~rows] - expected[b][:, ~rows]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [1 << 25, 1])
def test_half_precision_is_finite_and_close(dtype, held, monkeypatch):
    monkeypatch.setattr(gathered, "_LOGITS", held)
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[0, 10:], mask[1] = False, False
    for key_mask in (None, mask):
        call = call_of(5, 7, 6, prefix=2, key_mask=key_mask)
        exact = [
            *leaves(2, 4, 37, 8),
            randn(2, 1, 6, seed=5).requires_grad_(),
            randn(1, 4, 37, 37).requires_grad_(),
        ]
        low = [
            x.detach().to(dtype if i != 3 else torch.float32).requires_grad_()
            for i, x in enumerate(exact)
        ]
        found = out_and_grads(with_bias(call), low)
        assert found[0].dtype == dtype
        expected = out_and_grads(dense_with_bias(**call), exact)
        tolerance = {torch.float32: 1e-5, torch.float16: 0.02}.get(dtype, 0.15)
        assert_same([x.double() for x in found], expected, tolerance)


def test_logits_of_a_float32_bias_reach_a_half_precision_map():
    inputs, call = [x.detach().bfloat16() for x in leaves(2, 4, 35, 8)], call_of(5, 7, 6)
    table = randn(1, 4, 35, 35, dtype=torch.float32)
    assert with_bias(call)(*inputs, None, table).dtype == torch.bfloat16


def test_positions_are_those_of_pairs_that_see_each_other():
    asked = set()

    def bias(i, j):
        pairs = torch.broadcast_tensors(i, j)
        assert i.ndim == j.ndim == 5 and i.dtype == j.dtype == torch.int64
        asked.update(zip(*(x.flatten().tolist() for x in pairs)))
        return torch.zeros(())

    q, k, v = leaves(1, 2, 2 + 64, 4)
    routed = torch.tensor([[9, 50]])
    call = {"grid_size": (8, 8), "window_size": 4, "num_prefix_tokens": 2}
    routed_window_attention(q, k, v, routed_indices=routed, pair_bias=bias, **call)
    window = window_of(8, 8, 4)
    seen = torch.ones(66, 66, dtype=torch.bool)
    seen[2:, 2:] = window[:, None] == window[None, :]
    seen[2:, routed[0] + 2] = True
    assert asked == {tuple(pair) for pair in seen.nonzero().tolist()}


def test_steps_are_recomputed_in_backward(monkeypatch):
    """The bias of all steps but one is not alive at the end of the forward."""
    calls = []

    def bias(i, j):
        calls.append(i.shape)
        return table.sum() * (i - j)

    table = randn(3).requires_grad_()
    q, k, v = leaves(1, 1, 64, 4)
    call = {
        "grid_size": (8, 8),
        "window_size": 4,
        "routed_indices": torch.tensor([[9, 50]]),
        "pair_bias": bias,
    }
    monkeypatch.setattr(gathered, "_LOGITS", 1)
    out = routed_window_attention(q, k, v, **call)
    assert len(calls) == 4
    out.sum().backward()
    assert len(calls) == 8
    expected, table.grad = table.grad, None
    monkeypatch.setattr(gathered, "_LOGITS", 1 << 25)
    routed_window_attention(q, k, v, **call).sum().backward()
    assert len(calls) == 9
    torch.testing.assert_close(table.grad, expected, rtol=1e-9, atol=1e-9)


def test_compiles_whole():
    torch.compiler.reset()
    inputs, call = (
        leaves(2, 4, 2 + 35, 8),
        call_of(5, 7, 6, prefix=2, query_indices=distinct((2,), 9, 35)),
    )
    inputs += [randn(2, 1, 6, seed=5).requires_grad_(), randn(1, 4, 37, 37).requires_grad_()]
    fast = torch.compile(with_bias(call), fullgraph=True, backend="aot_eager")
    assert_same(out_and_grads(fast, inputs), out_and_grads(with_bias(call), inputs))


def test_autocast_does_not_reach_the_operator():
    q, k, v = (x.detach().float() for x in leaves(1, 2, 35, 8))
    call = {"grid_size": (5, 7), "window_size": 3, "pair_bias": lambda i, j: (i - j) * 0.1}
    expected = routed_window_attention(q, k, v, **call)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routed_window_attention(q, k, v, **call), expected)
