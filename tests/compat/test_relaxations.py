"""Cumulative softmax and Gumbel-Sinkhorn: what they are, their limits, and a router that trains
with each."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import gradcheck

from colt5_vision.compat import CoordinateDescentRouter, cumulative_softmax, gumbel_sinkhorn
from colt5_vision.ops import soft_topk
from tests.support.marks import further

BOTH = pytest.mark.parametrize("function", [cumulative_softmax, gumbel_sinkhorn])


def randn(*shape, seed=0, std=1.0, dtype=torch.float64):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0.3, 1, 7, 12.5, 39, 39.999])
def test_gates_sum_to_k(function, k, dtype):
    scores = randn(3, 40, dtype=dtype)
    gates = function(scores, k)
    assert (
        gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        and gates.shape == scores.shape
    )
    assert ((gates >= 0) & (gates <= 1)).all()
    want = torch.full((3,), float(k), dtype=gates.dtype)
    torch.testing.assert_close(gates.sum(-1), want, rtol=1e-5, atol=1e-5)
    ordered = gates.gather(-1, scores.argsort(-1))
    assert (ordered.diff(dim=-1) >= 0).all()


@BOTH
def test_a_k_per_row(function):
    scores, k = randn(2, 3, 30), torch.tensor([[0.5, 3.0, 7.25], [20.0, 29.9, 60.0]])
    gates = function(scores, k)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(gates[i, j], function(scores[i, j], k[i, j].item()))
    assert function(scores[:0], k[:0]).shape == (0, 3, 30)


@BOTH
@pytest.mark.parametrize("k", [10, 11.5, 10**6])
@pytest.mark.parametrize("masked", [False, True])
def test_all_that_is_valid_gives_ones(function, k, masked):
    scores, mask = randn(2, 12 if masked else 10).requires_grad_(), None
    if masked:
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[:, 3:5] = False
    gates = function(scores, k, mask=mask)
    assert torch.equal(gates, torch.ones_like(gates) if mask is None else mask.double())
    gates.sum().backward()
    assert (scores.grad == 0).all()


@BOTH
@pytest.mark.parametrize("under", [0.0, 99.0, math.inf, math.nan])
def test_a_mask_equals_the_compacted_row(function, under):
    scores, mask = randn(4, 30), randn(4, 30, seed=1) > 0
    mask[1], mask[2] = torch.arange(30) == 3, False
    k, weight = torch.tensor([5.0, 0.4, 2.0, 60.0]), randn(4, 30, seed=2)
    dirty = torch.where(mask, scores, under).requires_grad_()
    gates = function(dirty, k, mask=mask, eps=0.5)
    (grad,) = torch.autograd.grad((gates * weight).sum(), dirty)
    assert (gates[~mask] == 0).all() and (grad[~mask] == 0).all() and grad.isfinite().all()
    for i in (0, 1, 3):
        row = scores[i, mask[i]].requires_grad_()
        own = function(row, k[i].item(), eps=0.5)
        torch.testing.assert_close(gates[i, mask[i]], own)
        torch.testing.assert_close(
            grad[i, mask[i]], torch.autograd.grad((own * weight[i, mask[i]]).sum(), row)[0]
        )


@BOTH
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_of_ones_and_of_nothing_hide_no_nan(function):
    scores, mask = randn(3, 12).requires_grad_(), torch.ones(3, 12, dtype=torch.bool)
    mask[0], mask[1, 5:] = False, False
    with torch.autograd.detect_anomaly():
        function(scores, torch.tensor([2.0, 9.0, 12.0]), eps=0.5, mask=mask).sum().backward()
    assert (scores.grad == 0).all()


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(function, masked):
    scores, k = (
        randn(3, 6, std=2).requires_grad_(),
        torch.tensor([0.7, 2.0, 3.5]).double().requires_grad_(),
    )
    mask = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask[0, :3] = mask[1, 5:] = mask[2, 1] = False
    assert gradcheck(lambda scores, k: function(scores, k, eps=0.7, mask=mask), (scores, k))


@BOTH
@pytest.mark.parametrize("std", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_whatever_the_scores(function, std, dtype):
    scores = randn(2, 50, std=std, dtype=dtype).requires_grad_()
    gates = function(scores, 9, eps=0.1)
    (grad,) = torch.autograd.grad((gates * randn(2, 50, seed=1)).sum(), scores)
    assert gates.isfinite().all() and grad.isfinite().all()
    if function is cumulative_softmax:  # Sinkhorn's iterations do not converge on hard gates
        torch.testing.assert_close(gates.sum(-1), torch.full((2,), 9, dtype=dtype))


@BOTH
def test_a_shift_of_the_scores_changes_nothing_and_eps_is_their_unit(function):
    scores = randn(2, 30)
    gates = function(scores, 4)
    torch.testing.assert_close(function(scores + 5, 4), gates)
    torch.testing.assert_close(function(scores * 3, 4, eps=3.0), gates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(scores, 4), gates)


def iterated_softmax(scores, k, steps):
    """k softmaxes, or more of smaller mass, each over what the ones before it left."""
    gates = torch.zeros_like(scores)
    for _ in range(steps):
        gates = gates + k / steps * (scores + torch.log1p(-gates)).softmax(-1)
    return gates


def test_cumulative_softmax_is_what_softmaxes_taken_again_and_again_sum_to():
    scores = randn(2, 20)
    want = cumulative_softmax(scores, 5)
    errors = [
        (iterated_softmax(scores, 5, steps) - want).abs().max().item() for steps in (50, 500, 5000)
    ]
    assert errors[0] < 0.02 and errors[1] < errors[0] / 8 and errors[2] < errors[1] / 8
    assert (iterated_softmax(torch.tensor([0.4, 0.0, -20.0]), 2, 2) > 1).any(), (
        "steps of mass 1 do not overshoot"
    )
    torch.testing.assert_close(
        cumulative_softmax(scores, 1e-6) / 1e-6, scores.softmax(-1), rtol=1e-4, atol=1e-6
    )


def test_gumbel_sinkhorn_is_sinkhorn_on_two_columns():
    scores, k, n, eps = randn(2, 20), 5, 20, 0.7
    plan = torch.stack([scores / eps, torch.zeros_like(scores)], -1).exp()
    mass = torch.tensor([k, n - k]).double()
    for iterations in (1, 2, 10):
        current = plan
        for _ in range(iterations):
            current = current * (mass / current.sum(1)).unsqueeze(1)
            current = current / current.sum(2, keepdim=True)
        torch.testing.assert_close(
            gumbel_sinkhorn(scores, k, n_iters=iterations, eps=eps), current[..., 0]
        )


def test_noise_comes_from_a_generator_only():
    scores = randn(2, 4000).mul(0).requires_grad_()
    assert torch.equal(gumbel_sinkhorn(scores, 400), gumbel_sinkhorn(scores, 400))

    def draw(seed, eps=1.0):
        return gumbel_sinkhorn(scores, 400, eps=eps, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.testing.assert_close(draw(1).sum(-1), torch.full((2,), 400.0).double())
    # logit of a gate is a constant plus the noise over eps: logistic, of deviation pi / sqrt(3)
    for eps in (1.0, 2.0):
        assert abs(draw(1, eps).logit().std() * eps - math.pi / math.sqrt(3)) < 0.06
    assert torch.autograd.grad(draw(1).square().sum(), scores)[0].isfinite().all()


@BOTH
def test_at_one_eps_its_gates_are_softer_than_the_exact_ones(function):
    """The reason in the docstrings: the best k hold less of k."""
    scores = randn(8, 200)
    for eps in (0.1, 0.3, 1.0):
        held = [
            f(scores, 20, eps=eps).gather(-1, scores.topk(20).indices).sum(-1)
            for f in (function, soft_topk)
        ]
        assert (held[0] < held[1]).all()
        if function is gumbel_sinkhorn and eps == 0.1:
            assert (function(scores, 20, eps=eps, n_iters=5).sum(-1) - 20).abs().min() > 1, (
                "few iterations converge"
            )


@pytest.mark.parametrize("function", [cumulative_softmax, *further(gumbel_sinkhorn)])
def test_compile(function):
    torch.compiler.reset()
    fast = torch.compile(
        lambda s, k, m: function(s, k, mask=m), fullgraph=True, backend="aot_eager"
    )
    scores, k, mask = (
        randn(3, 20).requires_grad_(),
        torch.tensor([2.0, 5.0, 30.0]),
        randn(3, 20, seed=1) > -1,
    )
    got, want = fast(scores, k, mask), function(scores, k, mask=mask)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        *(torch.autograd.grad(g.square().sum(), scores)[0] for g in (got, want))
    )


METHODS = {
    "coordinate_descent": soft_topk,
    "cumulative_softmax": cumulative_softmax,
    "gumbel_sinkhorn": gumbel_sinkhorn,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("straight_through", [True, False])
def test_a_router_has_these_gates_and_selects_as_ever(method, straight_through):
    torch.manual_seed(0)
    module = CoordinateDescentRouter(
        16, straight_through, method=method, num_routing_tokens=2, eps=0.5
    ).double()
    x = randn(3, 40, 16).requires_grad_()
    routing, logits = module(x, num_tokens=8), module.logits(x)
    assert torch.equal(routing.indices, logits.topk(8).indices)
    soft = METHODS[method](logits, 9.0, eps=0.5).gather(-1, routing.indices)
    torch.testing.assert_close(routing.gates, torch.ones_like(soft) if straight_through else soft)
    weight = randn(3, 2, 8, seed=1)
    for a, b in zip(
        *(
            torch.autograd.grad((g * weight).sum(), (x, module.routing_token))
            for g in (routing.gates, soft)
        )
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell_size", [None, 4])
def test_a_router_learns_which_tokens_matter(method, cell_size):
    """Few tokens carry the answer; which ones is told by a direction of their features."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)

    def batch():
        x = torch.randn(16, 64, 16, generator=generator)
        return x, x @ direction

    module = CoordinateDescentRouter(16, method=method, cell_size=cell_size)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

    def mean(x, worth):
        routing = module(x, num_tokens=8, grid_size=(8, 8))
        return (worth.unsqueeze(1).gather(-1, routing.indices) * routing.gates).mean()

    before = mean(*batch()).item()
    for _ in range(60):
        loss = -mean(*batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = 1.65 if cell_size is None else 1.5  # of the best 8 of 64, or 2 of each 16
    assert before < 0.6 * best < 0.8 * best < mean(*batch())


def test_noise_of_a_router():
    torch.manual_seed(0)
    module, x = (
        CoordinateDescentRouter(16, False, method="gumbel_sinkhorn", n_iters=30),
        randn(3, 40, 16).float(),
    )
    plain = module(x, num_tokens=6)
    first, again, other = (
        module(x, num_tokens=6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first.gates, again.gates) and not torch.equal(first.gates, other.gates)
    assert not torch.equal(first.gates, plain.gates) and torch.equal(first.indices, plain.indices)
    given = module(
        x, num_tokens=6, logits=module.logits(x), generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(given.gates, first.gates)


def test_noise_of_one_call_is_of_that_call():
    """The generator is no state of the module, which threads share."""
    torch.manual_seed(0)
    module = CoordinateDescentRouter(16, False, method="gumbel_sinkhorn")
    x, state = randn(3, 400, 16).float(), dict(vars(module))

    def gates(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return module(x, num_tokens=6, generator=generator).gates

    seeds = [None, 1, 2, 3] * 8
    want = {seed: gates(seed) for seed in set(seeds)}
    assert vars(module) == state
    with ThreadPoolExecutor(4) as pool:
        for seed, got in zip(seeds, pool.map(gates, seeds)):
            assert torch.equal(got, want[seed])
    with pytest.raises(ValueError, match="^x: "):
        module(x[..., 1:], num_tokens=6, generator=torch.Generator())
    assert torch.equal(gates(None), want[None])


@pytest.mark.parametrize(
    "method", ["cumulative_softmax", *further("coordinate_descent", "gumbel_sinkhorn")]
)
def test_compile_of_a_router(method):
    torch.manual_seed(0)
    module = CoordinateDescentRouter(16, False, method=method, cell_size=(1, 10))
    torch.compiler.reset()
    fast = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    x = randn(3, 43, 16).float()
    for a, b in zip(fast(x, num_tokens=8), module(x, num_tokens=8)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_count_of_each_sample(method, masked, straight_through):
    torch.manual_seed(0)
    options = {"num_routing_tokens": 2, "fetch_k_ratio": 1.1, "method": method}
    module = CoordinateDescentRouter(16, straight_through, **options).double()
    x, counts, mask = randn(4, 42, 16).requires_grad_(), [3, 9, 1, 30], None
    if masked:
        mask = randn(4, 42, seed=1) > -0.5
        mask[1] = torch.arange(42) < 4  # fewer than its count
    routing = module(x, num_tokens=12, counts=torch.tensor(counts), mask=mask)

    left = [42] * 4 if mask is None else mask.sum(1).tolist()
    assert routing.mask.sum(-1).tolist() == [[min(c, v, 12)] * 2 for c, v in zip(counts, left)]
    empty = ~routing.mask
    assert (routing.gates[empty] == 0).all() and (routing.log_weights[empty] == -math.inf).all()
    for i, count in enumerate(counts):
        own = None if mask is None else mask[i : i + 1]
        one = module(x[i : i + 1], num_tokens=min(count, 12), mask=own)
        filled = routing.mask[i, 0].sum()
        for field, want in zip(routing, one):
            torch.testing.assert_close(field[i, :, :filled], want[0, :, :filled])
    weight = torch.rand(4, 2, 12, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routing.gates * weight).sum(), x)
    assert grad.isfinite().all() and grad[0].abs().max() > 0


def test_noise_does_not_follow_the_default_dtype():
    def draw():
        generator = torch.Generator().manual_seed(1)
        return gumbel_sinkhorn(randn(2, 9), 3, generator=generator)

    want = draw()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name, how",
    [
        ("method", {"method": "best"}),
        ("method", {"method": "gumbel_sinkhorn", "router": "random"}),
        ("method", {"method": "cumulative_softmax", "router": "grid"}),
        ("eps_init", {"method": "gumbel_sinkhorn", "n_iters": 5, "eps_init": 4.0}),
        ("eps_decay", {"method": "cumulative_softmax", "eps_decay": 0.7}),
        ("n_iters", {"method": "cumulative_softmax", "n_iters": 5}),
        ("n_iters", {"method": "gumbel_sinkhorn", "n_iters": 0}),
    ],
)
def test_router_errors_name_the_argument(name, how):
    with pytest.raises(ValueError, match=rf"^(\w+, )*{name}\b.*:.*"):
        CoordinateDescentRouter(16, **how)


def test_a_generator_without_a_use_is_refused():
    with pytest.raises(ValueError, match="^generator: "):
        CoordinateDescentRouter(16, method="cumulative_softmax")(
            torch.randn(1, 9, 16), num_tokens=2, generator=torch.Generator()
        )


@BOTH
@pytest.mark.parametrize(
    "name, error, how",
    [
        ("scores", TypeError, {"scores": [1.0]}),
        ("scores", ValueError, {"scores": torch.ones(2, 0)}),
        ("k", ValueError, {"k": 0}),
        ("k", TypeError, {"k": True}),
        ("k", ValueError, {"k": torch.tensor([1.0, 0.0])}),
        ("k", ValueError, {"k": torch.ones(3)}),
        ("eps", ValueError, {"eps": 0.0}),
        ("eps", TypeError, {"eps": "1"}),
        ("mask", TypeError, {"mask": torch.ones(2, 9)}),
        ("mask", ValueError, {"mask": torch.ones(2, 8, dtype=torch.bool)}),
    ],
)
def test_errors_name_the_argument(function, name, error, how):
    with pytest.raises(error, match=rf"^{name}: .*got"):
        function(**{"scores": randn(2, 9), "k": 2, **how})


def test_errors_of_gumbel_sinkhorn():
    for error, name, how in [
        (ValueError, "n_iters", {"n_iters": 0}),
        (TypeError, "n_iters", {"n_iters": 2.5}),
        (TypeError, "generator", {"generator": 3}),
    ]:
        with pytest.raises(error, match=rf"^{name}: .*got"):
            gumbel_sinkhorn(randn(2, 9), 2, **how)
