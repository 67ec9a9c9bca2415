"""routed_window_attention against dense attention under the mask window ∪ routed ∪ prefix."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.ops import routed_window_attention, window_attention
from colt5_vision.ops.routed_window_attention.reference import (
    routed_window_attention as reference,
)
from tests.support.attention_cases import (
    assert_same,
    dense,
    distinct,
    leaves,
    operator,
    out_and_grads,
    randn,
)
from tests.support.dense import window_of

PACKAGE = "colt5_vision.ops.routed_window_attention"
eager, sdpa = sys.modules[f"{PACKAGE}.eager"], sys.modules["colt5_vision.ops.sdpa"]
INF, NAN = float("inf"), float("nan")


@st.composite
def problems(draw):
    """Leaves [q, k, v, log_weights or None], and the keywords of a call."""
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
    window = draw(st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))))
    tokens = height * width
    q, k, v = leaves(batch, heads, prefix + tokens, draw(st.sampled_from([1, 3, 8, 20])), seed=seed)
    call = {"grid_size": (height, width), "window_size": window, "num_prefix_tokens": prefix}
    call["scale"] = draw(st.sampled_from([None, 0.1, 1.0]))
    routed = distinct((batch, routes), draw(st.integers(0, min(tokens, 9))), tokens, seed)
    if draw(st.booleans()):  # empty slots
        routed = torch.where(randn(*routed.shape, seed=seed + 4) > 0.5, -1, routed)
    weights = None
    if routed.shape[-1] and draw(st.booleans()):
        weights = randn(*routed.shape, seed=seed + 5).requires_grad_()
    if routes == 1 and draw(st.booleans()):
        routed, weights = (
            routed[:, 0],
            None if weights is None else weights[:, 0].detach().requires_grad_(),
        )
    call["routed_indices"] = routed
    if (masked := draw(st.sampled_from([0, 0, tokens, prefix + tokens]))) > 0:
        call["key_mask"] = randn(batch, masked, seed=seed + 6) > draw(st.sampled_from([-1, 0.5]))
    if draw(st.booleans()):
        call["query_indices"] = distinct((batch,), draw(st.integers(1, tokens)), tokens, seed + 7)
    call["weight_own_window"] = draw(st.booleans())
    return [q, k, v, weights], call


class Elsewhere(torch.Tensor):
    """A CPU tensor that claims another device: no fused kernel takes it."""

    @property
    def device(self):
        return torch.device("xla")


def plain(function):
    """``attend`` or ``attend_backward`` with its plain-torch path."""

    def run(*args):
        args = [x.as_subclass(Elsewhere) if isinstance(x, torch.Tensor) else x for x in args]
        return tuple(x.as_subclass(torch.Tensor) for x in function(*args))

    return run


@pytest.fixture
def plain_path(monkeypatch):
    monkeypatch.setattr(eager, "attend", plain(sdpa.attend))
    monkeypatch.setattr(eager, "attend_backward", plain(sdpa.attend_backward))
    for name in ("_flash_cpu", "_flash_cpu_backward", "_efficient", "_efficient_backward"):
        monkeypatch.setattr(sdpa, name, None)  # a call of a fused kernel fails
    monkeypatch.setattr(sdpa, "_PLAIN_LOGITS", 100)  # several chunks


@pytest.mark.parametrize("pairs", [1 << 24, 1, 300])
def test_equals_dense_masked_attention(pairs, monkeypatch):
    monkeypatch.setattr(eager, "_PAIRS", pairs)  # one call for all windows, one each, a few

    @settings(max_examples=100)
    @given(problems())
    def check(problem):
        inputs, call = problem
        assert_same(out_and_grads(operator(**call), inputs), out_and_grads(dense(**call), inputs))

    check()


def test_plain_path_equals_dense_masked_attention(plain_path):
    @settings(max_examples=150)
    @given(problems())
    def check(problem):
        inputs, call = problem
        assert_same(out_and_grads(operator(**call), inputs), out_and_grads(dense(**call), inputs))

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_plain_part_equals_the_fused_one(dtype, biased):
    q, k, v = (
        randn(2, 2, 13, 8, dtype=dtype),
        *(randn(2, 2, 21, 8, seed=s, dtype=dtype) for s in (1, 2)),
    )
    bias = (
        randn(2, 1, 1, 21, seed=3).to(torch.float64 if dtype == torch.float64 else torch.float32)
        if biased
        else None
    )
    grad, atol = (
        randn(2, 2, 13, 8, seed=4, dtype=dtype),
        {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05),
    )
    fused = sdpa.attend(q, k, v, bias, 0.3)
    found = plain(sdpa.attend)(q, k, v, bias, 0.3)
    assert [x.dtype for x in found] == [x.dtype for x in fused]
    assert_same(found, fused, atol)
    lse = fused[1] + 0.5  # the global logsumexp is larger than the part's own
    backward = [
        f(grad, q, k, v, *fused[:1], lse, bias, 0.3)
        for f in (plain(sdpa.attend_backward), sdpa.attend_backward)
    ]
    assert [x.dtype for x in backward[0]] == [dtype] * 3
    assert_same(*backward, atol)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("window", [1, 3, (2, 9)])
def test_every_token_routed_is_full_attention(prefix, window):
    inputs = leaves(2, 4, prefix + 35, 16)
    routed = distinct((2, 2), 35, 35)
    call = {"grid_size": (5, 7), "window_size": window, "num_prefix_tokens": prefix}
    expected = out_and_grads(F.scaled_dot_product_attention, inputs)
    assert_same(out_and_grads(operator(routed_indices=routed, **call), inputs), expected, 1e-10)
    assert_same(
        out_and_grads(lambda *x: window_attention(*x, **{**call, "window_size": 7}), inputs),
        expected,
        1e-10,
    )


def test_a_batch_gives_what_its_samples_give():
    q, k, v, weights = *leaves(3, 2, 22, 8), randn(3, 2, 4, seed=5).requires_grad_()
    tensors = {"routed_indices": distinct((3, 2), 4, 20), "key_mask": randn(3, 22, seed=6) > -0.5}
    tensors["query_indices"] = distinct((3,), 7, 20, seed=7)
    call = {"grid_size": (4, 5), "window_size": 2, "num_prefix_tokens": 2}
    whole = operator(**tensors, **call)(q, k, v, weights)
    for i in range(3):
        own = {name: x[i : i + 1] for name, x in tensors.items()}
        torch.testing.assert_close(
            operator(**own, **call)(*(x[i : i + 1] for x in (q, k, v, weights)))[0], whole[i]
        )


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_sample_leaves_the_others_unharmed(bad):
    inputs, call = (
        leaves(3, 2, 21, 8),
        {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": 1},
    )
    call["routed_indices"] = distinct((3,), 4, 20)
    expected = out_and_grads(operator(**call), inputs)
    harmed = [
        x.detach().clone().index_fill_(0, torch.tensor(1), bad).requires_grad_() for x in inputs
    ]
    for a, b in zip(out_and_grads(operator(**call), harmed), expected, strict=True):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("prefix", [0, 2])
def test_masked_keys_have_no_influence(prefix):
    q, k, v = leaves(2, 2, prefix + 20, 8)
    mask = randn(2, prefix + 20, seed=5) > 0
    call = {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": prefix, "key_mask": mask}
    run = operator(routed_indices=distinct((2, 2), 8, 20), **call)
    weights = randn(2, 2, 8, seed=6).requires_grad_()
    out, _, grad_k, grad_v, grad_weights = out_and_grads(run, [q, k, v, weights])
    off = ~mask[:, None, :, None].expand_as(k)
    assert (grad_k[off] == 0).all() and (grad_v[off] == 0).all() and (grad_k[~off] != 0).any()
    assert (grad_weights != 0).any()
    other = run(q, k.masked_fill(off, 50.0), v.masked_fill(off, -50.0), weights)
    assert torch.equal(other, out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_wholly_masked_row(dtype, prefix):
    inputs = [
        *leaves(2, 2, prefix + 20, 8, dtype=dtype),
        randn(2, 3, seed=5, dtype=dtype).requires_grad_(),
    ]
    mask = torch.ones(2, prefix + 20, dtype=torch.bool)
    mask[0] = False
    call = {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": prefix, "key_mask": mask}
    out, *grads = out_and_grads(operator(routed_indices=distinct((2,), 3, 20), **call), inputs)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    for grad in grads:
        assert (grad[0] == 0).all() and grad[1].isfinite().all() and (grad[1] != 0).any()


def test_a_window_without_any_key():
    inputs = leaves(1, 2, 16, 4)
    mask = window_of(4, 4, 2)[None] != 0  # of one window only
    call = {"grid_size": (4, 4), "window_size": 2, "key_mask": mask}
    out, *grads = out_and_grads(operator(**call), inputs)
    assert (out[0, :, ~mask[0]] == 0).all() and (out[0, :, mask[0]] != 0).any()
    assert all((x[0, :, ~mask[0]] == 0).all() and x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_log_weight_of_minus_inf_removes_the_key(dtype):
    inputs, routed = leaves(1, 2, 20, 8, dtype=dtype), torch.tensor([[7, 0, 19]])
    weights = torch.tensor([[0.5, -INF, -1.0]], dtype=dtype, requires_grad=True)
    mask = (torch.arange(20) != 0)[None]
    call = {"grid_size": (4, 5), "window_size": 2, "routed_indices": routed}
    out, *grads = out_and_grads(operator(**call), [*inputs, weights])
    expected = out_and_grads(
        operator(key_mask=mask, **call), [*inputs, weights.detach().clamp_min(-5).requires_grad_()]
    )
    assert_same([out, *grads], expected, 1e-12 if dtype == torch.float64 else 1e-3)
    assert (grads[1][:, :, 0] == 0).all() and grads[3][0, 1] == 0 and grads[3][0, 0] != 0
    gone = torch.full((1, 20), -INF, dtype=dtype, requires_grad=True)  # no key is left at all
    everything = {**call, "routed_indices": torch.arange(20)[None]}
    assert all((x == 0).all() for x in out_and_grads(operator(**everything), [*inputs, gone]))


def test_a_repeated_query_is_refused():
    with pytest.raises(ValueError, match="query_indices: expected distinct"):
        operator(grid_size=(4, 5), window_size=2, query_indices=torch.tensor([[3, 3, 8]]))(
            *leaves(1, 2, 20, 8)
        )


@pytest.mark.parametrize("prefix", [0, 1])
def test_gradcheck(prefix):
    inputs = [*leaves(1, 2, prefix + 6, 3), randn(1, 2, 2, seed=5).requires_grad_()]
    call = {"grid_size": (2, 3), "window_size": 2, "num_prefix_tokens": prefix}
    call |= {
        "routed_indices": torch.tensor([[[5, 0], [2, -1]]]),
        "key_mask": torch.tensor([[True] * 4 + [False, True]]),
    }
    assert torch.autograd.gradcheck(operator(**call), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_within_that_of_plain_sdpa(dtype, weighted):
    height, width, window, routed = 12, 17, 5, distinct((2, 1), 20, 204)
    low = leaves(2, 2, 204, 32, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = randn(2, 1, 20, seed=5, dtype=dtype) if weighted else None
    call = {"grid_size": (height, width), "window_size": window, "routed_indices": routed}
    truth = out_and_grads(lambda *x: dense(**call)(*x, weights), exact)
    win = window_of(height, width, window)
    columns = torch.zeros(2, 1, 1, 204, dtype=torch.bool).scatter(-1, routed[:, :, None], True)
    bias = torch.zeros(2, 1, 204, 204).masked_fill(~((win[:, None] == win) | columns), -INF)
    if weighted:
        bias = bias + torch.zeros(2, 1, 1, 204).scatter(
            -1, routed[:, :, None], weights[:, :, None].float()
        )
    peer = out_and_grads(
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=bias.to(dtype)), low
    )
    ours = out_and_grads(lambda *x: operator(**call)(*x, weights), low)
    for a, b, exact_value in zip(ours, peer, truth, strict=True):
        assert a.dtype == dtype
        error, budget = ((x.double() - exact_value).square().mean().sqrt() for x in (a, b))
        assert error <= 2 * budget


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, path, request):
    if path == "plain":
        request.getfixturevalue("plain_path")
    inputs = [
        *leaves(1, 2, 21, 8, dtype=dtype),
        randn(1, 3, seed=5, dtype=torch.float32).requires_grad_(),
    ]
    call = {
        "grid_size": (4, 5),
        "window_size": 2,
        "routed_indices": distinct((1,), 3, 20),
        "num_prefix_tokens": 1,
    }
    expected = out_and_grads(operator(**call), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = out_and_grads(operator(**call), inputs)
    assert [x.dtype for x in found] == [*[dtype] * 4, torch.float32]
    assert all(map(torch.equal, found, expected))


def test_non_contiguous():
    qkv = randn(2, 21, 3, 4, 8).requires_grad_()  # as a linear layer leaves it
    routed, mask = distinct((2, 2), 6, 20).mT.contiguous().mT, (randn(21, 2, seed=5) > -1).T
    call = {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": 1}
    found = operator(routed_indices=routed, key_mask=mask, **call)
    expected = operator(routed_indices=routed.contiguous(), key_mask=mask.contiguous(), **call)
    assert_same(
        out_and_grads(lambda x: found(*x.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2), [qkv]),
        out_and_grads(
            lambda x: expected(*x.permute(2, 0, 3, 1, 4).contiguous()).transpose(1, 2).flatten(2),
            [qkv],
        ),
        1e-12,
    )


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("queries", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_features_that_do_not_lie_side_by_side(prefix, queries, own):
    """A channels-first map, read as it lies: the fused kernels would read past it."""
    inputs = [x.mT.contiguous().mT for x in leaves(2, 2, prefix + 20, 8)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    inputs.append(randn(2, 6, seed=5).requires_grad_())
    assert inputs[0].stride(-1) != 1
    call = {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": prefix}
    call |= {"routed_indices": distinct((2,), 6, 20), "weight_own_window": own}
    if queries:
        call["query_indices"] = distinct((2,), 7, 20, seed=7)
    assert_same(out_and_grads(operator(**call), inputs), out_and_grads(dense(**call), inputs))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_of_0(prefix, dtype):
    inputs = [*leaves(0, 2, prefix + 20, 8, dtype=dtype), randn(0, 3).requires_grad_()]
    call = {"grid_size": (4, 5), "window_size": 3, "num_prefix_tokens": prefix}
    call |= {
        "routed_indices": torch.empty(0, 3, dtype=torch.int64),
        "key_mask": torch.empty(0, 20, dtype=torch.bool),
    }
    out, *grads = out_and_grads(operator(**call), inputs)
    assert out.shape == (0, 2, prefix + 20, 8) and [x.shape for x in grads] == [
        x.shape for x in inputs
    ]


def test_no_routed_key_but_log_weights():
    inputs = [*leaves(2, 2, 20, 8), torch.empty(2, 0, dtype=torch.float64, requires_grad=True)]
    call = {
        "grid_size": (4, 5),
        "window_size": 3,
        "routed_indices": torch.empty(2, 0, dtype=torch.int64),
    }
    assert_same(out_and_grads(operator(**call), inputs), out_and_grads(dense(**call), inputs))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_log_weights_without_a_gradient_change_no_other(queries, own):
    *inputs, weights = *leaves(2, 4, 2 + 35, 8), randn(2, 2, 9, seed=5)
    call = {"grid_size": (5, 7), "window_size": 3, "num_prefix_tokens": 2, "weight_own_window": own}
    call["routed_indices"] = distinct((2, 2), 9, 35)
    if queries:
        call["query_indices"] = distinct((2,), 11, 35, 7)
    want = out_and_grads(operator(**call), [*inputs, weights.clone().requires_grad_()])
    found = out_and_grads(lambda *x: operator(**call)(*x, weights), inputs)
    assert_same(found, want[: len(found)])


def test_weights_of_one_give_the_kernel_no_bias(monkeypatch):
    """On a CPU; a removed key or an empty slot does, and the gradient of zeros is what it was."""
    q, k, v = (randn(1, 2, 35, 4, seed=i) for i in range(3))
    place = {"grid_size": (5, 7), "window_size": 3}
    routed = torch.tensor([[3, 11, 20, 34]])
    biases, attend = [], eager.attend

    def seen(query, key, value, bias, scale):
        if key.shape[2] == 4:
            biases.append(bias)
        return attend(query, key, value, bias, scale)

    monkeypatch.setattr(eager, "attend", seen)
    removed, empty = torch.zeros(1, 4), routed.clone()
    removed[0, 1], empty[0, 2] = -torch.inf, -1
    cases = [(routed, None), (routed, torch.zeros(1, 4)), (routed, removed), (empty, None)]
    for indices, weights in cases:
        routed_window_attention(q, k, v, routed_indices=indices, log_weights=weights, **place)
    assert [bias is None for bias in biases] == [True, True, False, False]

    def loss(weights, way):
        out = way(q, k, v, routed_indices=routed, log_weights=weights, **place)
        return (out * randn(*out.shape, seed=9)).sum()

    grads = []
    for way in (routed_window_attention, reference):
        weights = torch.zeros(1, 4, dtype=q.dtype, requires_grad=True)
        loss(weights, way).backward()
        grads.append(weights.grad)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads)
