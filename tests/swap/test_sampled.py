"""SampledAttention against scaled dot-product attention."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from colt5_vision.checks import token_count
from colt5_vision.ops import window_attention
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import KINDS, SampledAttention, choose_queries
from colt5_vision.swap.sampling import inclusion_gates
from tests.support.attention_cases import leaves, randn
from tests.support.dense import dense_attention
from tests.support.marks import further
from tests.support.sampled_cases import GRID, TOKENS, close, reads, routing, tensors

NOTHING = ("window", 9)  # its queries all see the same
every_router = pytest.mark.parametrize("router", KINDS)
EVERY = [
    (router, number) for router in KINDS for number in (None, 9) if (router, number) != NOTHING
]
queries = pytest.mark.parametrize(("router", "queries"), EVERY)


def routed_keys(part, q, k, v, *, grid_size, features=None, pair_bias=None, **call):
    """What the part routes: (indices, log_weights), or None."""
    tokens = q.shape[2] - call.get("num_prefix_tokens", 0)
    slots = token_count("num_heavy_tokens_kv", part.num_heavy_tokens_kv, tokens)
    probes = None
    if part.samples:
        probes = part.probe(q, k, v, grid_size=grid_size, pair_bias=pair_bias, **call)
    return part.route(q, k, slots, grid_size=grid_size, features=features, probes=probes, **call)


def trained(part):
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    return part


def some_mask(batch=2, prefix=0):
    mask = randn(batch, prefix + TOKENS, seed=21) > -0.3
    mask[:, :prefix] = True
    return mask


def corrected(out, q, k, v, mask, prefix):
    """With the mean error of tokens with like queries: on so small a map each is a probe."""
    error = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]) - out
    valid = mask[:, None, prefix:, None]
    error, query = error[:, :, prefix:] * valid, q[:, :, prefix:]
    count = valid.sum(2, keepdim=True)
    mean = (query * valid).sum(2, keepdim=True) / count
    unit = ((query - mean).square().sum(-1, keepdim=True) * valid).sum(2, keepdim=True) / count
    weight = (
        (-4 * torch.cdist(query, query).square() / unit)
        .masked_fill(~valid.mT, float("-inf"))
        .softmax(-1)
    )
    return out + F.pad(weight @ error, (0, 0, prefix, 0))


@pytest.mark.parametrize("router", [r for r in KINDS if r != "window"])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_every_key_routed_is_full_attention(router, prefix, scale, masked):
    q, k, v = tensors(prefix)
    mask = some_mask(2, prefix) if masked else None
    call = {
        "grid_size": GRID,
        "num_prefix_tokens": prefix,
        "key_mask": mask,
        "scale": scale,
        **reads(router),
    }
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None, None], scale=scale
    )
    close(routing(1.0, router=router)(q, k, v, **call), expected)
    close(routing(TOKENS, router=router)(q, k, v, **call), expected)


@every_router
@pytest.mark.parametrize("keys", [1, 5, 0.25, 400])
def test_every_router_is_attention_to_the_window_and_what_it_routes(router, keys):
    q, k, v = tensors(2)
    part, mask = routing(keys, router=router), some_mask(2, 2)
    call = {"grid_size": GRID, "num_prefix_tokens": 2, "key_mask": mask, **reads(router)}
    out, found = part(q, k, v, **call), routed_keys(part, q, k, v, **call)
    if router == "window":
        assert found is None
        close(
            out,
            window_attention(
                q, k, v, grid_size=GRID, window_size=3, key_mask=mask, num_prefix_tokens=2
            ),
        )
        return
    indices, weights = found
    slots = {1: 1, 5: 5, 0.25: 10, 400: TOKENS}[keys]
    assert abs(indices.shape[1] - slots) <= 1 and weights.shape == indices.shape
    assert (indices >= 0).any(1).all() and (weights[indices >= 0] >= 0).all()
    expected = dense_attention(q, k, v, GRID, 3, indices, weights, mask, 2, own=False)
    if router in ("sampled", "learned"):
        expected = corrected(expected, q, k, v, mask, 2)
    close(out, expected)


def test_controls_stand_for_what_they_leave_out():
    q, k, v = tensors()
    for router, expected in (("random", 42 / 6), ("grid", 42 / 6), ("mean_query", 1.0)):
        _, weights = routed_keys(routing(6, router=router), q, k, v, grid_size=GRID)
        close(weights.exp(), torch.full_like(weights, expected), 1e-5)
    mask = torch.arange(TOKENS) < 12
    _, weights = routed_keys(
        routing(6, router="random"), q, k, v, grid_size=GRID, key_mask=mask.expand(2, -1)
    )
    close(weights.exp(), torch.full_like(weights, 2.0), 1e-5)
    indices, weights = routed_keys(routing(6), q, k, v, grid_size=GRID)
    gates = inclusion_gates(routing(6).probe(q, k, v, grid_size=GRID).importance, 6, None)
    close(weights.exp(), 1 / gates.gather(1, indices))


def test_mean_of_draws_comes_closer_than_the_top_keys():
    """A flat tail: what every query attends to a little, and the top keys leave out."""
    q, k, v = tensors(sharpness=0.7)
    v = v + 1 + torch.linspace(-3, 3, TOKENS, dtype=v.dtype).view(1, 1, -1, 1)
    full = F.scaled_dot_product_attention(q, k, v)
    call = {"grid_size": GRID}
    part, generator = routing(8, window=1), torch.Generator().manual_seed(0)
    draws = torch.stack([part(q, k, v, generator=generator, **call) for _ in range(200)])
    top = routing(8, window=1, router="mean_query")(q, k, v, **call)
    error = lambda x: (x - full).square().mean().sqrt().item()
    assert draws.std(0).max() > 0.01
    assert error(draws.mean(0)) < 0.35 * error(top)
    assert sum(error(x) for x in draws) / 200 < error(top)


@queries
def test_a_batch_gives_what_its_samples_give(router, queries):
    q, k, v = tensors(1, batch=3)
    mask, seen = some_mask(3, 1), reads(router, 3)
    part = routing(0.25, router=router, num_heavy_tokens_q=queries)
    call = {"grid_size": GRID, "num_prefix_tokens": 1}
    if router == "learned":
        trained(part)
    whole = part(q, k, v, key_mask=mask, **seen, **call)
    for i in range(3):
        one = slice(i, i + 1)
        own = {name: x[one] for name, x in (seen | {"key_mask": mask}).items()}
        close(whole[one], part(q[one], k[one], v[one], **own, **call))


@every_router
def test_a_bad_sample_leaves_the_others_unharmed_and_none_is_fine(router):
    part = routing(router=router, num_heavy_tokens_q=9).to(torch.float32)
    call = {"grid_size": GRID, "num_prefix_tokens": 1}
    inputs = [x.float() for x in tensors(1, batch=3)]
    expected = part(*inputs, **reads(router, 3), **call)
    for x, bad in zip(inputs, (float("nan"), float("inf"), float("-inf"))):
        x[1] = bad
    assert torch.equal(part(*inputs, **reads(router, 3), **call)[::2], expected[::2])
    none = part(*(x[:0].requires_grad_() for x in inputs), **reads(router, 0), **call)
    assert none.shape == (0, 4, TOKENS + 1, 8)
    none.sum().backward()


@queries
def test_masked_tokens_have_no_influence(router, queries):
    mask = some_mask(2, 2)
    mask[0, 9:] = False  # fewer valid tokens than slots
    part = routing(0.4, router=router, num_heavy_tokens_q=queries)
    if router == "learned":
        trained(part)
    inputs = [x.requires_grad_() for x in tensors(2)]
    call = {"grid_size": GRID, "num_prefix_tokens": 2, "key_mask": mask, **reads(router)}
    out = part(*inputs, **call)
    rows = mask[:, None, :, None]
    grads = torch.autograd.grad((out * rows).square().sum(), inputs)
    masked = ~mask[:, None, :, None]
    assert all((g * masked).abs().max() == 0 and g.isfinite().all() for g in grads)
    assert all(g.any() for g in grads)
    hidden = [torch.where(masked, float("nan"), x.detach()) for x in inputs]
    close(part(*hidden, **call).where(rows, 0), out.where(rows, 0))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_chosen_queries_see_the_routed_keys_and_the_others_their_window(prefix, masked):
    q, k, v = tensors(prefix)
    mask = some_mask(2, prefix) if masked else None
    call = {"grid_size": GRID, "num_prefix_tokens": prefix, "key_mask": mask}
    few = routing(0.5, num_heavy_tokens_q=11)(q, k, v, **call)
    every = routing(0.5)(q, k, v, **call)
    alone = window_attention(q, k, v, window_size=3, **call)
    same = lambda a, b: (a - b).abs().amax((1, 3))[:, prefix:] < 1e-10
    chosen = same(few, every)
    assert (chosen | same(few, alone)).all()
    assert chosen.sum(-1).tolist() == [11, 11]
    assert not (same(every, alone) & chosen).any()
    close(few[:, :, :prefix], every[:, :, :prefix])
    assert mask is None or mask[:, prefix:][chosen].all()
    close(routing(0.5, num_heavy_tokens_q=1.0)(q, k, v, **call), every)


def test_queries_that_attend_far_are_chosen():
    """One token's query points at a far key that nothing else shares; the others look at
    themselves."""
    k = F.normalize(randn(1, 1, TOKENS, 64), dim=-1) * 6
    q = k.clone()
    q[:, :, 30] = k[:, :, 0]
    part = routing(TOKENS, num_heavy_tokens_q=1)
    routed = routed_keys(part, q, k, k, grid_size=GRID)
    assert choose_queries(q, k, routed, 1, None, None).tolist() == [[30]]


def test_chosen_queries_depend_on_the_scaled_product():
    q, k, v = tensors(1)
    call = {"grid_size": GRID, "num_prefix_tokens": 1}
    part = routing(0.5, num_heavy_tokens_q=4)
    close(part(q, k, v, scale=3.0, **call), part(q * 3 * q.shape[-1] ** 0.5, k, v, **call))


def test_a_mask_of_the_map_leaves_the_prefix_valid():
    q, k, v = tensors(2)
    mask = some_mask(2, 2)
    mask[:, :2] = True
    call = {"grid_size": GRID, "num_prefix_tokens": 2}
    assert torch.equal(
        routing()(q, k, v, key_mask=mask[:, 2:], **call), routing()(q, k, v, key_mask=mask, **call)
    )


def test_queries_that_see_nothing_have_no_say():
    """A pairwise padding mask: the rows of masked tokens are -inf throughout."""
    q, k, v = tensors()
    valid = some_mask(2, 0)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    bias = torch.where(pairs, 0.0, float("-inf"))
    rows = torch.arange(2).view(-1, 1, 1, 1, 1)
    found = routed_keys(
        routing(), q, k, v, grid_size=GRID, pair_bias=lambda i, j: bias[rows, 0, i, j]
    )
    expected = routed_keys(routing(), q, k, v, grid_size=GRID, key_mask=valid)
    assert all(x.isfinite().all() for x in found) and (found[0] >= 0).all()
    told = [
        routing().probe(q, k, v, grid_size=GRID, **how)
        for how in ({"pair_bias": lambda i, j: bias[rows, 0, i, j]}, {"key_mask": valid})
    ]
    close(*(x.importance[valid] for x in told))
    assert all(torch.equal(x.valid[:, 0, :, 0], valid[:, x.rows]) for x in told)
    assert expected[0].shape == found[0].shape


def test_a_masked_first_token_has_no_influence_on_the_choice_of_queries():
    q, k, v = tensors()
    mask = torch.arange(TOKENS).expand(2, -1) % 3 > 0
    call = {"grid_size": GRID, "key_mask": mask}
    part = routing(30, num_heavy_tokens_q=8)  # fewer valid tokens than slots: some are empty
    expected = part(q, k, v, **call)
    k = k.masked_fill(~mask[:, None, :, None], float("nan"))
    rows = mask[:, None, :, None]
    close(part(q, k, v, **call).where(rows, 0), expected.where(rows, 0))


def test_a_module_can_draw_its_own_samples():
    q, k, v = tensors()
    part = routing(8)
    fixed = part(q, k, v, grid_size=GRID)
    part.generator = torch.Generator().manual_seed(1)  # offset .76 of the comb, the fixed one is .5
    assert not torch.equal(part(q, k, v, grid_size=GRID), fixed)
    part.generator = None
    assert torch.equal(part(q, k, v, grid_size=GRID), fixed)


def test_learned_router_starts_as_the_mean_query_and_learns():
    inputs = tensors(1)
    where = {"grid_size": GRID, "num_prefix_tokens": 1}
    call = where | reads("learned")
    learned = routing(router="learned")
    out = learned(*inputs, **call)
    assert torch.equal(out, routing()(*inputs, **where))
    out.square().sum().backward()
    assert learned.correction[2].weight.grad.any()
    trained(learned).zero_grad()
    out = learned(*inputs, **call)
    assert (out - routing()(*inputs, **where)).abs().max() > 1e-3
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in learned.parameters())
    assert all(p.grad.any() for p in (learned.correction[0].weight, learned.correction[2].weight))
    assert not list(routing().parameters())


@every_router
def test_gradients_reach_queries_keys_and_values(router):
    inputs = leaves(2, 4, TOKENS, 8)
    out = routing(router=router)(*inputs, grid_size=GRID, **reads(router))
    assert all(
        g.any() and g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs)
    )


@every_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_comes_close(router, dtype):
    part = routing(1.0, router=router)
    exact = tensors(1)
    call = {"grid_size": GRID, "num_prefix_tokens": 1, **reads(router, dtype=dtype)}
    out = part(*(x.to(dtype) for x in exact), **call)
    assert out.dtype == dtype
    expected = part(*exact, **call)
    assert (out - expected).abs().max() < {torch.float32: 1e-5, torch.float16: 0.01}.get(
        dtype, 0.06
    )
    few = routing(0.25, router=router, num_heavy_tokens_q=5)(*(x.to(dtype) for x in exact), **call)
    assert few.dtype == dtype and few.isfinite().all()


@every_router
def test_autocast_routes_in_single_precision(router):
    part, call = (
        routing(router=router, num_heavy_tokens_q=9),
        {"grid_size": GRID, **reads(router)},
    )
    inputs = [x.float() for x in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        found, out = routed_keys(part, *inputs, **call), part(*inputs, **call)
    expected = routed_keys(part, *inputs, **call)
    assert out.isfinite().all()
    if found is not None:
        assert torch.equal(found[0], expected[0])
        close(found[1], expected[1])


@pytest.mark.parametrize(
    ("router", "queries"),
    [
        ("sampled", None),
        *further(*(case for case in EVERY if case != ("sampled", None))),
    ],
)
def test_compiles_whole_and_copies(router, queries):
    torch.compiler.reset()
    part = routing(router=router, num_heavy_tokens_q=queries)
    call = {
        "grid_size": GRID,
        "num_prefix_tokens": 1,
        "key_mask": some_mask(2, 1),
        **reads(router),
    }
    inputs = leaves(2, 4, TOKENS + 1, 8)
    outs = [
        f(*inputs, **call) for f in (part, torch.compile(part, fullgraph=True, backend="aot_eager"))
    ]
    close(*outs)
    close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs))
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(twin(*inputs, **call), outs[0])
        assert repr(twin) == repr(part) and f"router='{router}'" in repr(part)


@pytest.mark.parametrize("kind", [SampledAttention, GroupedAttention])
def test_a_generator_is_refused_where_a_layer_runs_again_in_backward(kind):
    q = torch.randn(1, 2, 99, 8, requires_grad=True)
    attention = kind(window_size=2, num_heavy_tokens_kv=4)
    attention.generator = torch.Generator()

    def run(q):
        return attention(q, q, q, grid_size=(9, 11))

    out = torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False)
    with pytest.raises(RuntimeError, match="generator"):
        out.sum().backward()
    attention.generator = None
    torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False).sum().backward()
