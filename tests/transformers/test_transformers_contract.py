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
from colt5_vision.models.transformers_adapter import MAPS, TOWERS
from colt5_vision.swap import calibrate, call, probes
from tests.support.one_token import one_token
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
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
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
    model = build(case)
    inputs = {k: v[:1] if torch.is_tensor(v) else v for k, v in case.inputs(batch=1).items()}
    name = next(name for name in inputs if name.startswith("pixel_values"))

    def with_a_patch_changed(place):
        pixels = inputs[name].clone()
        if place is not None:
            pixels[case.spot(place)] += 5
        run(model, inputs | {name: pixels})

    site, layers = one_token(model, with_a_patch_changed, case.grid, monkeypatch)
    assert site.before == case.before and layers == len(routed_layers(model))


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
        torch.testing.assert_close(run(model, inputs), run(original, inputs), rtol=1e-5, atol=1e-5)


@every
def test_save_and_load(case, tmp_path):
    model, other = build(case), build(case)
    routed(model, router="learned")
    for layer in routed_layers(model).values():
        torch.nn.init.normal_(layer.attention.correction[2].weight, std=3)
    save_routing(model, tmp_path)
    load_routing(other, tmp_path)
    assert torch.equal(run(other, case.inputs()), run(model, case.inputs()))


def test_every_class_of_the_tables_is_tried():
    seen = {type(m).__name__ for case in CASES.values() for m in case.make().modules()}
    assert seen >= TOWERS.keys() | MAPS.keys()


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
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
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
