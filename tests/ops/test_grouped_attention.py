"""grouped_attention against its specification, a loop over groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision.ops import PooledKeys, grouped_attention
from colt5_vision.ops.grouped_attention import eager
from colt5_vision.ops.grouped_attention.reference import grouped_attention as reference
from tests.support.attention_cases import assert_same, distinct, leaves, randn

INF, NAN = float("inf"), float("nan")


def partition(batch, routes, groups, size, tokens, seed):
    """(batch, routes, groups, size) indices of up to tokens tokens, -1 where there is none."""
    members = distinct((batch, routes), min(tokens, groups * size), tokens, seed)
    members = torch.nn.functional.pad(members, (0, groups * size - members.shape[-1]), value=-1)
    return members.unflatten(-1, (groups, size))


@st.composite
def problems(draw):
    """Leaves [q, k, v, log_weights, pooled keys, values, log mass], None where not given; the
    indices; the keywords."""
    seed, batch = draw(st.integers(0, 1 << 16)), draw(st.integers(1, 2))
    heads, query_routes, key_routes = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2), (4, 2, 4)])
    )
    tokens, prefix = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 1, 3]))
    groups, size, dim = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 9))
    q, k, v = leaves(batch, heads, prefix + tokens, dim, seed=seed)
    samples = draw(st.sampled_from([1, batch]))
    members = partition(samples, query_routes, groups, size, tokens, seed + 1)
    slots = draw(st.integers(0, min(tokens, 6)))
    keys = distinct((batch, key_routes, groups), slots, tokens, seed + 2)
    if draw(st.booleans()):
        keys = torch.where(randn(*keys.shape, seed=seed + 4) > 0.5, -1, keys)
    rest = [None] * 4
    if slots and draw(st.booleans()):
        rest[0] = randn(*keys.shape, seed=seed + 5).requires_grad_()
    if draw(st.booleans()):
        shape = (batch, heads, groups, draw(st.integers(1, 3)))
        pooled = randn(*shape, dim, seed=seed + 7), randn(*shape, dim, seed=seed + 8)
        rest[1:] = [x.requires_grad_() for x in (*pooled, randn(*shape, seed=seed + 9))]
    call = {"num_prefix_tokens": prefix, "scale": draw(st.sampled_from([None, 0.1, 1.0]))}
    if (masked := draw(st.sampled_from([0, 0, tokens, prefix + tokens]))) > 0:
        call["key_mask"] = randn(batch, masked, seed=seed + 6) > draw(st.sampled_from([-1, 0.5]))
    return [q, k, v, *rest], (members, keys), call


def out_and_grads(function, inputs):
    """Also where the result does not depend on an input."""
    given = [x for x in inputs if x is not None]
    out = function(*inputs) + 0 * sum(x.sum() for x in given)
    return out.detach(), *torch.autograd.grad(out, given, randn(*out.shape, seed=99))


def run(function, indices, call):
    def of(q, k, v, weights, *pooled):
        pooled = None if pooled[0] is None else PooledKeys(*pooled)
        return function(q, k, v, *indices, pooled, log_weights=weights, **call)

    return of


@pytest.mark.parametrize("held", [1 << 20, 1])
def test_equals_the_specification(held, monkeypatch):
    monkeypatch.setitem(eager._HELD, "cpu", held)  # all groups at once, one each

    @settings(max_examples=60)
    @given(problems())
    def check(problem):
        inputs, indices, call = problem
        found, want = (
            out_and_grads(run(f, indices, call), inputs) for f in (grouped_attention, reference)
        )
        assert_same(found, want)

    check()


@settings(max_examples=40)
@given(problems())
def test_the_plain_path_equals_the_specification(problem):
    inputs, indices, call = problem
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = out_and_grads(run(grouped_attention, indices, call), inputs)
    assert_same(found, out_and_grads(run(reference, indices, call), inputs))


def test_a_batch_of_0():
    q = torch.randn(0, 2, 4, 8, requires_grad=True)
    index = torch.arange(4).view(1, 1, 1, 4)
    out = grouped_attention(q, q, q, index, index)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


@pytest.mark.parametrize("prefix", [0, 2])
def test_all_groups_exact_is_full_attention(prefix):
    q, k, v = (randn(2, 4, prefix + 35, 16, seed=s, dtype=torch.float32) for s in range(3))
    groups = partition(2, 2, 4, 10, 35, 5)
    keys = distinct((1, 1, 4), 35, 35, 6)
    out = grouped_attention(q, k, v, groups, keys, num_prefix_tokens=prefix)
    want = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def halves(dtype, mass):
    """A group whose pooled keys alone weigh exp(mass) and exp(mass + 1/8)."""
    q, k, v = (randn(1, 1, 8, 16, seed=s).to(dtype) for s in range(3))
    groups, keys = torch.arange(8).view(1, 1, 1, 8), torch.full((1, 1, 1, 1), -1)
    both = [randn(1, 1, 1, 2, 16, seed=s).to(dtype) for s in (4, 5)]
    return (q, k, v), (groups, keys), [*both, torch.tensor([mass, mass + 0.125]).view(1, 1, 1, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_masses_keep_float32(dtype):
    """100 and 100.125 are one number in bfloat16, and e^100 none in float16."""
    qkv, indices, pooled = halves(dtype, 100.0)
    out = grouped_attention(*qkv, *indices, PooledKeys(*pooled))
    wide = [x.double() for x in (*qkv, *pooled)]
    want = reference(*wide[:3], *indices, wide[3:])
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)
    shifted = grouped_attention(*qkv, *indices, PooledKeys(*halves(dtype, 0.0)[2]))
    torch.testing.assert_close(out, shifted)


def test_each_sample_is_its_own():
    inputs = leaves(3, 2, 21, 8)
    groups, keys = partition(3, 1, 3, 7, 20, 1), distinct((3, 1, 3), 4, 20, 2)
    out = grouped_attention(*inputs, groups, keys, num_prefix_tokens=1)
    for i in range(3):
        own = [x[i : i + 1] for x in (*inputs, groups, keys)]
        torch.testing.assert_close(grouped_attention(*own, num_prefix_tokens=1), out[i : i + 1])


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_no_group_reads_harms_nobody(value):
    q, k, v = (x.detach() for x in leaves(2, 2, 12, 8))
    groups, keys = torch.arange(12).view(1, 1, 3, 4), torch.tensor([[[[1, -1], [2, 3], [4, 5]]]])
    want = grouped_attention(q, k, v, groups, keys)
    mask = torch.arange(12) != 5
    masked = grouped_attention(q, k, v, groups, keys, key_mask=mask.expand(2, -1))
    for x in (k, v):
        x[:, :, 0] = x[:, :, 11] = value  # token 0 is where an empty slot could point
    torch.testing.assert_close(grouped_attention(q, k, v, groups, keys), want)
    k[:, :, 5] = v[:, :, 5] = value
    again = grouped_attention(q, k, v, groups, keys, key_mask=mask.expand(2, -1))
    torch.testing.assert_close(again, masked)
    # and one sample's own harm nobody else
    k[0] = value
    out = grouped_attention(q, k, v, groups, keys, key_mask=mask.expand(2, -1))
    torch.testing.assert_close(out[1], masked[1])


def test_a_query_without_keys_gets_nothing_and_finite_gradients():
    q, k, v = leaves(1, 1, 6, 4)
    groups, keys = torch.tensor([[[[0, 1], [2, 3]]]]), torch.tensor([[[[4], [-1]]]])
    out = grouped_attention(q, k, v, groups, keys)
    assert (out[:, :, 2:] == 0).all() and (out[:, :, :2] == v[:, :, 4:5]).all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    for shape in ((0, 2, 6, 4), (2, 2, 0, 4)):
        x, empty = torch.randn(shape), torch.zeros(1, 1, 1, 0, dtype=torch.int64)
        assert grouped_attention(x, x, x, empty, empty).shape == shape


def test_strides_do_not_matter():
    q, k, v = (randn(2, 21, 16, seed=s).unflatten(-1, (2, 8)).transpose(1, 2) for s in range(3))
    groups, keys = partition(2, 1, 3, 7, 20, 1), distinct((2, 1, 3), 4, 20, 2)
    call = {"num_prefix_tokens": 1}
    found = grouped_attention(q, k, v, groups, keys, **call)
    dense = (x.contiguous() for x in (q, k, v))
    torch.testing.assert_close(found, grouped_attention(*dense, groups, keys, **call))
    assert found.transpose(1, 2).is_contiguous()


def test_opcheck():
    inputs = leaves(2, 2, 13, 8)
    groups, keys = partition(2, 1, 2, 6, 12, 1), distinct((2, 1, 2), 4, 12, 2)
    weights = randn(2, 1, 2, 4, seed=3).requires_grad_()
    pooled = [randn(2, 2, 2, 3, 8, seed=s).requires_grad_() for s in (4, 5)]
    mass, mask = randn(2, 2, 2, 3, seed=6).requires_grad_(), randn(2, 13, seed=7) > -1
    args = (*inputs, groups, keys, weights, *pooled, mass, mask, 1, 0.3)
    torch.library.opcheck(torch.ops.colt5_vision.grouped_attention.default, args)
    out, lse = torch.ops.colt5_vision.grouped_attention(*args)
    args = (torch.ones_like(out), *args[:10], out, lse, 1, 0.3)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(torch.ops.colt5_vision.grouped_attention_backward.default, args)


Q = torch.zeros(2, 4, 9, 8)
GROUPS, KEYS = torch.arange(8).view(1, 1, 2, 4), torch.zeros(2, 2, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "q: expected 4 dimensions"),
        ({"k": Q[:, :2]}, ValueError, "q, k, v: expected one shape"),
        ({"num_prefix_tokens": 10}, ValueError, "num_prefix_tokens: expected at most 9"),
        ({"query_groups": GROUPS.float()}, TypeError, "query_groups: expected torch.int64"),
        ({"query_groups": GROUPS[0]}, ValueError, r"query_groups: expected shape \(1 or 2, R"),
        ({"query_groups": GROUPS + 1}, ValueError, r"query_groups: expected entries in \[-1, 8\)"),
        ({"query_groups": GROUPS % 4}, ValueError, "query_groups: expected each token in one"),
        ({"key_indices": KEYS[:, :, :1]}, ValueError, "key_indices: expected the 2 groups"),
        ({"key_indices": KEYS[:, [0] * 3]}, ValueError, "key_indices: .* divides 4 heads"),
        ({"key_indices": KEYS - 2}, ValueError, r"key_indices: expected entries in \[-1, 8\)"),
        ({"log_weights": torch.zeros(2, 2, 2, 4)}, ValueError, "log_weights: expected the shape"),
        ({"key_mask": torch.ones(2, 5).bool()}, ValueError, "key_mask: "),
        ({"scale": 0.0}, ValueError, "scale: expected a positive"),
        ({"pooled": Q}, TypeError, "pooled: expected PooledKeys"),
        (
            {"pooled": (torch.zeros(2, 4, 2, 5, 8), torch.zeros(2, 4, 2, 5, 8), Q[..., 0])},
            ValueError,
            r"pooled.log_mass: expected 4 dimensions",
        ),
        (
            {"pooled": (torch.zeros(2, 4, 1, 5, 8),) * 2 + (torch.zeros(2, 4, 2, 5),)},
            ValueError,
            r"pooled.keys: expected shape \(2, 4, 2, 5, 8\)",
        ),
        ({"backend": "triton"}, RuntimeError, "grouped_attention: backend 'triton' cannot run"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_arguments_are_told(change, error, message):
    call = {"q": Q, "k": Q, "v": Q, "query_groups": GROUPS, "key_indices": KEYS}
    call |= {"num_prefix_tokens": 1}
    assert grouped_attention(**call).shape == Q.shape
    with pytest.raises(error, match=f"^{message}"):
        grouped_attention(**(call | change))
