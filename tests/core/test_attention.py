"""What ConditionalRoutedImageAttention means, against references written by hand from its
weights."""

import math

import pytest
import torch
from torch.nn.functional import rms_norm

from colt5_vision import ConditionalRoutedImageAttention
from colt5_vision.positions import axial_rotary
from tests.support.dense import dense_attention, window_of

DIM, HEADS, WIDTH, WINDOW = 12, 4, 8, 3
GRID = (7, 8)
N = GRID[0] * GRID[1]
SHAPE = {
    "light_dim_head": WIDTH,
    "light_heads": HEADS,
    "heavy_dim_head": WIDTH,
    "heavy_heads": HEADS,
}


def attention(seed=0, dtype=torch.float64, **kwargs):
    """The module, channel last, every parameter off its initial zero."""
    torch.manual_seed(seed)
    options = {
        "num_heavy_tokens_kv": 6,
        "light_window_size": WINDOW,
        "channel_first": False,
        **SHAPE,
        **kwargs,
    }
    module = ConditionalRoutedImageAttention(DIM, **options).to(dtype)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def image(batch=2, seed=1, dtype=torch.float64, grid=GRID):
    return torch.randn(
        batch, *grid, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def some_mask(batch=2, seed=2):
    return torch.rand(batch, *GRID, generator=torch.Generator().manual_seed(seed)) < 0.6


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def positions(indices):
    return indices // GRID[1], indices % GRID[1]


def qkv(module, x, rotary=False):
    """Queries, keys and values (B, heads, N, head_dim) of the tokens x (B, N, C)."""
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.attend.norm.weight
    q, k, v = (split(t) for t in (normed @ module.attend.to_qkv.weight.T).chunk(3, -1))
    where = positions(torch.arange(N))
    return (axial_rotary(q, where), axial_rotary(k, where), v) if rotary else (q, k, v)


def project(module, x):
    return (x.transpose(1, 2).flatten(2) @ module.attend.to_out.weight.T).unflatten(1, GRID)


def slots(routing):
    return torch.where(routing.mask, routing.indices, -1)


def masked(x, mask):
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0)


@pytest.mark.parametrize("count", [1.0, N, 10 * N])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("routes, soft", [(1, False), (2, False), (1, True)])
def test_softmax_fusion_with_every_token_routed_is_full_attention(count, rotary, routes, soft):
    module = attention(
        fusion="softmax",
        num_heavy_tokens_kv=count,
        rotary_emb=rotary,
        num_routed_kv=routes,
        router_straight_through=not soft,
    )
    x = image()
    q, k, v = qkv(module, x.flatten(1, 2), rotary)
    full = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
    torch.testing.assert_close(module(x), project(module, full), atol=1e-9, rtol=1e-9)


def test_axial_rotary_depends_on_offsets_only():
    q, k = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    y, x = torch.tensor([0, 3, 7, 1, 50]), torch.tensor([4, 0, 2, 9, 11])

    def logits(dy, dx):
        return axial_rotary(q, (y + dy, x + dx)) @ axial_rotary(k, (y + dy, x + dx)).mT

    torch.testing.assert_close(logits(0, 0), logits(13, 0))
    torch.testing.assert_close(logits(0, 0), logits(-5, 64))
    torch.testing.assert_close(axial_rotary(q, (0 * y, 0 * x)), q)
    torch.testing.assert_close(axial_rotary(q, (y, x)).norm(dim=-1), q.norm(dim=-1))
    moved_rows, moved_columns = axial_rotary(k, (y + 1, x)), axial_rotary(k, (y, x + 1))
    base = axial_rotary(k, (y, x))
    for moved, still in (
        (moved_rows, 8),
        (moved_columns, 0),
    ):  # rows turn the first half, columns the second
        assert torch.equal(moved[..., still : still + 8], base[..., still : still + 8])
        assert (
            not torch.isclose(moved[..., 8 - still : 16 - still], base[..., 8 - still : 16 - still])
            .all(-1)
            .any()
        )
    with pytest.raises(ValueError, match="head_dim must be divisible by 4"):
        axial_rotary(q[..., :6], (y, x))


@pytest.mark.parametrize("router", ["learned", "mean_query", "random", "grid"])
@pytest.mark.parametrize("routes", [1, 2])
@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_softmax_fusion_equals_the_dense_twin(router, routes, use_mask, rotary):
    module = attention(fusion="softmax", router=router, num_routed_kv=routes, rotary_emb=rotary)
    x, mask = image(), some_mask() if use_mask else None
    if use_mask:
        mask[1] = False
        mask[1, 2, 3:6] = True  # fewer valid tokens than slots
    flat_mask = None if mask is None else mask.flatten(1)
    flat = masked(x, mask).flatten(1, 2)
    compared = dict(zip(("query", "key"), qkv(module, flat)[:2])) if router == "mean_query" else {}
    routing = module.attend.kv_router(
        flat, num_tokens=6, mask=flat_mask, grid_size=GRID, **compared
    )
    q, k, v = qkv(module, flat, rotary)
    want = dense_attention(q, k, v, GRID, WINDOW, slots(routing), key_mask=flat_mask)
    torch.testing.assert_close(
        module(x, mask=mask), masked(project(module, want), mask), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_router_learns_through_the_log_weights_as_in_the_dense_twin(straight_through):
    module = attention(fusion="softmax", router_straight_through=straight_through, num_routed_kv=2)
    x = image()
    routing = module.attend.kv_router(x.flatten(1, 2), num_tokens=6)
    want = project(
        module,
        dense_attention(
            *qkv(module, x.flatten(1, 2)), GRID, WINDOW, routing.indices, routing.log_weights
        ),
    )
    got, weight = module(x), image(seed=3)
    torch.testing.assert_close(got, want)
    parameters = list(module.parameters())
    grads = torch.autograd.grad((got * weight).sum(), parameters)
    for a, b in zip(grads, torch.autograd.grad((want * weight).sum(), parameters)):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("use_mask", [False, True])
def test_softmax_fusion_with_routed_queries(straight_through, use_mask):
    """A query that is not routed sees its window, a routed one window ∪ routed keys; its gate
    blends between the two."""
    module = attention(
        fusion="softmax", num_heavy_tokens_q=9, router_straight_through=straight_through
    )
    x, mask = image(), some_mask() if use_mask else None
    flat, flat_mask = masked(x, mask).flatten(1, 2), None if mask is None else mask.flatten(1)
    queries = module.attend.q_router(flat, num_tokens=9, mask=flat_mask)
    keys = module.attend.kv_router(flat, num_tokens=6, mask=flat_mask)
    window = dense_attention(*qkv(module, flat), GRID, WINDOW, key_mask=flat_mask)
    full = dense_attention(
        *qkv(module, flat), GRID, WINDOW, keys.indices, keys.log_weights, key_mask=flat_mask
    )
    gate = torch.zeros(2, N, dtype=torch.float64).scatter(
        1, queries.indices[:, 0], queries.gates[:, 0]
    )
    assert ((gate > 0).sum(1) == 9).all()
    want = project(module, torch.lerp(window, full, gate[:, None, :, None]))
    torch.testing.assert_close(module(x, mask=mask), masked(want, mask), atol=1e-9, rtol=1e-9)


def sum_reference(module, x, mask, rotary=False):
    """Light window attention, the null token, and the heavy output of the routed tokens in its
    place; one by one."""
    out = torch.empty_like(x.flatten(1, 2))
    light, heavy = module.attend.light_attn, module.attend.heavy_attn
    x, x_mask = masked(x, mask).flatten(1, 2), None if mask is None else mask.flatten(1)
    kv = module.attend.kv_router(x, num_tokens=6, mask=x_mask)
    q_router, null = module.attend.q_router, module.attend.null_q_token
    q = None if q_router is None else q_router(x, num_tokens=9, mask=x_mask)
    normed = rms_norm(x, (DIM,), light.norm.weight, 1e-6)
    window = dense_attention(
        *(split(t) for t in light.to_qkv(normed).chunk(3, -1)), GRID, WINDOW, key_mask=x_mask
    )
    window = light.to_out(window.transpose(1, 2).flatten(2))
    normed = rms_norm(x, (DIM,), heavy.norm.weight, 1e-6)
    routes = kv.indices.shape[1]
    per_head = heavy.to_kv.weight.view(HEADS, 2, WIDTH, DIM)
    for b in range(x.shape[0]):
        asked = range(N) if q is None else q.indices[b, 0][q.mask[b, 0]].tolist()
        gates = dict.fromkeys(asked, 1.0) if q is None else dict(zip(asked, q.gates[b, 0]))
        for i in range(N):
            if i not in gates:
                out[b, i] = window[b, i] + (0 if null is None else null)
                continue
            heads = []
            for h in range(HEADS):
                route = h * routes // HEADS
                used = kv.indices[b, route][kv.mask[b, route]]
                key_gates = kv.gates[b, route][kv.mask[b, route]].unsqueeze(1)
                query = heavy.to_q.weight.view(HEADS, WIDTH, DIM)[h] @ normed[b, i]
                query = query * gates[i] if heavy.multiply_queries_by_score else query
                keys, values = (
                    normed[b, used] @ per_head[h, 0].T,
                    normed[b, used] @ per_head[h, 1].T * key_gates,
                )
                keys = keys * key_gates if heavy.multiply_keys_by_score else keys
                if rotary:
                    query = axial_rotary(query[None], positions(torch.tensor([i])))[0]
                    keys = axial_rotary(keys, positions(used))
                keys = torch.cat([heavy.null_key.kv[0, h][None], keys])
                values = torch.cat([heavy.null_key.kv[1, h][None], values])
                heads.append((keys @ query / WIDTH**0.5).softmax(0) @ values)
            out[b, i] = window[b, i] + gates[i] * heavy.to_out(torch.cat(heads))
    return masked(out.unflatten(1, GRID), mask)


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_routed_kv": 2, "rotary_emb": True},
        {"num_heavy_tokens_q": 9},
        {"num_heavy_tokens_q": 9, "use_null_q_tokens": False},
        {
            "num_heavy_tokens_q": 9,
            "num_routed_kv": 2,
            "router_straight_through": False,
            "rotary_emb": True,
        },
        {
            "num_heavy_tokens_q": 9,
            "router_straight_through": False,
            "multiply_keys_by_score": True,
            "multiply_queries_by_score": True,
        },
        {"num_heavy_tokens_q": 9, "num_routed_kv": 4, "router": "random"},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_sum_fusion_equals_the_reference(kwargs, use_mask):
    module, x, mask = attention(**kwargs), image(), some_mask() if use_mask else None
    if use_mask:
        mask[1] = False
        mask[1, 2, 3:6] = True  # fewer valid tokens than slots
    want = sum_reference(module, x, mask, kwargs.get("rotary_emb", False))
    torch.testing.assert_close(module(x, mask=mask), want, atol=1e-9, rtol=1e-9)


def test_null_tokens_start_at_zero():
    module = ConditionalRoutedImageAttention(DIM, num_heavy_tokens_q=3, num_heavy_tokens_kv=3)
    assert not module.attend.null_q_token.any() and not module.attend.heavy_attn.null_key.kv.any()
    assert ConditionalRoutedImageAttention(DIM, num_heavy_tokens_kv=3).attend.null_q_token is None
    with torch.no_grad():  # an empty selection adds nothing to the light branch
        module = attention(use_null_q_tokens=False, num_heavy_tokens_q=9)
        module.attend.heavy_attn.null_key.kv.zero_()
        mask = torch.zeros(2, *GRID, dtype=torch.bool)
        assert not module(image(), mask=mask).any()


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
@pytest.mark.parametrize("q_count", [None, 9])
def test_who_reads_whom(fusion, q_count):
    """The output at i depends on the input at j exactly if j is in i's window, or i asks and j was
    routed."""
    module = attention(fusion=fusion, num_heavy_tokens_q=q_count, router="random")
    x = image(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).sum(-1).flatten(), x)
    reads = (jacobian != 0).any(-1).view(N, N)
    window = window_of(*GRID, WINDOW)
    routed = torch.zeros(N, dtype=torch.bool)
    routed[module.attend.kv_router(x.flatten(1, 2), num_tokens=6).indices[0, 0]] = True
    asks = torch.ones(N, dtype=torch.bool)
    if q_count:
        asks = torch.zeros(N, dtype=torch.bool).scatter(
            0, module.attend.q_router(x.flatten(1, 2), num_tokens=9).indices[0, 0], True
        )
    want = (window[:, None] == window) | (asks[:, None] & routed)
    assert torch.equal(reads, want)
    assert (want & (window[:, None] != window)).any(), "information crosses windows"


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_routing_is_global_not_per_window(fusion):
    """Where only one window is of interest, every slot goes there, and a far token sees it."""
    module = attention(fusion=fusion, num_heavy_tokens_kv=WINDOW**2)
    x, corner = image(1), (slice(0, 1), slice(0, WINDOW), slice(0, WINDOW))
    x[corner] += 20 * module.attend.kv_router.routing_token[0].detach()
    routed = module.attend.kv_router(x.flatten(1, 2), num_tokens=WINDOW**2).indices
    assert (window_of(*GRID, WINDOW)[routed] == 0).all()
    changed = x.clone()
    changed[corner] += image(1, seed=8)[corner]
    moved = (module(changed) - module(x)).abs().amax(-1)
    assert (moved > 1e-6).all()


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_memory_grows_linearly(fusion):
    """Largest allocation of forward and backward: 4 times the tokens, at most 4.5 times the
    bytes."""

    def largest(side):
        module = attention(
            fusion=fusion, dtype=torch.float32, light_window_size=16, num_heavy_tokens_kv=64
        )
        x = image(1, grid=(side, side), dtype=torch.float32).requires_grad_()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            module(x).sum().backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    small = largest(64)
    assert small >= 64 * 64 * DIM * 4
    assert largest(128) <= 4.5 * small


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("num_routed_kv", {"num_routed_kv": 3}),
        ("num_routed_kv", {"num_routed_kv": 0}),
        ("light_window_size", {"light_window_size": 0}),
        ("light_window_size", {"light_window_size": (4, 4, 4)}),
        *[
            ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": bad})
            for bad in (0, -3, math.nan, 1.5, 0.0, True, "8", None)
        ],
        *[("num_heavy_tokens_q", {"num_heavy_tokens_q": bad}) for bad in (0, math.nan, 1.5, False)],
        ("fusion", {"fusion": "mean"}),
        ("router", {"router": "best"}),
        ("light_heads", {"fusion": "softmax", "light_heads": 2}),
        ("light_dim_head", {"fusion": "softmax", "light_dim_head": 4}),
        ("heavy_heads", {"heavy_heads": 0}),
        ("light_heads", {"light_heads": 1.5}),
        ("heavy_dim_head", {"heavy_dim_head": 6, "rotary_emb": True}),
        ("multiply_keys_by_score", {"fusion": "softmax", "multiply_keys_by_score": True}),
        ("multiply_queries_by_score", {"multiply_queries_by_score": True}),
        ("use_null_q_tokens", {"use_null_q_tokens": True}),
        ("use_null_q_tokens", {"fusion": "softmax", "use_null_q_tokens": True}),
        ("has_light_attn", {"fusion": "softmax", "has_light_attn": False}),
        ("router_straight_through", {"router_straight_through": "no"}),
        ("num_routing_tokens", {"router_kwargs": {"num_routing_tokens": 2}}),
        ("fetch_k_ratio", {"router_kwargs": {"fetch_k_ratio": 0.5}}),
        ("dim", {"dim": 0}),
    ],
)
def test_constructor_errors_name_the_argument(name, kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"^[\w, \['\]]*\b{name}\b.*: "):
        ConditionalRoutedImageAttention(**{"dim": DIM, "num_heavy_tokens_kv": 4, **SHAPE, **kwargs})


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
@pytest.mark.parametrize(
    "given", [{}, {"light_heads": 3}, {"heavy_heads": 3}, {"light_dim_head": 5, "heavy_heads": 2}]
)
def test_heads_that_are_not_given_agree_where_there_is_one_set(fusion, given):
    layer = ConditionalRoutedImageAttention(DIM, num_heavy_tokens_kv=4, fusion=fusion, **given)
    full = {"light_heads": 8, "heavy_heads": 8, "light_dim_head": 64, "heavy_dim_head": 64}
    if fusion == "softmax":
        full |= {name.replace("light", "heavy"): value for name, value in given.items()}
        full |= {name.replace("heavy", "light"): value for name, value in given.items()}
    full |= given
    spelled = ConditionalRoutedImageAttention(DIM, num_heavy_tokens_kv=4, fusion=fusion, **full)
    assert shapes(layer) == shapes(spelled)


def shapes(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


@pytest.mark.parametrize(
    "name, call",
    [
        ("x", {"x": torch.randn(2, N, DIM)}),
        ("x", {"x": torch.randn(2, DIM, *GRID)}),
        ("x", {"x": torch.randn(2, 0, 4, DIM)}),
        ("x", {"x": torch.ones(2, *GRID, DIM, dtype=torch.long)}),
        ("x", {"x": None}),
        ("mask", {"mask": torch.ones(2, N, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(1, *GRID, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(2, *GRID)}),
        ("num_heavy_tokens_q", {"num_heavy_tokens_q": 3}),
        *[
            ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": bad})
            for bad in (0, math.nan, 2.0, True)
        ],
    ],
)
@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_call_errors_name_the_argument(name, call, fusion):
    module = attention(fusion=fusion, dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: "):
        module(**{"x": torch.randn(2, *GRID, DIM), **call})


def test_the_light_branch_starts_small():
    """What is near a token must not drown, at first, what a few routed tokens tell all of them."""
    torch.manual_seed(0)
    module = ConditionalRoutedImageAttention(DIM, num_heavy_tokens_kv=4)
    light, heavy = module.attend.light_attn.to_out.weight, module.attend.heavy_attn.to_out.weight
    assert light.shape == heavy.shape
    torch.testing.assert_close(light.std() / heavy.std(), torch.tensor(0.2), atol=0.02, rtol=0)


@pytest.mark.parametrize("straight_through", [True, False])
def test_routers_of_attention_carry_the_gradient_of_the_logarithm(straight_through):
    options = {
        "num_heavy_tokens_kv": 4,
        "num_heavy_tokens_q": 4,
        "router_straight_through": straight_through,
    }
    module = ConditionalRoutedImageAttention(DIM, **options)
    assert {module.attend.q_router.log_gradient, module.attend.kv_router.log_gradient} == {
        straight_through
    }
    if straight_through:
        plain = ConditionalRoutedImageAttention(
            DIM, **options, router_kwargs={"log_gradient": False}
        )
        assert not plain.attend.kv_router.log_gradient
