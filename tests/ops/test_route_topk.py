"""route_topk against a sort in plain Python."""

import pytest
import torch
from colt5_attention.coor_descent import coor_descent
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_vision.ops import route_topk, soft_topk
from colt5_vision.ops.route_topk import reference
from tests.support.dense import window_of

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


TIED = st.sampled_from([-INF, -2.0, -0.5, -0.0, 0.0, 0.5, 0.75, 1.0, 65504.0, INF])
UNTIED = st.floats(-1000, 1000, width=16)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.one_of(TIED, UNTIED), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 50),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_equals_a_sort(entries, k, dtype, masked):
    scores = torch.tensor([[s for s, _ in entries], [-s for s, _ in entries]], dtype=dtype)
    mask = torch.tensor([[m for _, m in entries]] * 2) if masked else None
    indices, valid = route_topk(scores, k, mask=mask)
    assert indices.dtype == torch.int64 and valid.dtype == torch.bool
    for row in range(2):
        expected = reference.route_topk(
            scores[row], torch.ones(len(entries)) > 0 if mask is None else mask[row], k
        )
        assert (indices[row].tolist(), valid[row].tolist()) == expected


@pytest.mark.parametrize("k", [1, 500, 1365])
@pytest.mark.parametrize("kind", ["normal", "ties", "odd", "nan", "nan last", "equal"])
def test_long_rows_equal_a_stable_sort(kind, k):
    n = (1 << 15) + 5  # two looks, and a last group that is cut short
    scores = randn(2, 2, n)
    if kind == "ties":
        scores = (8 * scores).round() / 8
    if kind in ("odd", "nan"):
        for value, every in ((0.0, 5), (-0.0, 7), (-INF, 11), (INF, 997)):
            scores[..., ::every] = value
    if kind == "nan":
        scores[..., ::1999] = NAN
    if kind == "nan last":
        scores[1, 1, -1] = NAN
    if kind == "equal":
        scores = torch.zeros_like(scores)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(route_topk(scores, k)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_zero_go_to_the_lower_index(dtype):
    scores = torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0], dtype=dtype)
    assert route_topk(scores, 5)[0].tolist() == [0, 1, 3, 4, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [{}, {"grid_size": (2, 2), "cell_size": 2}])
def test_a_valid_minus_inf_beats_a_masked_token(dtype, grid):
    scores = torch.tensor([5.0, -INF, 7.0, -INF], dtype=dtype)
    indices, valid = route_topk(scores, 3, mask=torch.tensor([False, True, False, True]), **grid)
    assert indices[:2].tolist() == [1, 3] and valid.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [{}, {"grid_size": (4, 5), "cell_size": 3}])
@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_row_stays_in_range_and_leaves_the_others_unharmed(dtype, grid, masked):
    scores = randn(3, 20, dtype=dtype)
    mask = randn(3, 20, seed=1) > 0 if masked else None
    expected = route_topk(scores, 6, mask=mask, **grid)
    scores[1] = NAN
    indices, valid = route_topk(scores, 6, mask=mask, **grid)
    assert sorted(set(indices[1].tolist())) == sorted(indices[1].tolist()) and set(
        indices[1].tolist()
    ) <= set(range(20))
    for row in (0, 2):
        assert torch.equal(indices[row], expected[0][row]) and torch.equal(
            valid[row], expected[1][row]
        )


@pytest.mark.parametrize("grid", [{}, {"grid_size": (2, 3), "cell_size": 2}])
def test_a_negative_nan_beats_a_masked_token(grid):
    scores, mask = (
        torch.tensor([1.0, 0, 0, 0, 0, 0]),
        torch.tensor([True, False, True, False, False, False]),
    )
    scores[2] = torch.tensor(0xFFC00000 - (1 << 32), dtype=torch.int32).view(
        torch.float32
    )  # x86's inf - inf
    assert route_topk(scores, 2, mask=mask, **grid)[1].all()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 30)),
    st.booleans(),
)
def test_a_k_per_row_equals_row_by_row(counts, num_slots, masked):
    scores, k = randn(len(counts), 20), torch.tensor(counts)
    mask = randn(len(counts), 20, seed=1) > 0 if masked else None
    indices, valid = route_topk(scores, k, mask=mask, num_slots=num_slots)
    slots = min(max(counts) if num_slots is None else num_slots, 20)
    assert indices.shape == valid.shape == (len(counts), slots)
    assert indices.min() >= 0 and indices.max() < 20
    for row, count in enumerate(counts):
        own = min(count, slots)
        expected = route_topk(scores[row], own, mask=None if mask is None else mask[row])
        assert torch.equal(indices[row, :own], expected[0]) and torch.equal(
            valid[row, :own], expected[1]
        )
        assert not valid[row, own:].any()


def test_shapes_layouts_and_autograd():
    scores, mask = randn(7, 3, 2).permute(2, 1, 0), randn(7, 3, 2, seed=1).permute(2, 1, 0) > -1
    found, expected = (
        route_topk(scores, 4, mask=mask),
        route_topk(scores.contiguous(), 4, mask=mask.contiguous()),
    )
    assert found[0].shape == (2, 3, 4) and all(map(torch.equal, found, expected))
    before = scores.clone()
    assert not route_topk(scores.requires_grad_(), 4)[0].requires_grad
    assert torch.equal(scores, before)  # nothing is written to the input
    assert route_topk(torch.randn(6), 2)[0].shape == (2,)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(route_topk(scores, 4, mask=mask)[0], expected[0])


@pytest.mark.parametrize("grid", [{}, {"grid_size": (2, 3), "cell_size": 2}])
def test_a_batch_of_0_and_nothing_valid(grid):
    indices, valid = route_topk(
        torch.empty(0, 6), 4, mask=torch.empty(0, 6, dtype=torch.bool), **grid
    )
    assert indices.shape == valid.shape == (0, 4)
    assert route_topk(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), num_slots=3, **grid)[
        0
    ].shape == (0, 3)
    indices, valid = route_topk(randn(2, 6), 4, mask=torch.zeros(2, 6, dtype=torch.bool), **grid)
    assert not valid.any() and indices.min() >= 0 and indices.max() < 6


def cells_of(height, width, cell):
    return window_of(height, width, cell).unique(return_inverse=True)[1]


@st.composite
def maps(draw):
    """(scores (rows, H*W), mask or None, (H, W), cell, k), with ties."""
    height, width, cell = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.tuples(st.integers(1, 5), st.integers(1, 12))),
    )
    scores = randn(2, height * width, seed=draw(st.integers(0, 1 << 16)))
    scores = scores.round() if draw(st.booleans()) else scores
    mask = randn(2, height * width, seed=draw(st.integers(0, 1 << 16))) > draw(
        st.sampled_from([-1.0, 0.0, 1.0])
    )
    k = draw(st.integers(1, height * width + 3))
    return scores, mask if draw(st.booleans()) else None, (height, width), cell, k


@settings(max_examples=150)
@given(maps())
def test_stratified_takes_the_best_of_each_cell_and_drops_nothing(case):
    scores, mask, grid, cell, k = case
    n = scores.shape[-1]
    indices, valid = route_topk(scores, k, mask=mask, grid_size=grid, cell_size=cell)
    assert indices.shape == (2, min(k, n))
    mask = torch.ones(2, n, dtype=torch.bool) if mask is None else mask
    cells = cells_of(*grid, cell)
    for row in range(2):
        taken = indices[row].tolist()
        assert len(set(taken)) == len(taken) and set(taken) <= set(range(n))
        assert torch.equal(valid[row], mask[row, indices[row]])
        assert valid[row].sum() == min(
            k, int(mask[row].sum())
        )  # a masked token only when no valid one is left
        for cell_index in range(int(cells.max()) + 1):
            member = torch.where(cells == cell_index)[0]
            best = member[
                torch.tensor(reference.route_topk(scores[row, member], mask[row, member], n)[0])
            ].tolist()
            chosen = [i for i in taken if cells[i] == cell_index and mask[row, i]]
            assert chosen == best[: len(chosen)]


@settings(max_examples=100)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 1 << 16),
    st.data(),
)
def test_stratified_gives_equal_cells_their_share(
    rows, columns, cell_height, cell_width, seed, data
):
    grid = (rows * cell_height, columns * cell_width)
    k = data.draw(st.integers(1, grid[0] * grid[1]))
    cell = (cell_height, cell_width)
    indices, valid = route_topk(
        randn(grid[0] * grid[1], seed=seed), k, grid_size=grid, cell_size=cell
    )
    counts = cells_of(*grid, cell)[indices].bincount(minlength=rows * columns)
    share = k / (rows * columns)
    assert valid.all() and (counts - share).abs().max() < 1  # floor or ceil of the share


@pytest.mark.parametrize(("side", "cell", "k", "masked"), [(9, 8, 47, False), (12, 6, 23, True)])
def test_stratified_gives_unequal_cells_their_share(side, cell, k, masked):
    cells = cells_of(side, side, cell)
    mask = torch.ones(side * side, dtype=torch.bool)
    if masked:  # one whole cell, one token of each other
        mask = (cells == 0) | torch.zeros_like(mask).scatter(
            0, torch.tensor([6, 6 * 12, 6 * 12 + 6]), True
        )
    taken = route_topk(randn(side * side), k, mask=mask, grid_size=(side, side), cell_size=cell)[0]
    members = cells[mask].bincount()
    counts = cells[taken].bincount(minlength=len(members))
    assert (counts - k * members / members.sum()).abs().max() <= 1


def test_a_cell_larger_than_the_map_is_the_plain_selection():
    scores = randn(3, 35).round()
    for mask in (None, randn(3, 35, seed=1) > 0):
        found = route_topk(scores, 9, mask=mask, grid_size=(5, 7), cell_size=50)
        expected = route_topk(scores, 9, mask=mask)
        assert torch.equal(found[1], expected[1]) and torch.equal(
            found[0][found[1]], expected[0][expected[1]]
        )


def overlap(found, expected):
    return (
        sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True))
        / expected.numel()
    )


def test_overlap_with_the_true_top_k():
    scores, k = randn(4, 4096), 512
    best = scores.topk(k).indices
    assert torch.equal(route_topk(scores, k)[0], best)
    gates = soft_topk(scores, k, eps=0.03)
    assert (
        (gates == 1).sum(-1).gt(k / 2).all()
    )  # the gates have lost the order, the logits have not
    assert overlap(route_topk(scores, k)[0], best) == 1
    saturated = coor_descent(scores, k=k, n_iters=20, eps=0.03)
    assert overlap(saturated.topk(k).indices, best) < 0.9
    assert overlap(route_topk(saturated, k)[0], best) < 0.9


def test_compile():
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 4:] = False

    def select(scores, k):
        return (
            *route_topk(scores, 7),
            *route_topk(scores, 7, mask=mask),
            *route_topk(scores, k, num_slots=6, mask=mask),
            *route_topk(scores, 9, mask=mask, grid_size=(5, 6), cell_size=4),
        )

    compiled, k = torch.compile(select, fullgraph=True), torch.tensor([2, 5])
    for scores in (randn(2, 30), randn(2, 30).abs().round()):
        assert all(map(torch.equal, compiled(scores, k), select(scores, k)))


def test_compiled_ties_at_zero_go_to_the_lower_index():
    compiled = torch.compile(lambda x: route_topk(x, 5)[0], fullgraph=True)
    assert compiled(torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0])).tolist() == [0, 1, 3, 4, 2]


def test_compile_with_dynamic_sizes():
    def select(scores, k, height, width):
        return *route_topk(scores, k), *route_topk(
            scores, k, grid_size=(height, width), cell_size=3
        )

    compiled = torch.compile(select, backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width, k in ((4, 5, 3), (5, 6, 4), (7, 8, 20)):
        scores = randn(2, height * width)
        assert all(
            map(torch.equal, compiled(scores, k, height, width), select(scores, k, height, width))
        )


COUNTS = torch.tensor([1, 2])
BAD = [
    ("scores", TypeError, {"scores": [[1.0, 2.0]]}),
    ("scores", TypeError, {"scores": torch.zeros(2, 6, dtype=torch.int64)}),
    ("scores", ValueError, {"scores": torch.tensor(1.0)}),
    ("scores", ValueError, {"scores": torch.zeros(2, 0)}),
    ("k", ValueError, {"k": 0}),
    ("k", TypeError, {"k": 2.0}),
    ("k", TypeError, {"k": NAN}),
    ("k", TypeError, {"k": True}),
    ("k", TypeError, {"k": None}),
    ("k", (TypeError, ValueError), {"k": torch.tensor([1.0, 2.0])}),
    ("k", (TypeError, ValueError), {"k": torch.tensor([True, True])}),
    ("k", ValueError, {"k": torch.tensor([1, 2, 3])}),
    ("k", ValueError, {"k": torch.tensor(2)}),
    ("num_slots", ValueError, {"num_slots": 2}),
    ("num_slots", ValueError, {"k": COUNTS, "num_slots": 0}),
    ("num_slots", TypeError, {"k": COUNTS, "num_slots": 2.5}),
    ("mask", TypeError, {"mask": torch.ones(2, 6)}),
    ("mask", ValueError, {"mask": torch.ones(6, dtype=torch.bool)}),
    ("grid_size", ValueError, {"grid_size": (2, 3)}),
    ("grid_size", ValueError, {"cell_size": 2}),
    ("grid_size", ValueError, {"cell_size": 2, "grid_size": (2, 2)}),
    ("grid_size", ValueError, {"cell_size": 2, "grid_size": (1, 2, 3)}),
    ("cell_size", ValueError, {"cell_size": 0, "grid_size": (2, 3)}),
    ("cell_size", TypeError, {"cell_size": 1.5, "grid_size": (2, 3)}),
    ("cell_size", ValueError, {"cell_size": (2, 2, 2), "grid_size": (2, 3)}),
    pytest.param("k", ValueError, {"k": torch.tensor([-1, 2])}),
    pytest.param("k", ValueError, {"k": torch.tensor([0, 0])}),
]


@pytest.mark.parametrize(("name", "error", "arguments"), BAD)
def test_bad_input_names_the_argument(name, error, arguments):
    with pytest.raises(error, match=rf"^{name}(\[\d\])?:"):
        route_topk(**{"scores": torch.zeros(2, 6), "k": 2, **arguments})
