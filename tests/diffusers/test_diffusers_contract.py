"""What holds for every class of the table: all keys are stock attention, the map lies where the
table says, and everything can be undone."""

import copy
import math

import pytest
import torch

from colt5_vision import (
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from colt5_vision.pipelines.table import TABLE
from colt5_vision.swap.reroute import RoutedLayer
from tests.support.diffusers_models import MODELS, build, outputs, run

SETTINGS = {"window_size": 2, "min_tokens": 1}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request):
    """A model's description, with the model: tests leave it as they found it."""
    found = MODELS[request.param]
    return found, build(request.param)


def close(found, expected, tolerance=1e-5):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture
def stock(tiny):
    """The outputs of the model as it is, at its grid."""
    described, model = tiny
    call = described.call(described.grid, 1)
    yield call, run(model, call)
    if routed_layers(model):
        unroute_attention(model)


def test_every_class_of_the_table_is_tried():
    tried = {type(m).__name__ for one in MODELS.values() for m in one.make().modules()}
    assert set(TABLE) <= tried


def test_all_keys_are_stock_attention(tiny, stock):
    described, model = tiny
    call, expected = stock
    report = route_attention(model, **SETTINGS, num_heavy_tokens_kv=1.0)
    close(run(model, call), expected)
    assert all(calls.routed for calls in report.layer_calls.values()), report

    # another number of samples, masked where the model knows masks
    if described.batch:
        call = described.call(described.grid, 2)
        routed = run(model, call)
        unroute_attention(model)
        close(routed, run(model, call))


def test_fewer_keys_are_something_else_and_undone_bit_for_bit(tiny, stock):
    _, model = tiny
    call, expected = stock
    before = {key: value.clone() for key, value in model.state_dict().items()}
    route_attention(model, **SETTINGS, num_heavy_tokens_kv=0.25)
    found = run(model, call)
    assert found.isfinite().all() and found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-4
    assert model.state_dict().keys() == before.keys()
    unroute_attention(model)
    assert torch.equal(run(model, call), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sizes_in_a_row_and_samples_apart(tiny, stock):
    described, model = tiny
    calls = [described.call(grid, 1) for grid in (described.grid, *described.others)]
    expected = [run(model, call) for call in calls]
    report = route_attention(model, **SETTINGS, num_heavy_tokens_kv=1.0)
    for call, one in zip(calls, expected):
        close(run(model, call), one)
    assert all(layer.routed >= len(calls) for layer in report.layer_calls.values()), report
    unroute_attention(model)

    if described.batch:
        route_attention(model, **SETTINGS, num_heavy_tokens_kv=0.25)
        alone, call = described.call(described.grid, 1), described.call(described.grid, 2)
        with torch.no_grad():
            together = outputs(model(**call))
            apart = [outputs(model(**sample(call, alone, i))) for i in range(2)]
        if len(together) == 2 * len(apart[0]):  # the model gives a list of samples
            together, apart = [torch.cat(together)], [[torch.cat(one)] for one in apart]
        for whole, *parts in zip(together, *apart):
            close(whole, torch.cat(parts))


def sample(both, alone, i):
    """One of two samples, of arguments that are known for one as well."""
    if isinstance(both, dict):
        return {key: sample(one, alone[key], i) for key, one in both.items()}
    if isinstance(both, torch.Tensor):
        differ = [dim for dim, pair in enumerate(zip(both.shape, alone.shape)) if len({*pair}) > 1]
        return both.chunk(2, differ[0])[i] if differ else both
    if isinstance(both, (list, tuple)):
        if len(both) != len(alone):
            return both[i : i + 1]
        return type(both)(sample(*pair, i) for pair in zip(both, alone))
    return both


@pytest.mark.parametrize("name", [name for name, one in MODELS.items() if one.layout])
def test_the_map_lies_where_the_table_says(name, monkeypatch):
    """One token of the input changes one query: that of the token."""
    described, model = MODELS[name], build(name)
    grid = described.grid
    at = (grid[0] - 1, 1, grid[2] - 2)
    seen = []
    attend = RoutedLayer.attend

    def watch(self, mode, call):
        out = attend(self, mode, call)
        if mode.reasons[-1] is None:
            seen.append((mode.now.site, self.spec.place, call))
        return out

    monkeypatch.setattr(RoutedLayer, "attend", watch)
    report = route_attention(model, **SETTINGS, num_heavy_tokens_kv=1.0)
    run(model, described.call(grid, 1))
    first = seen[0]
    seen.clear()
    run(model, changed(described, at))
    assert report.calls.routed == 2 * len(seen)

    site, place, call = first
    tokens, keys = math.prod(grid), call.key.shape[2]
    assert site.grid == grid or site.grid == (1, *grid[1:])
    before = {"map": 0, "behind": 0, "before": keys - tokens, "site": site.before}[place]
    expected = (at[0] * grid[1] + at[1]) * grid[2] + at[2]
    for kind in ("query", "key"):
        old, new = getattr(call, kind), getattr(seen[0][2], kind)
        start = 0 if old.shape[2] == tokens else before
        differ = (old != new).any(-1).any(1).any(0)
        assert differ.nonzero().flatten().tolist() == [start + expected], kind


def changed(described, at):
    """The arguments with another value in one token of the map."""
    grid = described.grid
    call = copy.deepcopy(described.call(grid, 1))
    x = call[described.argument]
    x = x[0][None] if isinstance(x, list) and x[0].ndim == 4 else x
    x = x[0] if isinstance(x, list) else x
    if described.layout in ("BNC", "BN"):
        x[0, (at[0] * grid[1] + at[1]) * grid[2] + at[2]] += 1
        return call
    where = [slice(None)] * x.ndim
    for axis, place, count in zip("THW", at, grid):
        if axis in described.layout:
            step = x.shape[described.layout.index(axis)] // count
            where[described.layout.index(axis)] = slice(place * step, (place + 1) * step)
    x[tuple(where)] += 1
    return call


def test_saved_and_loaded(tiny, stock, tmp_path):
    _, model = tiny
    call, _ = stock
    route_attention(model, **SETTINGS, num_heavy_tokens_kv=0.25, router="learned")
    for i, layer in enumerate(routed_layers(model).values()):
        torch.manual_seed(i)
        layer.attention.correction[-1].weight.data.normal_()
    found = run(model, call)
    save_routing(model, tmp_path)
    unroute_attention(model)
    load_routing(model, tmp_path)
    assert torch.equal(run(model, call), found)
