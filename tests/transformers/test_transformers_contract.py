"""Every class of transformers that can be routed: the original with all keys, the map where the
table says, undone bit for bit."""

import pytest
import torch
from transformers import masking_utils

from colt5_vision import (
    calibrate_routing,
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from colt5_vision.models.transformers_adapter import TOWERS
from colt5_vision.swap import calibrate, call, probes, reroute
from tests.support.swap_cases import trace
from tests.support.transformers_cases import CASES, build, run

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def routed(model, share=0.25, **how):
    return route_attention(
        model, **{"window_size": 3, "num_heavy_tokens_kv": share, "min_tokens": 0, **how}
    )


@every
def test_every_key_is_the_original_and_fewer_differ_and_undone(case, monkeypatch):
    monkeypatch.setattr(probes, "_PROBES", 2)  # else every token of so small a map is exact
    model, inputs = build(case), case.inputs()
    expected, before = run(model, inputs), trace(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = routed(model, 1.0)
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=2e-5)
    assert report.calls.routed >= len(report) > 0 and not report.calls.exact

    unroute_attention(model)
    report = routed(model, window_size=(1, 2, 2) if len(case.size) == 3 else 2)
    found = run(model, inputs)
    assert found.isfinite().all() and (found - expected).abs().max() > 1e-4
    assert report.calls.routed > 0 and not report.calls.exact
    unroute_attention(model)
    assert trace(model) == before
    assert torch.equal(run(model, inputs), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


placed = {name: case for name, case in CASES.items() if case.patch is not None}


@pytest.mark.parametrize("case", placed.values(), ids=placed)
def test_the_map_lies_where_the_table_says(case, monkeypatch):
    """One patch of the image changes one row of the first layer's queries: that of its token."""
    model, seen = build(case), []
    original = reroute.RoutedLayer.route

    def route(self, layer, now, call):
        seen.append((now.site, call.query))
        return original(self, layer, now, call)

    monkeypatch.setattr(reroute.RoutedLayer, "route", route)
    routed(model, 1.0)
    inputs = case.inputs(batch=1) | {k: v[:1] for k, v in case.call.items() if torch.is_tensor(v)}
    run(model, inputs)
    site, first = seen[0]
    grid = tuple(n // p for n, p in zip(case.size, case.patch))
    assert site.grid == (grid if len(grid) == 3 else (1, *grid)) and site.before == case.before
    assert len(seen) == len(routed_layers(model))

    for place in ((0,) * len(grid), tuple(n - 2 for n in grid)):
        seen.clear()
        pixels = next(x for name, x in inputs.items() if name.startswith("pixel")).clone()
        spot = tuple(slice(p * n, p * n + p) for p, n in zip(case.patch, place))
        where = (0, spot[0], slice(None), *spot[1:]) if len(spot) == 3 else (0, slice(None), *spot)
        pixels[where] += 5
        name = next(name for name in inputs if name.startswith("pixel"))
        run(model, inputs | {name: pixels})
        changed = (seen[0][1] - first).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
        token = 0
        for n, side in zip(place, grid):
            token = token * side + n
        token = token if site.order is None else int(seen[0][0].order[0, token])
        assert changed == [site.before + token]


@every
def test_a_batch_gives_what_its_samples_give(case):
    if "ViTMAE" in case.make.__name__:
        pytest.skip("it draws an order of the tokens for the whole batch")
    model = build(case)
    routed(model)
    inputs = case.inputs(batch=2)
    whole = run(model, inputs)
    for i in range(2):
        one = {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in inputs.items()}
        torch.testing.assert_close(run(model, one)[0], whole[i], rtol=1e-4, atol=1e-4)


resizable = {
    name: case
    for name, case in CASES.items()
    if case.size == (20, 28) and name != "InternVLVisionModel"
}


@pytest.mark.parametrize("case", resizable.values(), ids=resizable)
def test_sizes_change_between_calls(case):
    model, original = build(case), build(case)
    routed(model, 1.0)
    for size in ((20, 28), (28, 20), (32, 32), (20, 28)):
        inputs = case.inputs(size=size)
        torch.testing.assert_close(run(model, inputs), run(original, inputs), rtol=1e-4, atol=2e-5)


@every
def test_save_and_load(case, tmp_path):
    model, other = build(case), build(case)
    routed(model, router="learned")
    for layer in routed_layers(model).values():
        torch.nn.init.normal_(layer.attention.correction[2].weight, std=3)
    save_routing(model, tmp_path)
    load_routing(other, tmp_path)
    assert torch.equal(run(other, case.inputs()), run(model, case.inputs()))


KEY_MASKS = {kind for kind, tower in TOWERS.items() if tower.masks == "keys"}
MASKED = {"Siglip2VisionModel": CASES["Siglip2VisionModel"]}


def test_every_tower_with_masks_of_keys_is_tried():
    seen = {type(m).__name__ for case in MASKED.values() for m in build(case).modules()}
    assert seen >= KEY_MASKS


@pytest.mark.parametrize("implementation", ["sdpa", "eager mask"])
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_keys_is_no_bias_of_pairs(name, implementation, monkeypatch):
    """Whether it is written out for every query or not, boolean or additive."""
    model, inputs, seen = build(MASKED[name]), MASKED[name].inputs(), []
    if implementation == "eager mask":
        masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        monkeypatch.setitem(masks, "sdpa", masks["eager"])
    original = call.read_mask

    def read_mask(*args):
        seen.append((args[0], original(*args)))
        return seen[-1][1]

    monkeypatch.setattr(call, "read_mask", read_mask)
    expected = run(model, inputs)
    report = routed(model, 1.0)
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=2e-5)
    assert report.calls.routed == len(report) == len(seen)
    for mask, (key_mask, pair_bias, _) in seen:
        assert mask.shape[2] > 1, "the library does not write it out for every query"
        assert key_mask is not None and not key_mask.all() and pair_bias is None


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_pairs_is_not_taken_for_one_of_keys(name):
    model, inputs = build(MASKED[name]), MASKED[name].inputs()
    length = inputs["pixel_values"].shape[1]
    pairs = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(0)) > 0.3
    inputs["pixel_attention_mask"] = pairs | torch.eye(length, dtype=torch.bool)
    model.use_head = False  # it takes masks of patches only
    expected = run(model, inputs)
    report = routed(model)
    with pytest.warns(RuntimeWarning, match="the mask is not one of patches"):
        found = run(model, inputs)
    assert torch.equal(found, expected)
    assert not report.calls.routed and report.calls.exact.total() == len(report)


@every
def test_layers_are_calibrated_on_their_own_inputs(case, monkeypatch):
    """With every setting fast, the least exact that is exact enough is not taken, all keys are."""
    monkeypatch.setattr(probes, "_PROBES", 2)
    monkeypatch.setattr(
        calibrate, "_timed", lambda call, _: (call(), 0.5 if hasattr(call, "func") else 1.0)
    )
    model, inputs = build(case), case.inputs()
    expected = run(model, inputs)
    settings = [{"window_size": 3, "num_heavy_tokens_kv": keys} for keys in (1 / 4, 1.0)]
    how = {"settings": settings, "min_tokens": 0, "tolerance": 1e-4, "progress": False}
    report = calibrate_routing(model, [inputs], **how)
    assert report and set(report.calibration) == set(routed_layers(model))
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-3, atol=1e-3)
