"""The kernels of grouped attention: against a loop over groups in float64, with the eager error as
the budget of the halves."""

import pytest
import torch

from colt5_vision.ops import PooledKeys, backend, grouped_attention
from colt5_vision.ops.grouped_attention import triton as kernels
from colt5_vision.ops.grouped_attention.reference import grouped_attention as reference
from colt5_vision.swap.grouped import GroupedAttention
from tests.support.attention_cases import distinct, errors, leaves, out_and_grads, randn
from tests.support.switched_off import broken, removed_group

# a GPU takes the halves only, and goes through every case with them
DTYPE = torch.float32 if backend.INTERPRETED else torch.float16
LIMIT = 2e-6 if backend.INTERPRETED else 4e-3
INF, NAN = float("inf"), float("nan")

# tokens that are in no group, groups that are not full, keys of one route for queries of several
CASES = {
    "plain": {"head_dim": 40},
    "all": {
        "batch": 2,
        "routes": (1, 2),
        "prefix": 3,
        "mask": True,
        "weights": True,
        "pooled": 3,
    },
    "routes of queries": {"heads": 4, "routes": (2, 1), "head_dim": 7, "weights": True},
    "small": {"heads": 1, "prefix": 1, "weights": True, "pooled": 2, "mask": True},
    "pooled alone": {"keys": 0, "pooled": 2, "head_dim": 24},
    "prefix alone": {"keys": 0, "prefix": 2},
    # several tiles of queries, and of a list
    "long": {
        "tokens": 331,
        "size": 150,
        "keys": 140,
        "heads": 1,
        "prefix": 1,
        "weights": True,
        "head_dim": 80,
    },
    "wide head": {"head_dim": 256, "heads": 1, "pooled": 1, "weights": True},
}


def case(name, device, dtype=DTYPE):
    """Leaves [q, k, v, log weights, pooled keys, values, log masses], None for those that are not
    given, in ``dtype`` and in float64; indices; keywords."""
    spec = {"batch": 1, "heads": 2, "routes": (1, 1), "tokens": 31, "prefix": 0, "groups": 2}
    spec |= {"size": 7, "keys": 5, "head_dim": 16, "pooled": 0} | CASES[name]
    batch, heads, groups, tokens = (spec[x] for x in ("batch", "heads", "groups", "tokens"))
    length, dim = spec["prefix"] + tokens, spec["head_dim"]
    inputs = leaves(batch, heads, length, dim, dtype=dtype)

    # groups, the last not full, and keys, some of all groups, with an empty slot
    members = distinct((batch, spec["routes"][0]), groups * spec["size"], tokens, seed=3)
    members[..., -2:] = -1
    keys = distinct((batch, spec["routes"][1], groups), spec["keys"], tokens, seed=5)
    keys[:, :, 1:, 1:2] = -1
    indices = members.unflatten(-1, (groups, spec["size"])).to(device), keys.to(device)

    # what is added to the logits; the first is off
    further = [None] * 4
    if spec.get("weights"):
        further[0] = randn(*keys.shape, seed=7, dtype=torch.float32)
        further[0][:, :, 0, 0] = -INF
    if spec["pooled"]:
        shape = (batch, heads, groups, spec["pooled"])
        further[1:3] = (randn(*shape, dim, seed=s, dtype=dtype) for s in (8, 9))
        further[3] = randn(*shape, seed=10, dtype=torch.float32)
        further[3][:, :, 1, 0] = -INF
    call = {"num_prefix_tokens": spec["prefix"], "scale": 0.3}
    if spec.get("mask"):
        call["key_mask"] = (randn(batch, length, seed=11) > -0.8).to(device)

    given = [None if x is None else x.detach().to(device) for x in (*inputs, *further)]
    given = [None if x is None else x.requires_grad_() for x in given]
    exact = [None if x is None else x.detach().cpu().double().requires_grad_() for x in given]
    return given, exact, indices, call


def of(function, indices, call):
    def run(q, k, v, weights=None, *pooled):
        pooled = PooledKeys(*pooled) if pooled and pooled[0] is not None else None
        return function(q, k, v, *indices, pooled, log_weights=weights, **call)

    return run


def found_and_wanted(name, device, dtype=DTYPE, **how):
    given, exact, indices, call = case(name, device, dtype)
    found = out_and_grads(of(grouped_attention, indices, call | how), given)
    there = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in call.items()}
    return found, out_and_grads(of(reference, [x.cpu() for x in indices], there), exact)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name, device):
    assert max(errors(*found_and_wanted(name, device))) < LIMIT


def test_one_group_at_a_time(device, monkeypatch):
    monkeypatch.setattr(kernels, "_HELD", 1)
    assert max(errors(*found_and_wanted("all", device))) < LIMIT


@pytest.mark.parametrize("dtype", backend.HALVES)
def test_halves_are_no_worse_than_eager(dtype, device):
    """Errors of out and of each gradient."""
    found, budget = (
        torch.tensor(errors(*found_and_wanted("all", device, dtype, backend=which)))
        for which in ("triton", "eager")
    )
    assert (found <= 1.1 * budget).all(), (found, budget)


def test_what_is_switched_off_is_never_read(device):
    """By a log weight or log mass of -inf, or by the mask; gradients as without its NaN or inf."""
    inputs, indices, tokens = removed_group(0, DTYPE)
    inputs, indices = [x[:1, :2] for x in inputs], [x[:1].to(device) for x in indices]
    mask = torch.ones(1, 20, dtype=torch.bool, device=device)
    mask[:, 3] = False
    spoilt = list(inputs)
    for i, value in ((1, NAN), (2, INF)):
        spoilt[i] = broken(inputs[i], value, tokens[:1], 0)
        spoilt[i][:, :, 3] = value
    for i, value in ((4, INF), (5, NAN)):
        spoilt[i] = inputs[i].clone()
        spoilt[i][..., 0, :] = value
    call = of(grouped_attention, indices, {"key_mask": mask})
    found, want = (
        out_and_grads(call, [x.to(device).requires_grad_() for x in some])
        for some in (spoilt, inputs)
    )
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_a_query_without_any_key_is_zero(device):
    given, _, indices, call = case("all", device)
    call["key_mask"][0] = False
    weights = given[3].detach().clone().requires_grad_()
    inputs = [*given[:3], weights]
    out, *grads = out_and_grads(of(grouped_attention, indices, call), inputs)
    assert not out[0].any() and out[1].any()
    assert all(x.isfinite().all() and not x[0].any() for x in grads)


@pytest.mark.parametrize(
    "shape", [(0, 2, 12, 16), (2, 2, 12, 16), (2, 2, 0, 16)], ids=["batch", "keys", "tokens"]
)
@pytest.mark.parametrize("size", [0, 3])
def test_nothing_to_read_or_nobody_to_ask(shape, size, device):
    q = torch.ones(shape, dtype=DTYPE, device=device, requires_grad=True)
    groups = torch.arange(2 * size, device=device).view(1, 1, 2, size)
    groups = torch.where(groups < shape[2], groups, -1)
    keys = torch.empty(1, 1, 2, 0, dtype=torch.int64, device=device)
    out = grouped_attention(q, q, q, groups, keys)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == grad.shape == shape
    assert not out.any() and not grad.any()


def test_indices_out_of_range_are_empty(device):
    """Values are not looked at on a GPU: nothing may be read or written beyond the sample."""
    given, _, (groups, keys), call = case("small", device)
    attend = torch.ops.colt5_vision.grouped_attention

    def run(value):
        groups[:, :, 0, 0] = keys[:, :, 1, 0] = value
        more = (*given[3:], call["key_mask"], 1, 0.3, "triton")
        return out_and_grads(lambda *x: attend(*x, groups, keys, *more)[0], given[:3])

    want = run(-1)
    for value in (31, -2):
        for a, b in zip(run(value), want, strict=True):
            assert torch.equal(a, b)


def test_a_run_repeats_bit_by_bit(device):
    given, _, indices, call = case("wide head", device)
    for a, b in zip(
        *(out_and_grads(of(grouped_attention, indices, call), given) for _ in range(2)), strict=True
    ):
        assert torch.equal(a, b)


def test_any_strides(device):
    """Parts of one projection, a last stride of 2, and an expanded gradient."""
    given, _, indices, call = case("plain", device)
    plain = [x.detach() for x in given[:3]]
    packed = torch.cat([x.transpose(1, 2).flatten(2) for x in plain], -1)
    parts = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in packed.chunk(3, -1)]
    sparse = torch.stack([plain[1], plain[1]], -1).flatten(-2)[..., ::2]
    call = of(grouped_attention, indices, call)
    want = call(*plain)
    for inputs in (parts, [plain[0], sparse, plain[2]]):
        assert torch.equal(call(*inputs), want)
    (grad,) = torch.autograd.grad(call(*given[:3]).sum(), given[0])
    ones = torch.ones_like(want).contiguous()
    (same,) = torch.autograd.grad(call(*given[:3]), given[0], ones)
    assert torch.equal(grad, same)


def test_opcheck(device):
    given, _, indices, call = case("small", device)
    args = (*given[:3], *indices, *given[3:], call["key_mask"], 1, 0.3, "triton")
    operator = torch.ops.colt5_vision.grouped_attention.default
    torch.library.opcheck(operator, args, rtol=1e-2, atol=1e-2)


def test_module_equals_eager(device, launches, monkeypatch):
    attend = GroupedAttention(window_size=4, num_heavy_tokens_kv=9)
    inputs = [x.detach().to(device).requires_grad_() for x in leaves(1, 1, 36, 16, dtype=DTYPE)]

    def call(*x):
        return attend(*x, grid_size=(5, 7), num_prefix_tokens=1)

    found = out_and_grads(call, inputs)
    assert {"forward_kernel", "sum_kernel"} <= set(launches)
    monkeypatch.setenv(backend.VARIABLE, "eager")
    want = out_and_grads(call, inputs)
    assert max(errors(found, [x.cpu().double() for x in want])) < 10 * LIMIT
