"""soft_topk against its definition, coordinate_descent against the predecessor."""

import math

import pytest
import torch
from colt5_attention.coor_descent import coor_descent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from colt5_vision.ops import coordinate_descent, soft_topk
from colt5_vision.ops.soft_topk import eps_schedule, reference

OPS = torch.ops.colt5_vision


def randn(*shape, seed=0, std=1.0, dtype=torch.float32):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(std)
        .to(dtype)
    )


def saved_bytes(function, *args, **kwargs):
    """Bytes of each distinct storage that the graph of one call keeps for backward."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*args, **kwargs)
    assert out.requires_grad and storages
    return list(storages.values())


@st.composite
def problems(draw, largest=3000):
    """(scores (rows, n) float32, k, eps), some with many ties."""
    n = draw(st.integers(1, largest))
    k = max(0.0625, round(draw(st.floats(0, 1)) * n * 16) / 16)  # exact in float32
    eps = math.exp(draw(st.floats(math.log(0.003), math.log(4))))
    std = math.exp(draw(st.floats(math.log(1e-3), math.log(30))))
    scores = randn(draw(st.integers(1, 3)), n, seed=draw(st.integers(0, 1 << 16)), std=std)
    return (scores * 2).round() / 2 if draw(st.booleans()) else scores, k, eps


def assert_sums(gates, k):
    total = gates.double().sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, k), rtol=1e-5, atol=0)


@settings(max_examples=200)
@given(problems())
def test_gates_are_the_projection(problem):
    scores, k, eps = problem
    gates = soft_topk(scores, k, eps=eps)
    assert gates.dtype == torch.float32 and gates.shape == scores.shape
    assert gates.min() >= 0 and gates.max() <= 1
    assert_sums(gates, k)
    assert (
        gates.gather(-1, scores.argsort(-1)).diff(dim=-1).ge(-1e-6).all()
    )  # monotone in the scores
    expected = reference.soft_topk(scores, k, eps)
    torch.testing.assert_close(gates.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_topk(scores.double(), k, eps=eps), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01])
def test_gates_are_normal_numbers_or_0(eps, dtype):
    """What lies below them costs a CPU ten times the time, here and in all that follows."""
    scores = 8 * torch.randn(2, 4096, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for gates in (
        soft_topk(scores, 64, eps=eps),
        coordinate_descent(scores, 64, eps=eps, n_iters=20),
    ):
        assert ((gates == 0) | (gates >= torch.finfo(dtype).tiny)).all()
        assert eps > 0.01 or (gates == 0).any()


@pytest.mark.parametrize("eps", [0.003, 1.0])
def test_a_million_tokens(eps):
    assert_sums(soft_topk(randn(1, 1_000_000), 12_345, eps=eps), 12_345)


@given(problems(500), st.floats(-100, 100), st.floats(0.1, 10), st.randoms(use_true_random=False))
def test_symmetries(problem, shift, factor, random):
    scores, k, eps = problem[0].double(), *problem[1:]
    order = torch.tensor(random.sample(range(scores.shape[-1]), scores.shape[-1]))
    gates = soft_topk(scores, k, eps=eps)
    for other in (
        soft_topk(scores[:, order], k, eps=eps)[:, order.argsort()],
        soft_topk(scores + shift, k, eps=eps),
        soft_topk(scores * factor, k, eps=eps * factor),
    ):
        torch.testing.assert_close(other, gates, rtol=0, atol=1e-9)


def test_a_k_per_row_equals_row_by_row():
    scores, k = (
        randn(2, 3, 50, dtype=torch.float64),
        torch.tensor([[0.5, 3.0, 7.25], [20.0, 49.9, 60.0]]).double(),
    )
    gates = soft_topk(scores, k, eps=0.3)
    assert gates.shape == scores.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(
                gates[i, j], soft_topk(scores[i, j], k[i, j].item(), eps=0.3)
            )
    torch.testing.assert_close(soft_topk(scores, torch.tensor(4)), soft_topk(scores, 4))


@pytest.mark.parametrize("k", [1, 2.5, 10, 17.9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_mask_equals_the_compacted_row(k, as_tensor):
    scores = randn(4, 40, dtype=torch.float64).requires_grad_()
    mask = randn(4, 40, seed=1) > -0.2
    assert all(18 <= m.sum() < 40 for m in mask)
    gates = soft_topk(
        scores, torch.full((4,), k, dtype=torch.float64) if as_tensor else k, eps=0.1, mask=mask
    )
    grad = randn(4, 40, seed=2, dtype=torch.float64)
    (found,) = torch.autograd.grad(gates, scores, grad)
    assert (gates[~mask] == 0).all() and (found[~mask] == 0).all()
    for i in range(4):
        row = scores[i, mask[i]].detach().requires_grad_()
        expected = soft_topk(row, k, eps=0.1)
        torch.testing.assert_close(gates[i, mask[i]], expected)
        torch.testing.assert_close(
            found[i, mask[i]], torch.autograd.grad(expected, row, grad[i, mask[i]])[0]
        )


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
def test_what_lies_under_a_mask_does_not_matter(function):
    scores, mask = randn(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[:, 3:5] = False
    gates = function(scores, 2, mask=mask)
    scores[:, 3], scores[0, 4], scores[1, 4] = float("nan"), float("inf"), float("-inf")
    assert torch.equal(function(scores, 2, mask=mask), gates)


@pytest.mark.parametrize(
    "function",
    [
        soft_topk,
        pytest.param(coordinate_descent),
    ],
)
def test_a_wholly_masked_row(function):
    scores, mask = randn(3, 8).requires_grad_(), torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    k = torch.full((3,), 2.0, requires_grad=True)
    gates = function(scores, k, eps=0.5, mask=mask)
    assert (gates[1] == 0).all()
    torch.testing.assert_close(gates[[0, 2]], function(scores[[0, 2]], 2.0, eps=0.5))
    (gates * randn(3, 8, seed=1)).sum().backward()
    assert (
        (scores.grad[1] == 0).all() and scores.grad.isfinite().all() and (scores.grad[0] != 0).any()
    )
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("k", [5, 5.5, 100, 1e9, float("inf"), torch.full((2,), 7.0)])
def test_k_of_at_least_the_valid_entries_gives_ones(k):
    scores, mask = randn(2, 8).requires_grad_(), torch.arange(8).expand(2, 8) < 5
    gates = soft_topk(scores, k, mask=mask)
    assert torch.equal(gates, mask.float())
    gates.sum().backward()
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
@pytest.mark.parametrize("k", [2, torch.empty(0, 3)])
def test_a_batch_of_0(function, k):
    scores = torch.empty(0, 3, 7, requires_grad=True)
    gates = function(scores, k, mask=torch.empty(0, 3, 7, dtype=torch.bool))
    gates.sum().backward()
    assert gates.shape == scores.grad.shape == (0, 3, 7)


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_leaves_the_others_unharmed(function, bad):
    scores = randn(3, 20)
    clean, grad = scores.clone().requires_grad_(), randn(3, 20, seed=1)
    expected = function(clean, 4, eps=0.1)
    scores[1, 5] = bad
    scores.requires_grad_()
    gates = function(scores, 4, eps=0.1)
    gates.backward(grad)
    expected.backward(grad)
    rest = [0, 2]
    torch.testing.assert_close(gates[rest], expected[rest])
    torch.testing.assert_close(scores.grad[rest], clean.grad[rest])


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_autocast(function, dtype):
    scores = randn(3, 33, dtype=dtype).requires_grad_()
    wide = (
        scores.detach()
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
        .requires_grad_()
    )
    with torch.autocast("cpu", torch.bfloat16):
        gates = function(scores, 5, eps=0.2)
    expected = function(wide, 5, eps=0.2)
    assert gates.dtype == expected.dtype == wide.dtype
    assert torch.equal(gates, expected)
    grads = [
        torch.autograd.grad(g.square().sum(), s)[0] for g, s in ((gates, scores), (expected, wide))
    ]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(grads[0], grads[1].to(dtype))


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
def test_non_contiguous(function):
    scores, mask = randn(30, 4, dtype=torch.float64).T, randn(30, 4, seed=1).T > -1
    expected = function(scores.contiguous(), 3, mask=mask.contiguous())
    torch.testing.assert_close(function(scores, 3, mask=mask), expected)
    torch.testing.assert_close(
        function(scores[:, ::2], 3), function(scores[:, ::2].contiguous(), 3)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked):
    scores = randn(3, 7, std=2, dtype=torch.float64).requires_grad_()
    k = torch.tensor([0.7, 2.0, 3.5], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[0, :3] = mask[1, 5:] = mask[2, 1] = False

    def function(scores, k):
        return soft_topk(scores, k, eps=0.7, mask=mask)

    gates = function(scores, k)
    assert (gates == 1).any() and ((gates > 0) & (gates < 1)).any()
    assert gradcheck(function, (scores, k))
    assert gradgradcheck(function, (scores, k))
    scalar = k[2].detach().requires_grad_()  # one k for all rows
    assert gradcheck(function, (scores, scalar))


def test_soft_topk_keeps_few_copies_for_backward():
    scores, mask = randn(2, 4096).requires_grad_(), randn(2, 4096, seed=1) > 0
    for kept in (saved_bytes(soft_topk, scores, 64), saved_bytes(soft_topk, scores, 64, mask=mask)):
        assert (
            sum(size >= scores.numel() for size in kept) <= 3
        )  # in bytes, so that a bool mask counts too
        assert sum(kept) <= 3 * scores.untyped_storage().nbytes()


DEFAULTS = {"n_iters": 50, "eps": 1.0, "eps_init": None, "eps_decay": 1.0}
SCHEDULES = [
    {"n_iters": 1, "eps": 0.5},
    {"n_iters": 50, "eps": 1.0},
    {"n_iters": 50, "eps": 0.1},
    {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("std", [1.0, 10.0])
def test_coordinate_descent_equals_the_predecessor(schedule, masked, std):
    scores = randn(3, 64, std=std, dtype=torch.float64).requires_grad_()
    k = torch.tensor([2.0, 9.0, 20.5], dtype=torch.float64, requires_grad=True)
    mask = randn(3, 64, seed=1) > -0.5 if masked else None
    grad = randn(3, 64, seed=2, dtype=torch.float64)

    def close(found, expected):
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item()
        )

    expected = coor_descent(scores, k=k, mask=mask, **schedule)
    found = coordinate_descent(scores, k, mask=mask, **schedule)
    close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, (scores, k), grad),
        torch.autograd.grad(expected, (scores, k), grad),
        strict=True,
    ):
        assert b.abs().max() > 0
        close(a, b)
    number = coordinate_descent(scores, 5, mask=mask, **schedule)
    close(number, coor_descent(scores, k=5, mask=mask, **schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coordinate_descent_is_the_reference(schedule):
    scores = randn(3, 64, std=3, dtype=torch.float64).requires_grad_()
    k = torch.tensor([[2.0], [9.0], [20.5]], dtype=torch.float64, requires_grad=True)
    found = coordinate_descent(scores, k.squeeze(-1), **schedule)
    steps = eps_schedule(*(schedule.get(n, d) for n, d in DEFAULTS.items()))
    want = reference.coordinate_descent(scores, k, torch.full((3, 1), 64), steps)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    grad = randn(3, 64, seed=2, dtype=torch.float64)
    grads = [torch.autograd.grad(gates, (scores, k), grad) for gates in (found, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_coordinate_descent_in_float32():
    # the iterates travel further than float32's range of exp
    schedule, scores = {"n_iters": 300, "eps": 0.03}, randn(2, 500, std=10).requires_grad_()
    wide, grad = scores.detach().double().requires_grad_(), randn(2, 500, seed=1)
    found, expected = (
        coordinate_descent(scores, 60, **schedule),
        coordinate_descent(wide, 60, **schedule),
    )
    assert (expected.sum(-1) > 66).all()  # not converged yet
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    found, expected = (
        torch.autograd.grad(found, scores, grad)[0],
        torch.autograd.grad(expected, wide, grad.double())[0],
    )
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-3 * expected.abs().max().item()
    )


def test_coordinate_descent_keeps_one_scalar_per_row_and_iteration():
    scores = randn(3, 1000).requires_grad_()
    few, many = (sum(saved_bytes(coordinate_descent, scores, 9, n_iters=t)) for t in (50, 150))
    assert many - few == 100 * 3 * scores.element_size()
    assert few <= 2.5 * scores.untyped_storage().nbytes()


def test_coordinate_descent_converges_to_soft_topk():
    scores = randn(2, 100, dtype=torch.float64)
    exact = soft_topk(scores, 9, eps=0.1)
    errors = [
        (coordinate_descent(scores, 9, eps=0.1, n_iters=t) - exact).abs().max()
        for t in (5, 50, 500)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


def test_the_predecessors_iterations_do_not_reach_k():
    scores, k, schedule = randn(1, 16384), 1152, {"n_iters": 20, "eps": 0.03}
    for gates in (coor_descent(scores, k=k, **schedule), coordinate_descent(scores, k, **schedule)):
        assert gates.sum() > 2 * k
    assert_sums(soft_topk(scores, k, eps=0.03), k)


class Gates(torch.nn.Module):
    def forward(self, scores, k, mask):
        return soft_topk(scores, 3, eps=0.5, mask=mask) + soft_topk(scores, k, eps=0.5)


def test_compile_and_export():
    scores, k, mask = (
        randn(4, 37).requires_grad_(),
        torch.tensor([1.0, 2.5, 7.0, 40.0]),
        randn(4, 37, seed=1) > -1,
    )
    expected, grad = Gates()(scores, k, mask), randn(4, 37, seed=2)
    compiled = torch.compile(Gates(), fullgraph=True)(scores, k, mask)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, scores, grad)[0] for x in (compiled, expected))
    )

    rows, n = torch.export.Dim("rows"), torch.export.Dim("n", min=8)
    shapes = {"scores": {0: rows, 1: n}, "k": {0: rows}, "mask": {0: rows, 1: n}}
    program = torch.export.export(
        Gates(), (scores.detach(), k, mask), dynamic_shapes=shapes
    ).module()
    torch.testing.assert_close(program(scores.detach(), k, mask), expected.detach())
    other = (randn(2, 11), torch.tensor([1.0, 4.0]), torch.ones(2, 11, dtype=torch.bool))
    torch.testing.assert_close(program(*other), Gates()(*other))


@pytest.mark.parametrize(
    ("function", "dynamic"), [(soft_topk, None), (soft_topk, True), (coordinate_descent, None)]
)
def test_compile_with_dynamic_sizes(function, dynamic):
    def squares(scores, k):
        return function(scores, k, eps=0.5).square()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(squares, backend=counter, fullgraph=True, dynamic=dynamic)
    for shape, k in (((2, 20), 3), ((3, 31), 5), ((4, 17), 6), ((5, 40), 7)):
        scores = randn(*shape).requires_grad_()
        torch.testing.assert_close(
            *(torch.autograd.grad(f(scores, k).sum(), scores)[0] for f in (compiled, squares))
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("function", [soft_topk, coordinate_descent])
def test_compile_with_an_annealed_eps(function):
    scores, compiled = randn(2, 20), torch.compile(function, backend="aot_eager", fullgraph=True)
    for eps in (4.0, 2.0, 1.0):
        torch.testing.assert_close(compiled(scores, 3, eps=eps), function(scores, 3, eps=eps))


def test_opcheck():
    scores, k = (
        randn(3, 10).requires_grad_(),
        torch.tensor([[1.0], [2.5], [12.0]], requires_grad=True),
    )
    num_valid = torch.tensor([[10], [8], [10]])
    torch.library.opcheck(OPS.soft_topk.default, (scores, k, num_valid, 0.5, 10))
    torch.library.opcheck(
        OPS.soft_topk.default, (scores.detach().double(), k.detach().double(), num_valid, 0.5, 10)
    )
    torch.library.opcheck(
        OPS.coordinate_descent.default, (scores, k, num_valid, [4.0, 2.0, 1.0, 1.0])
    )


NAN, INF = float("nan"), float("inf")
BAD = [
    (
        "scores",
        TypeError,
        [torch.zeros(2, 5, dtype=d) for d in (torch.int64, torch.bool, torch.complex64)],
    ),
    ("scores", TypeError, [[[0.0, 1.0]], None]),
    ("scores", ValueError, [torch.tensor(1.0), torch.zeros(2, 0)]),
    ("k", TypeError, [True, "2", None, 1j, torch.tensor([True, True]), torch.tensor([1j, 1j])]),
    (
        "k",
        ValueError,
        [0, -1.5, NAN, torch.tensor(0), torch.tensor([1.0, 0.0]), torch.tensor([1.0, NAN])],
    ),
    ("k", ValueError, [torch.ones(5), torch.ones(2, 1), torch.ones(2, 5)]),
    ("eps", TypeError, ["1", True, None, torch.tensor(1.0)]),
    ("eps", ValueError, [0, -1.0, NAN, INF]),
    ("mask", TypeError, [torch.ones(2, 5), [[True] * 5] * 2]),
    ("mask", ValueError, [torch.ones(5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)]),
]
BAD_SCHEDULES = [
    ("n_iters", TypeError, [2.0, True]),
    ("n_iters", ValueError, [0, -3]),
    ("eps_init", ValueError, [0.0, NAN]),
    ("eps_decay", ValueError, [0.0, 1.5, NAN]),
]


@pytest.mark.parametrize(
    ("function", "name", "error", "value"),
    [
        (function, name, error, value)
        for function, cases in ((soft_topk, BAD), (coordinate_descent, BAD + BAD_SCHEDULES))
        for name, error, values in cases
        for value in values
    ],
)
def test_bad_input_names_the_argument(function, name, error, value):
    with pytest.raises(error, match=f"^{name}:"):
        function(**{"scores": torch.zeros(2, 5), "k": 2, name: value})
