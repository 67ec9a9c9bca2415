"""The differentiable topk: parity with the predecessor's, its mask honoured, exact gates by
default."""

import math

import pytest
import torch
from colt5_attention.topk import topk as predecessor

from colt5_vision.compat import TopkReturn, topk
from colt5_vision.ops import backend, coordinate_descent, soft_topk


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SCHEDULES = [
    {"n_iters": 20},
    {"n_iters": 50, "eps": 1.0, "coor_descent_k_ratio": 1.0},
    {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7, "coor_descent_k_ratio": 2.0},
]


@pytest.mark.parametrize("how", SCHEDULES)
@pytest.mark.parametrize("shape, k", [((3, 40), 7), ((2, 3, 20), 1), ((30,), 30), ((30,), 29)])
def test_equals_the_predecessor(how, shape, k):
    x = randn(*shape).requires_grad_()
    got, want = topk(x, k, **how), predecessor(x, k, **how)
    assert isinstance(got, TopkReturn) and got._fields == want._fields
    assert torch.equal(got.indices, want.indices)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    for name, weigh in [(n, (lambda t: t)) for n in ("values", "coor_descent_values")] + [
        ("gates", torch.sin)
    ]:
        weight = randn(*getattr(got, name).shape, seed=1)
        grads = [
            torch.autograd.grad((weigh(getattr(r, name)) * weight).sum(), x, retain_graph=True)[0]
            for r in (got, want)
        ]
        torch.testing.assert_close(*grads)
        assert (
            name != "values" or grads[0].abs().max() > 0
        )  # hard gates have no gradient of their own


def test_where_the_predecessor_is_wrong():
    """Its mask is lost in the selection, and more entries than there are crash it."""
    x, mask = torch.tensor([[5.0, 4.0, 1.0, -2.0]]), torch.tensor([[False, True, True, True]])
    assert predecessor(x, 2, mask=mask).indices.tolist() == [[0, 1]]
    assert topk(x, 2, mask=mask).indices.tolist() == [[1, 2]]
    with pytest.raises(RuntimeError):
        predecessor(x, 5)
    assert topk(x, 5).indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_exact_gates_are_the_default(dtype):
    x = randn(3, 60, dtype=dtype).requires_grad_()
    got = topk(x, 8, eps=0.5)
    want = x.topk(8).values
    assert torch.equal(got.values, want) and got.values.dtype == dtype
    assert torch.equal(x.gather(-1, got.indices), want)
    assert torch.equal(got.gates, torch.ones_like(got.gates))
    soft = soft_topk(x, 9.0, eps=0.5).gather(-1, got.indices)
    assert torch.equal(got.coor_descent_values, soft)
    weight = randn(3, 8, seed=1).to(dtype)
    (found,) = torch.autograd.grad((got.values * weight).sum(), x)
    (wanted,) = torch.autograd.grad((want * (1 + soft - soft.detach()) * weight).sum(), x)
    torch.testing.assert_close(found, wanted)
    untaken = torch.ones(3, 60, dtype=torch.bool).scatter(1, got.indices, False)
    assert (found[untaken] != 0).any(), "entries that were not taken do not learn"


@pytest.mark.parametrize("n_iters", [None, 30])
@pytest.mark.parametrize("under", [math.nan, math.inf, 99.0])
def test_masked_entries_are_never_returned_while_a_valid_one_is_left(n_iters, under):
    x, mask = randn(4, 30), randn(4, 30, seed=1) > 0
    mask[1], mask[2] = torch.arange(30) == 3, False
    dirty = torch.where(mask, x, under).requires_grad_()
    got = topk(dirty, 6, mask=mask, n_iters=n_iters)
    taken = [6, 1, 0, 6]
    for i, count in enumerate(taken):
        row = x[i, mask[i]].clone().requires_grad_()
        assert (got.gates[i] == 1).tolist() == [True] * count + [False] * (6 - count)
        for field in (got.values, got.gates, got.coor_descent_values):
            assert (field[i, count:] == 0).all()
        if count == 6:
            own = topk(row, 6, n_iters=n_iters)
            torch.testing.assert_close(got.values[i], own.values)
            torch.testing.assert_close(got.coor_descent_values[i], own.coor_descent_values)
            assert torch.equal(mask[i].nonzero()[own.indices, 0], got.indices[i])
            weight = randn(6, seed=2)
            (one,) = torch.autograd.grad((own.values * weight).sum(), row)
            (all_,) = torch.autograd.grad((got.values[i] * weight).sum(), dirty, retain_graph=True)
            torch.testing.assert_close(all_[i, mask[i]], one)
    assert ((got.indices >= 0) & (got.indices < 30)).all()
    (grad,) = torch.autograd.grad((got.values * randn(4, 6, seed=3)).sum(), dirty)
    assert grad.isfinite().all() and (grad[~mask] == 0).all()
    plain = topk(dirty, 6, mask=mask, non_differentiable=True)
    assert torch.equal(plain.indices, got.indices) and torch.equal(plain.values, got.values)


def test_non_differentiable_is_the_plain_top_k():
    x = randn(2, 20).requires_grad_()
    got, want = topk(x, 4, non_differentiable=True), x.topk(4)
    assert got.coor_descent_values is None and got.gates is None
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)
    grads = [torch.autograd.grad(r.values.sum(), x)[0] for r in (got, want)]
    assert torch.equal(*grads)


def test_ties_go_to_the_lower_index():
    assert topk(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).indices.tolist() == [1, 2]


def test_a_batch_gives_what_its_rows_give():
    x = randn(3, 25)
    whole = topk(x, 5)
    for i in range(3):
        for a, b in zip(whole, topk(x[i], 5)):
            torch.testing.assert_close(a[i], b)
    assert topk(x[:0], 5).values.shape == (0, 5)


def test_fused_names_the_backend(monkeypatch):
    asked = []
    kernels = backend.requested_backend
    monkeypatch.setattr(
        backend, "requested_backend", lambda given=None: asked.append(given) or kernels(given)
    )
    for fused in (True, False, None):
        asked.clear()
        topk(randn(9), 2, fused=fused)
        assert asked[-1] == {True: "auto", False: "eager", None: None}[fused]
        asked.clear()
        topk(randn(9), 2, fused=fused, n_iters=3)
        assert asked[-1] == {True: "auto", False: "eager", None: None}[fused]


@pytest.mark.parametrize("n_iters", [None, 5])
def test_compile(n_iters):
    def function(x, mask):
        return topk(x, 4, n_iters=n_iters, mask=mask)

    torch.compiler.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, mask = randn(3, 21).requires_grad_(), randn(3, 21, seed=1) > -1
    got, want = fast(x, mask), function(x, mask)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(r.values.pow(2).sum(), x)[0] for r in (got, want)]
    torch.testing.assert_close(*grads)


def test_autocast_changes_nothing():
    x = randn(2, 30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = topk(x, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, topk(x, 4)))


def test_the_gates_are_those_of_the_operators():
    x = randn(2, 30)
    got = topk(x, 4, n_iters=7, eps=0.2, eps_init=2.0, eps_decay=0.5)
    want = coordinate_descent(x, 4.5, n_iters=7, eps=0.2, eps_init=2.0, eps_decay=0.5)
    assert torch.equal(got.coor_descent_values, want.gather(-1, got.indices))


@pytest.mark.parametrize(
    "name, error, how",
    [
        ("x", TypeError, {"x": [1.0]}),
        ("x", TypeError, {"x": torch.ones(3, dtype=torch.int64)}),
        ("x", ValueError, {"x": torch.ones(2, 0)}),
        ("x", ValueError, {"x": torch.tensor(1.0)}),
        ("k", ValueError, {"k": 0}),
        ("k", TypeError, {"k": 1.5}),
        ("k", TypeError, {"k": True}),
        ("coor_descent_k_ratio", ValueError, {"coor_descent_k_ratio": 0.9}),
        ("coor_descent_k_ratio", ValueError, {"coor_descent_k_ratio": math.nan}),
        ("n_iters", ValueError, {"n_iters": 0}),
        ("eps", ValueError, {"eps": 0.0}),
        ("eps_init", ValueError, {"eps_init": 1.0}),
        ("eps_decay", ValueError, {"eps_decay": 0.5}),
        ("eps_decay", ValueError, {"eps_decay": 1.5, "n_iters": 3}),
        ("mask", TypeError, {"mask": torch.ones(2, 9)}),
        ("mask", ValueError, {"mask": torch.ones(2, 8, dtype=torch.bool)}),
        ("fused", TypeError, {"fused": "auto"}),
    ],
)
def test_errors_name_the_argument(name, error, how):
    with pytest.raises(error, match=rf"^(\w+, )*{name}\b.*:"):
        topk(**{"x": randn(2, 9), "k": 2, **how})
