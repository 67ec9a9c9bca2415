"""Soft top-k kernels against the float64 reference, with the float32 eager error as budget."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from colt5_vision.ops import backend, coordinate_descent, soft_topk
from colt5_vision.ops.soft_topk import triton, triton_descent

OPS = torch.ops.colt5_vision
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def way(request, monkeypatch):
    """How rows from 33 entries on are spread over several programs: ``"searched"``, up to five of
    them, ``"sorted"``, chunks of 64 in groups of 8, or "" for not at all."""
    if request.param:
        monkeypatch.setattr(triton, "WHOLE_ROW", 32)
        monkeypatch.setattr(triton, "CHUNK", 32)
        monkeypatch.setattr(triton, "MOST_PROGRAMS", 5)
        monkeypatch.setattr(triton, "SORTED_ROW", 0 if request.param == "searched" else 4096)
        monkeypatch.setattr(triton, "SORTED_CHUNK", 64)
        monkeypatch.setattr(triton, "SORTED_GROUP", 8)
    return request.param


searched = pytest.mark.parametrize("way", ["searched"], indirect=True)
spread = pytest.mark.parametrize("way", ["searched", "sorted"], indirect=True)
spread_operators = pytest.mark.parametrize(
    ("function", "way"),
    [
        (soft_topk, "searched"),
        (soft_topk, "sorted"),
        (coordinate_descent, "searched"),
    ],
    indirect=["way"],
)


def with_gradients(function, scores, k, grad, wide=False, **options):
    """Gates, and the gradients of the scores and of k."""
    dtype = torch.float64 if wide else torch.float32
    scores = scores.detach().clone().to(dtype).requires_grad_()
    k = (
        torch.as_tensor(k, dtype=dtype, device=scores.device)
        .expand(scores.shape[:-1])
        .clone()
        .requires_grad_()
    )
    gates = function(scores, k, **options)
    return gates.detach(), *torch.autograd.grad(gates, (scores, k), grad.to(dtype))


def compare(function, scores, k, grad, eps, floor=2e-6, **options):
    """Kernel errors are at most twice those of eager float32, and a floor in units of what enters
    the gradient."""
    options["eps"] = eps
    found = with_gradients(function, scores, k, grad, **options)
    eager = with_gradients(function, scores, k, grad, backend="eager", **options)
    exact = with_gradients(function, scores, k, grad, backend="eager", wide=True, **options)
    size = grad.abs().max().item()
    for name, f, e, x, unit in zip(
        ("gates", "scores", "k"), found, eager, exact, (1, size / eps, size), strict=True
    ):
        budget = 2 * (e - x).abs().max() + floor * unit
        error = (f.double() - x).abs().max()
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"
    return found[0]


def assert_sums(gates, k):
    total = gates.double().sum(-1)
    torch.testing.assert_close(
        total, torch.as_tensor(k, dtype=torch.float64).expand_as(total).to(total), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("eps", [0.003, 0.03, 0.1, 1.0])
@pytest.mark.parametrize(
    ("n", "way"),
    [
        (1, ""),
        (63, ""),
        (577, ""),
        (2500, ""),
        (111, "searched"),
        (577, "searched"),
        (111, "sorted"),
        (300, "sorted"),
    ],
    indirect=["way"],
)
def test_lengths(randn, launches, n, way, eps):
    scores, k = randn(2, n), [max(n / 8, 0.5), 0.7 * n]
    assert_sums(compare(soft_topk, scores, k, randn(2, n, seed=1), eps=eps), k)
    assert launches[0] == ("sort_kernel" if way == "sorted" else "search_kernel")
    assert launches.count("search_kernel") == {"": 1, "searched": 8, "sorted": 0}[way]


GRADIENT = ["gradient_sums_kernel", "gradient_kernel"]
SORTED = ["sort_kernel", "splitter_kernel", "sorted_gates_kernel"]
SEARCHED = ["search_kernel"] * 8 + ["gates_kernel"]


@pytest.mark.parametrize(("n", "names"), [(3001, SORTED), (20_011, SEARCHED)])
def test_a_long_row(randn, launches, monkeypatch, n, names):
    monkeypatch.setattr(triton, "WHOLE_ROW", 2048)
    monkeypatch.setattr(triton, "SORTED_ROW", 3001)
    gates = compare(soft_topk, randn(1, n), n / 8, randn(1, n, seed=1), eps=0.03)
    assert_sums(gates, n / 8)
    assert launches == names + GRADIENT


@pytest.mark.usefixtures("own_sort")
def test_a_row_sorted_by_triton(randn, monkeypatch):
    for name, size in {"WHOLE_ROW": 8, "SORTED_CHUNK": 16, "SORTED_GROUP": 4}.items():
        monkeypatch.setattr(triton, name, size)
    assert_sums(compare(soft_topk, randn(1, 40), 5.0, randn(1, 40, seed=1), eps=0.1), 5.0)


def test_any_length_takes_a_bounded_number_of_programs():
    for n in (1, 577, 16_384, 16_385, 65_536, 1_000_000, 100_000_000):
        programs, chunk = triton.split(n)
        assert (programs - 1) * chunk < n <= programs * chunk and programs <= 256


def test_a_short_row_takes_few_launches(randn, launches):
    soft_topk(randn(3, 577), 40)
    assert launches == ["search_kernel", "gates_kernel"]
    launches.clear()
    coordinate_descent(randn(3, 577), 40, n_iters=50)
    assert launches == ["descend_kernel", "descent_gates_kernel"]


def outlier(s):
    s[:, 7] = 1e6
    return s


SHAPED = {
    "ties": lambda s: s.mul(2).round() / 2,
    "equal": lambda s: torch.full_like(s, 3.3),
    "outlier": outlier,
    "far cluster": lambda s: s * 1e-3 + 100,
    "two clusters": lambda s: torch.where(s > 1, s * 1e-4 + 50, s * 1e-4 - 50),
    "wide": lambda s: s * 30,
    "zeros of both signs": lambda s: torch.where(s > 0, 0.0, -0.0),
}


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.parametrize(
    ("k", "eps", "way"),
    [
        (0.25, 0.1, ""),
        (72.5, 1.0, ""),
        (110.9, 0.03, ""),
        (72, 0.003, "searched"),
        (0.25, 0.1, "sorted"),
        (72, 0.003, "sorted"),
        (110.9, 0.03, "sorted"),
    ],
    indirect=["way"],
)
@pytest.mark.usefixtures("way")
def test_awkward_scores(randn, name, k, eps):
    scores = SHAPED[name](randn(2, 111, seed=3))
    assert_sums(compare(soft_topk, scores, k, randn(2, 111, seed=1), eps=eps), k)


@spread_operators
@pytest.mark.usefixtures("way")
def test_masks_and_k_per_row(randn, function):
    scores, mask = randn(3, 70), randn(3, 70, seed=2) > -0.3
    k, grad = [0.5, 7, 20.25], randn(3, 70, seed=1)
    options = {"eps": 0.2, "mask": mask} | ({} if function is soft_topk else {"n_iters": 8})
    gates = compare(function, scores, k, grad, floor=1e-5, **options)
    assert (gates[~mask] == 0).all()
    found = with_gradients(function, scores, k, grad, **options)
    assert (found[1][~mask] == 0).all()
    if function is soft_topk:
        assert_sums(gates, k)
    for row in range(3):
        alone = with_gradients(
            function, scores[row], k[row], grad[row], **options | {"mask": mask[row]}
        )
        for one, all_rows in zip(alone, found, strict=True):
            assert torch.equal(one, all_rows[row])


@spread
@pytest.mark.usefixtures("way")
def test_k_of_at_least_the_valid_entries_gives_ones(randn):
    scores, mask = randn(3, 60), torch.arange(60, device=randn(1).device).expand(3, 60) < 40
    gates, grad, _ = with_gradients(
        soft_topk, scores, [40.0, 41, INF], randn(3, 60, seed=1), mask=mask
    )
    assert torch.equal(gates, mask.float()) and (grad == 0).all()


@spread_operators
@pytest.mark.usefixtures("way")
def test_a_wholly_masked_row(randn, function):
    options = {} if function is soft_topk else {"n_iters": 5}
    scores, mask = randn(3, 50), torch.ones(3, 50, dtype=torch.bool, device=randn(1).device)
    mask[1] = False
    gates, grad, grad_k = with_gradients(
        function, scores, 4.0, randn(3, 50, seed=1), eps=0.5, mask=mask, **options
    )
    assert (gates[1] == 0).all() and (grad[1] == 0).all() and (grad[0] != 0).any()
    assert grad.isfinite().all() and grad_k.isfinite().all()


@spread_operators
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.usefixtures("way")
def test_a_bad_row_leaves_the_others_unharmed(randn, function, bad):
    options = {} if function is soft_topk else {"n_iters": 5}
    scores, grad = randn(3, 50), randn(3, 50, seed=1)
    expected = with_gradients(function, scores, 4.0, grad, eps=0.1, **options)
    scores[1, 5] = bad
    found = with_gradients(function, scores, 4.0, grad, eps=0.1, **options)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[[0, 2]], e[[0, 2]])
    if math.isnan(bad):
        spoilt = found[0][1].isnan()  # not passed over in silence
        assert spoilt.all() if function is soft_topk else spoilt.any()


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
def test_dtypes_layouts_and_a_batch_of_0(randn, function):
    scores, mask = randn(40, 3).T, randn(40, 3, seed=1).T > -1
    expected = function(scores.contiguous(), 5, mask=mask.contiguous())
    found = function(scores, 5, mask=mask)
    assert torch.equal(found, expected)
    half = scores.bfloat16()
    assert torch.equal(function(half, 5), function(half.float(), 5))
    assert function(scores[:0], 5).shape == (0, 40)
    assert function(scores.reshape(1, 3, 40), 5).shape == (1, 3, 40)


@spread_operators
@pytest.mark.usefixtures("way")
def test_two_runs_are_equal(randn, function):
    options = {} if function is soft_topk else {"n_iters": 8}
    first, second = (
        with_gradients(function, randn(2, 150), 30.0, randn(2, 150, seed=1), **options)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


SCHEDULES = [
    {"n_iters": 1, "eps": 0.5},
    {"n_iters": 2, "eps": 0.5},
    {"n_iters": 50, "eps": 1.0},
    {"n_iters": 35, "eps": 0.1},
    {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [63, 2500])
def test_coordinate_descent(randn, schedule, n):
    # iterates carry float32's rounding through all iterations, in eager and here
    compare(
        coordinate_descent,
        randn(2, n),
        [n / 8, 0.4 * n],
        randn(2, n, seed=1),
        floor=1e-5,
        **schedule,
    )


# a launch an iteration: 50 of them would be slow in the interpreter, and no other than 20
@pytest.mark.parametrize("schedule", [how for how in SCHEDULES if how["n_iters"] <= 20])
@searched
@pytest.mark.usefixtures("way")
def test_coordinate_descent_by_several_programs(randn, schedule):
    compare(
        coordinate_descent,
        randn(2, 111),
        [111 / 8, 44.4],
        randn(2, 111, seed=1),
        floor=1e-5,
        **schedule,
    )


def test_coordinate_descent_of_a_long_row(randn, launches):
    compare(
        coordinate_descent,
        randn(1, 20_011),
        2501.0,
        randn(1, 20_011, seed=1),
        floor=1e-5,
        n_iters=4,
        eps=0.3,
    )
    assert launches[:4] == ["descend_kernel"] * 3 + ["descent_gates_kernel"] and len(launches) == 7


def test_scores_that_equal_a_bound(randn):
    # k = n: the first iterate is 0, and a score of 0 is not above it
    compare(
        coordinate_descent,
        randn(2, 40).round(),
        40.0,
        randn(2, 40, seed=1),
        eps=0.5,
        floor=1e-5,
        n_iters=3,
    )


def test_iterates_equal_the_reference(randn, device):
    scores, schedule = randn(2, 111), [2.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    k, num_valid = (
        torch.tensor([[9.0], [30.5]], device=device),
        torch.full((2, 1), 111, device=device),
    )
    found = triton_descent.forward(scores, k, num_valid, schedule)
    expected = OPS.coordinate_descent(scores.double(), k.double(), num_valid, schedule, "eager")
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-6)


def test_opcheck(randn, device):
    scores, k = (
        randn(3, 10).requires_grad_(),
        torch.tensor([[1.0], [2.5], [12.0]], device=device, requires_grad=True),
    )
    num_valid = torch.tensor([[10], [8], [10]], device=device)
    torch.library.opcheck(OPS.soft_topk.default, (scores, k, num_valid, 0.5, 10, "triton"))
    torch.library.opcheck(
        OPS.soft_topk_backward.default, (scores.detach(), scores.detach().sigmoid(), 0.5, "triton")
    )
    torch.library.opcheck(
        OPS.coordinate_descent.default, (scores, k, num_valid, [4.0, 2.0, 1.0, 1.0], "triton")
    )
    transposed = scores.detach().T.contiguous().T.requires_grad_()
    torch.library.opcheck(OPS.soft_topk.default, (transposed, k, num_valid, 0.5, 10, "triton"))


def three_iterations(scores, k, **options):
    return coordinate_descent(scores, k, n_iters=3, **options)


@pytest.mark.parametrize("function", [soft_topk, three_iterations])
def test_compile_without_recompilation(randn, launches, function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, m: function(s, 9, eps=0.5, mask=m).square(),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    counts = []
    for n in (40, 111):
        scores, mask = randn(2, n).requires_grad_(), randn(2, n, seed=1) > -1
        expected = function(scores, 9, eps=0.5, mask=mask).square()
        eager = torch.autograd.grad(expected.sum(), scores)[0]
        launches.clear()
        found = compiled(scores, mask)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), scores)[0], eager)
        assert "gradient_kernel" in launches or "descent_gradient_kernel" in launches
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_twice_differentiable(randn):
    scores, grad = randn(2, 20), randn(2, 20, seed=1)

    def second(scores, **options):
        scores = scores.clone().requires_grad_()
        first = torch.autograd.grad(
            soft_topk(scores, 3, eps=0.5, **options), scores, grad.to(scores), create_graph=True
        )
        return torch.autograd.grad(first[0].square().sum(), scores)[0]

    expected = second(scores.double(), backend="eager")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(second(scores).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
def test_choice_of_backend(randn, launches, monkeypatch, function):
    scores = randn(2, 9)
    function(scores, 2, backend="eager")
    assert not launches
    with pytest.raises(RuntimeError, match=f"{function.__name__}.*float64"):
        function(scores.double(), 2)
    with pytest.raises(ValueError, match="^backend:"):
        function(scores, 2, backend="cuda")
    monkeypatch.delenv(backend.VARIABLE)
    function(scores.double(), 2)
    assert not launches
    function(scores, 2, backend="triton")
    assert launches


def test_more_iterations_than_the_kernels_take(randn, monkeypatch):
    from colt5_vision.ops.soft_topk import api

    monkeypatch.setattr(api, "MOST_ITERATIONS", 4)
    with pytest.raises(RuntimeError, match="at most 4 iterations, got 5"):
        coordinate_descent(randn(2, 9), 2, n_iters=5)
