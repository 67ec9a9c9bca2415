"""CoordinateDescentRouter and Routing: what is chosen, what the gates are, and where their gradient
goes."""

import math

import pytest
import torch

from colt5_vision import CoordinateDescentRouter, Routing
from colt5_vision.ops import coordinate_descent, soft_topk
from colt5_vision.ops.grid import cell_slots

DIM = 16
KINDS = ("learned", "mean_query", "random", "grid")


def tokens(batch=3, num=40, dim=DIM, seed=0, dtype=torch.float64):
    return torch.randn(batch, num, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def router(seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    return CoordinateDescentRouter(DIM, **kwargs).to(dtype)


def hand_logits(x, token):
    return torch.einsum("bnd,rd->brn", x / x.norm(dim=-1, keepdim=True), token)


@pytest.mark.parametrize("dim", [8, 64, 257, 1024])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e-3])
def test_logits_have_unit_scale_at_init(dim, scale):
    torch.manual_seed(0)
    module = CoordinateDescentRouter(dim, num_routing_tokens=256)
    logits = module.logits(torch.randn(2, 256, dim) * scale)
    assert logits.shape == (2, 256, 256) and logits.dtype == torch.float32
    assert 0.9 < logits.std() < 1.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fields_and_overlap_with_the_top_k_of_the_logits(kind, routes, dtype):
    module = router(router=kind, num_routing_tokens=routes, dtype=dtype)
    x = tokens(dtype=dtype)
    routing = module(x, num_tokens=7)
    logits = module.logits(x)
    scored = kind in ("learned", "mean_query")  # the others do not look at x
    wide = torch.float64 if dtype == torch.float64 and scored else torch.float32
    assert isinstance(routing, Routing) and all(field.shape == (3, routes, 7) for field in routing)
    assert (routing.indices.dtype, routing.mask.dtype) == (torch.int64, torch.bool)
    assert routing.gates.dtype == routing.log_weights.dtype == wide
    assert logits.shape == (3, routes, 40) and routing.mask.all()
    chosen = logits.gather(-1, routing.indices)
    assert torch.equal(chosen, logits.topk(7).values), "not the top-k, or not in falling order"
    assert all(len(set(row.tolist())) == 7 for row in routing.indices.flatten(0, 1))


@pytest.mark.parametrize("n_iters", [None, 30])
@pytest.mark.parametrize("field", ["gates", "log_weights"])
@pytest.mark.parametrize("straight_through", [True, False])
def test_gates_and_their_gradient_equal_the_soft_path(n_iters, field, straight_through):
    module = router(
        straight_through=straight_through, n_iters=n_iters, eps=0.7, num_routing_tokens=2
    )
    x = tokens().requires_grad_()
    got = getattr(module(x, num_tokens=8), field)

    logits = hand_logits(x, module.routing_token)
    budget = 8 * 9 / 8
    if n_iters is None:
        soft = soft_topk(logits, budget, eps=0.7)
    else:
        soft = coordinate_descent(logits, budget, n_iters=n_iters, eps=0.7)
    soft = soft.gather(-1, logits.topk(8).indices)
    soft = soft if field == "gates" else soft.log()

    if straight_through:
        assert torch.equal(got, torch.full_like(got, 1.0 if field == "gates" else 0.0))
    else:
        torch.testing.assert_close(got, soft)
    weight = tokens(3, 2, 8, seed=1)
    wanted = torch.autograd.grad((soft * weight).sum(), (x, module.routing_token))
    grads = torch.autograd.grad((got * weight).sum(), (x, module.routing_token))
    for grad, want in zip(grads, wanted):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("n_iters", [None, 30])
def test_log_gradient_is_that_of_the_log_weights(n_iters):
    module = router(n_iters=n_iters, eps=0.7, num_routing_tokens=2, log_gradient=True)
    x, weight = tokens().requires_grad_(), tokens(3, 2, 8, seed=1)
    routing = module(x, num_tokens=8)
    assert torch.equal(routing.gates, torch.ones_like(routing.gates))
    given = (x, module.routing_token)
    grads = torch.autograd.grad((routing.gates * weight).sum(), given, retain_graph=True)
    for grad, want in zip(grads, torch.autograd.grad((routing.log_weights * weight).sum(), given)):
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("ratio", [1.0, 9 / 8, 2.0])
def test_fetch_k_ratio_scales_the_sum_of_the_gates(ratio):
    module = router(straight_through=False, fetch_k_ratio=ratio, eps=1e-3)
    gates = module(
        tokens(num=64) * 3, num_tokens=1.0
    ).gates  # all tokens: the whole row of gates, budget capped at N
    assert torch.equal(gates, torch.ones_like(gates))
    module.eps = 1.0
    x = tokens(num=64)
    want = soft_topk(hand_logits(x, module.routing_token), 16 * ratio).gather(
        -1, module(x, num_tokens=16).indices
    )
    torch.testing.assert_close(module(x, num_tokens=16).gates, want)


def test_inference_routes_as_training_does():
    module, x = router(), tokens()
    trained = module(x, num_tokens=9)
    with torch.no_grad():
        inferred = module(x, num_tokens=9)
    assert all(torch.equal(a, b) for a, b in zip(trained, inferred))
    assert trained.gates.requires_grad and not inferred.gates.requires_grad


@pytest.mark.parametrize("routes", [1, 2])
def test_external_routing_tokens_are_learned_ones_given_per_sample(routes):
    learned, x = router(num_routing_tokens=routes), tokens()
    external = router(num_routing_tokens=routes, learned_routing_tokens=False)
    assert not list(external.parameters())
    shared = learned.routing_token.detach().expand(3, -1, -1).clone().requires_grad_()
    got, want = external(x, num_tokens=6, routing_tokens=shared), learned(x, num_tokens=6)
    assert torch.equal(got.indices, want.indices)
    got.gates.pow(2).cumsum(-1).sum().backward()
    assert (shared.grad.abs().amax(-1) > 0).all(), "every sample's routing token gets a gradient"
    own = tokens(3, routes, DIM, seed=5)
    each = external.logits(x, routing_tokens=own)
    torch.testing.assert_close(
        each, torch.stack([hand_logits(x[i : i + 1], own[i])[0] for i in range(3)])
    )
    if routes == 1:
        assert torch.equal(external.logits(x, routing_tokens=own[:, 0]), each)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_cosine_logits_are_the_scaled_cosine(scale):
    module, x = (
        router(cosine_sim_routing=True, cosine_sim_scale=scale, num_routing_tokens=2),
        tokens(),
    )
    cosine = torch.cosine_similarity(x.unsqueeze(1), module.routing_token.unsqueeze(1), dim=-1)
    torch.testing.assert_close(
        module.logits(x), cosine * (math.sqrt(DIM) if scale is None else scale)
    )


@pytest.mark.parametrize("grid, cell", [((8, 8), 4), ((10, 7), 4), ((9, 5), (2, 3)), ((3, 4), 8)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_iters", [None, 20])
def test_stratified_routing(grid, cell, masked, n_iters):
    n, k = grid[0] * grid[1], grid[0] * grid[1] // 4
    x = tokens(2, n)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    module = router(cell_size=cell, straight_through=False, n_iters=n_iters)
    routing = module(x, num_tokens=k, grid_size=grid, mask=mask)
    valid = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    assert routing.mask.all() and valid.gather(1, routing.indices[:, 0]).all()
    logits = hand_logits(x, module.routing_token)[:, 0]
    cells = [
        i[inside]
        for i, inside in zip(
            *cell_slots(*grid, (cell, cell) if isinstance(cell, int) else cell, "cpu")
        )
    ]
    assert sorted(torch.cat(cells).tolist()) == list(range(n))
    gate_of = torch.full((2, n), torch.nan, dtype=torch.float64).scatter(
        1, routing.indices[:, 0], routing.gates[:, 0]
    )
    for b in range(2):
        for members in cells:
            members = members[valid[b, members]]
            if not len(members):
                continue
            share = len(members) / valid[b].sum()
            routed = gate_of[b, members].isfinite()
            assert abs(int(routed.sum()) - k * share) <= 1, "a cell without its share"
            own = logits[b, members]
            assert not routed.any() or (own > own[routed].min()).sum() + 1 == routed.sum(), (
                "not the best of the cell"
            )
            budget = float(min(k * 9 / 8, n) * share)
            soft = (
                soft_topk(own, budget)
                if n_iters is None
                else coordinate_descent(own, budget, n_iters=n_iters)
            )
            torch.testing.assert_close(gate_of[b, members][routed], soft[routed])


@pytest.mark.parametrize("routes, heads", [(1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_mean_query_logits_equal_brute_force(routes, heads, masked):
    x, (q, k) = tokens(2, 20), tokens(2, 2 * heads * 20, 5, seed=1).view(2, 2, heads, 20, 5)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    got = router(router="mean_query", num_routing_tokens=routes).logits(
        x, query=q, key=k, mask=mask
    )
    for b in range(2):
        valid = mask[b] if masked else torch.ones(20, dtype=torch.bool)
        for r in range(routes):
            score = torch.zeros(int(valid.sum()), dtype=torch.float64)
            for h in range(r * heads // routes, (r + 1) * heads // routes):
                mean = q[b, h, valid].mean(0)
                score += (k[b, h, valid] @ mean / 5**0.5).softmax(0)
            torch.testing.assert_close(got[b, r, valid], score.log())


def test_random_routing_is_deterministic_fresh_with_a_generator_and_uniform():
    module, x = router(router="random", num_routing_tokens=2), tokens(4, 1024)
    first, again = (module(x + i, num_tokens=256) for i in range(2))
    assert torch.equal(first.indices, again.indices) and not torch.equal(
        first.indices[:, 0], first.indices[:, 1]
    )
    drawn = [
        module(x, num_tokens=256, generator=torch.Generator().manual_seed(s)).indices
        for s in (1, 2, 1)
    ]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[0][1]), "samples of a batch are drawn apart"
    for indices in (first.indices, *drawn):
        row = indices[0, 0]
        y, col = row // 32, row % 32
        for part in (y < 16, col < 16, y % 2 == 0, col % 2 == 0, (y + col) % 2 == 0):
            assert 96 < part.sum() < 160  # 128 expected, deviation 7
    flat = module.logits(x)[0].flatten()
    assert flat.min() >= 0 and flat.max() < 1 and (flat.histc(8, 0, 1) / 256 - 1).abs().max() < 0.25


@pytest.mark.parametrize("grid", [(16, 16), (8, 12)])
def test_the_grid_starts_with_the_lattice_of_stride_2_then_the_checkerboard(grid):
    x, module = tokens(1, grid[0] * grid[1]), router(router="grid", num_routing_tokens=2)
    routed = module(x, num_tokens=0.25, grid_size=grid).indices[0]
    for r in range(2):  # the second route is the lattice shifted by one
        lattice = [y * grid[1] + c for y in range(r, grid[0], 2) for c in range(r, grid[1], 2)]
        assert sorted(routed[r].tolist()) == lattice
    half = module(x, num_tokens=0.5, grid_size=grid).indices[0]
    assert (
        half.shape[1] == grid[0] * grid[1] // 2
        and ((half // grid[1] + half % grid[1]) % 2 == 0).all()
    )


@pytest.mark.parametrize("num", [1, 5, 18, 64, 131, 255])
def test_grid_routing_gives_each_quadrant_its_share(num):
    row = router(router="grid")(tokens(1, 256), num_tokens=num, grid_size=(16, 16)).indices[0, 0]
    counts = torch.bincount((row // 128) * 2 + (row % 16) // 8, minlength=4)
    assert counts.sum() == num and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell_size", [None, 3])
@pytest.mark.parametrize("straight_through", [True, False])
def test_masked_tokens_are_never_routed_while_a_valid_one_is_left(
    kind, cell_size, straight_through
):
    module = router(
        router=kind, cell_size=cell_size, straight_through=straight_through, num_routing_tokens=2
    )
    x = tokens(3, 42).requires_grad_()
    mask = torch.rand(3, 42, generator=torch.Generator().manual_seed(3)) < 0.5
    mask[1] = torch.arange(42) == 17  # fewer valid tokens than slots
    mask[2] = False
    routing = module(x, num_tokens=10, mask=mask, grid_size=(6, 7))
    picked = mask.unsqueeze(1).expand(-1, 2, -1).gather(-1, routing.indices)
    assert torch.equal(picked, routing.mask)
    assert routing.mask.sum(-1).tolist() == [[10, 10], [1, 1], [0, 0]]
    assert (routing.indices[1, :, 0] == 17).all()
    assert (routing.indices >= 0).all() and (routing.indices < 42).all()
    empty = ~routing.mask
    assert (routing.gates[empty] == 0).all() and (routing.log_weights[empty] == -math.inf).all()
    assert (routing.gates[~empty] > 0).all() and routing.log_weights[~empty].isfinite().all()
    if routing.gates.requires_grad:
        finite = torch.where(empty, 0, routing.log_weights) + routing.gates
        (grad,) = torch.autograd.grad((finite * tokens(3, 2, 10)).sum(), x)
        assert (
            grad.isfinite().all()
            and (grad[~mask] == 0).all()
            and (kind != "learned" or grad[0].abs().max() > 0)
        )


@pytest.mark.parametrize(
    "count, want",
    [(1, 1), (40, 40), (41, 40), (10**9, 40), (0.25, 10), (1.0, 40), (1e-6, 1), (0.26, 10)],
)
def test_counts(count, want):
    assert router()(tokens(), num_tokens=count).indices.shape[-1] == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_iters, cell_size", [(None, None), (15, None), (None, 4)])
def test_a_batch_gives_what_its_samples_give(kind, n_iters, cell_size):
    module = router(
        router=kind,
        straight_through=False,
        n_iters=n_iters,
        cell_size=cell_size,
        num_routing_tokens=2,
    )
    x = tokens(4, 42)
    mask = torch.rand(4, 42, generator=torch.Generator().manual_seed(3)) < 0.7
    whole = module(x, num_tokens=9, mask=mask, grid_size=(6, 7))
    for i in range(4):
        one = module(x[i : i + 1], num_tokens=9, mask=mask[i : i + 1], grid_size=(6, 7))
        for field, own in zip(whole, one):
            torch.testing.assert_close(field[i : i + 1], own)
    assert module(x[:0], num_tokens=9, mask=mask[:0], grid_size=(6, 7)).gates.shape == (0, 2, 9)


def test_routes_choose_with_their_own_token():
    module, x = router(num_routing_tokens=3), tokens()
    routing = module(x, num_tokens=5)
    for r in range(3):
        one = router()
        one.routing_token.data = module.routing_token.data[r : r + 1]
        assert torch.equal(one(x, num_tokens=5).indices[:, 0], routing.indices[:, r])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_raw_logits(dtype):
    """``normalize=False``: long tokens win; the comparison is float32 also of bfloat16 tokens and
    under autocast."""
    module, x = router(num_routing_tokens=2, normalize=False).to(dtype), tokens(dtype=dtype) * 5
    wide = torch.promote_types(dtype, torch.float32)
    want = torch.einsum("bnd,rd->brn", x.to(wide), module.routing_token.to(wide))
    with torch.autocast("cpu", torch.bfloat16):
        logits = module.logits(x)
    assert logits.dtype == wide
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(module.logits(2 * x), 2 * want)


def test_state_dict_round_trip():
    first, second = router(0, num_routing_tokens=2), router(1, num_routing_tokens=2)
    x = tokens()
    assert not torch.equal(first.logits(x), second.logits(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.logits(x), second.logits(x))
    assert not router(router="grid").state_dict()
    with pytest.raises(RuntimeError, match="routing_token"):
        router().load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("router", {"router": "best"}),
        ("eps_init", {"eps_init": 1.0}),
        ("eps_decay", {"eps_decay": 0.5}),
        ("eps_decay", {"n_iters": 5, "eps_decay": 1.5}),
        ("eps_init", {"n_iters": 5, "eps_init": -1.0}),
        ("fetch_k_ratio", {"fetch_k_ratio": 0.9}),
        ("fetch_k_ratio", {"fetch_k_ratio": math.nan}),
        ("eps", {"eps": 0.0}),
        ("n_iters", {"n_iters": 0}),
        ("n_iters", {"n_iters": 1.5}),
        ("num_routing_tokens", {"num_routing_tokens": 0}),
        ("cell_size", {"cell_size": 0}),
        ("cell_size", {"cell_size": (2, 2, 2)}),
        ("cosine_sim_scale", {"cosine_sim_scale": 2.0}),
        ("cosine_sim_scale", {"cosine_sim_routing": True, "cosine_sim_scale": 0.0}),
        ("cosine_sim_routing", {"router": "random", "cosine_sim_routing": True}),
        ("learned_routing_tokens", {"router": "mean_query", "learned_routing_tokens": False}),
        ("normalize", {"router": "random", "normalize": False}),
        ("normalize", {"cosine_sim_routing": True, "normalize": False}),
        ("log_gradient", {"straight_through": False, "log_gradient": True}),
        ("straight_through", {"straight_through": None}),
        ("straight_through", {"straight_through": "no"}),
        ("dim", {"dim": 0}),
        ("dim", {"dim": 4.0}),
    ],
)
def test_constructor_errors_name_the_argument(name, kwargs):
    with pytest.raises((ValueError, TypeError), match=rf"^(\w+, )*{name}\b.*:"):
        CoordinateDescentRouter(**{"dim": DIM, **kwargs})


EXTERNAL = {"learned_routing_tokens": False}


@pytest.mark.parametrize(
    "name, init, call",
    [
        *[
            ("num_tokens", {}, {"num_tokens": bad})
            for bad in (0, -1, math.nan, 1.5, 0.0, True, "4", None)
        ],
        ("x", {}, {"x": torch.randn(2, 40, DIM + 1)}),
        ("x", {}, {"x": torch.randn(40, DIM)}),
        ("x", {}, {"x": torch.ones(2, 40, DIM, dtype=torch.long)}),
        ("x", {}, {"x": [1.0]}),
        ("mask", {}, {"mask": torch.ones(2, 39, dtype=torch.bool)}),
        ("mask", {}, {"mask": torch.ones(2, 40)}),
        ("grid_size", {"cell_size": 4}, {}),
        ("grid_size", {}, {"grid_size": (5, 9)}),
        ("grid_size", {"router": "grid"}, {"grid_size": (5, 9)}),
        ("routing_tokens", EXTERNAL, {}),
        ("routing_tokens", {}, {"routing_tokens": torch.randn(2, DIM)}),
        ("routing_tokens", {"router": "random"}, {"routing_tokens": torch.randn(2, DIM)}),
        ("routing_tokens", EXTERNAL, {"routing_tokens": torch.randn(3, DIM)}),
        ("routing_tokens", EXTERNAL, {"routing_tokens": torch.randn(2, 2, DIM)}),
        ("query", {"router": "mean_query"}, {"query": torch.randn(2, 4, 40, 8)}),
        ("key", {"router": "mean_query"}, {"key": torch.randn(2, 4, 40, 8)}),
        ("query", {}, {"query": torch.randn(2, 4, 40, 8), "key": torch.randn(2, 4, 40, 8)}),
        (
            "query",
            {"router": "mean_query", "num_routing_tokens": 3},
            {"query": torch.randn(2, 4, 40, 8), "key": torch.randn(2, 4, 40, 8)},
        ),
        ("generator", {}, {"generator": torch.Generator()}),
    ],
)
def test_call_errors_name_the_argument(name, init, call):
    module = router(dtype=torch.float32, **init)
    with pytest.raises((ValueError, TypeError), match=rf"^(\w+, )*{name}\b.*:"):
        module(**{"x": torch.randn(2, 40, DIM), "num_tokens": 4, **call})
