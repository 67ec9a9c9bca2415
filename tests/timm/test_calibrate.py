"""Settings chosen layer by layer, on the layer's own queries, keys and values."""

import dataclasses
import json

import pytest
import timm
import torch

from colt5_vision import (
    RoutedAttentionConfig,
    calibrate_routing,
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from colt5_vision.swap import calibrate
from colt5_vision.swap.full import full_attention

SETTINGS = [
    {"router": router, "window_size": 3, "num_heavy_tokens_kv": keys}
    for router in ("sampled", "grouped")
    for keys in (1 / 4, 1.0)
]


def vit(**how):
    torch.manual_seed(0)
    how |= {"img_size": 160, "depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **how)
    for name, parameter in model.named_parameters():
        if "qkv.weight" in name:
            parameter.data *= 8  # attention that matters
    return model


def images(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 160, 160, generator=generator) for _ in range(count)]


def seconds(monkeypatch, of):
    """Let a call take as long as ``of`` says of what is called: None is full attention."""

    def timed(call, device):
        return call(), of(getattr(call, "func", None))

    monkeypatch.setattr(calibrate, "_timed", timed)


def by_keys(attention):
    """Few keys are fast, and grouped ones slower."""
    if attention is None:
        return 2.0
    return attention.num_heavy_tokens_kv * (1.5 if attention.router == "grouped" else 1)


def test_the_fastest_that_is_exact_enough_is_taken(monkeypatch):
    seconds(monkeypatch, by_keys)
    for tolerance, keys in ((10.0, 1 / 4), (1e-4, 1.0)):
        model = vit()
        report = calibrate_routing(
            model,
            images(),
            tolerance=tolerance,
            settings=SETTINGS,
            min_tokens=1,
            progress=False,
        )
        layers = routed_layers(model)
        assert list(layers) == [f"blocks.{i}.attn" for i in range(3)] == list(report)
        for name, layer in layers.items():
            assert (layer.config.router, layer.config.num_heavy_tokens_kv) == ("sampled", keys)
            found = report.calibration[name]
            assert found.error <= tolerance and found.speedup == 2 / keys
            gain = f"{found.speedup:.1f} times as fast"
            assert f"{gain} ({found.expected_speedup:.1f} by the cost model)" in str(report)
            error = f"{found.error:.2g} ({found.expected_error:.2g} by a few queries)"
            assert error in str(report)
        unroute_attention(model)


def test_the_error_is_that_of_the_layer_alone(monkeypatch):
    """On the inputs that it has under full attention."""
    seconds(monkeypatch, by_keys)
    model, (image,) = vit().eval(), images(1)
    seen = {}

    class Watch:
        def __call__(self, layer, q, k, v, **how):
            how.pop("group"), how.pop("features")
            window = {"window_size": (3, 3)}
            exact = full_attention(q, k, v, **how, **window)
            seen[layer.name] = (layer.attention(q, k, v, **how) - exact).norm() / exact.norm()
            return exact

    route_attention(model, **SETTINGS[0], min_tokens=1)
    for layer in routed_layers(model).values():
        layer.teacher = Watch()
    with torch.no_grad():
        model(image)
    unroute_attention(model)
    report = calibrate_routing(
        model, [image], tolerance=1e3, settings=SETTINGS[:1], min_tokens=1, progress=False
    )
    assert len(seen) == 3
    for name, error in seen.items():
        assert report.calibration[name].error == pytest.approx(error.item(), rel=1e-4)
        assert error > 1e-2


def test_a_few_queries_tell_about_the_error_of_all(monkeypatch):
    """Of every router."""
    seconds(monkeypatch, by_keys)
    how = {"settings": [SETTINGS[0], SETTINGS[2]], "tolerance": 1e3, "min_tokens": 1}
    monkeypatch.setattr(calibrate, "_HELD_OUT", 64)  # of 101
    for router in (0, 2):
        own = how | {"settings": [SETTINGS[router]]}
        report = calibrate_routing(vit(), images(), **own, progress=False)
        for found in report.calibration.values():
            assert found.error / 1.5 < found.expected_error < 1.5 * found.error
            assert found.error != found.expected_error
    with monkeypatch.context() as all_queries:
        all_queries.setattr(calibrate, "_HELD_OUT", 10_000)
        report = calibrate_routing(vit(), images(), **how, progress=False)
    for found in report.calibration.values():
        assert found.expected_error == pytest.approx(found.error, rel=1e-12)


def test_the_cost_model_tells_the_speedup_of_each_layer(monkeypatch):
    """Of every router, over images of several sizes; None where it knows no costs."""
    monkeypatch.setattr(calibrate, "_timed", lambda call, device: (call(), 1.0))
    small, large = torch.randn(1, 3, 80, 80), torch.randn(1, 3, 160, 160)
    for one in (SETTINGS[0], SETTINGS[2]):
        how = {"settings": [one], "tolerance": 1e3, "min_tokens": 1, "min_speedup": 0.1}
        report = calibrate_routing(
            vit(dynamic_img_size=True), [small, large], **how, progress=False
        )
        config = RoutedAttentionConfig.from_dict(one, whole=False)
        told = [config.expected_speedup(n, 64, ("cpu", torch.float32), others=1) for n in (25, 100)]
        mean = 2 / sum(1 / speedup for speedup in told)
        for found in report.calibration.values():
            assert found.expected_speedup == pytest.approx(mean, rel=1e-9)
        unknown = calibrate_routing(vit().double(), [large.double()], **how, progress=False)
        assert all(found.expected_speedup is None for found in unknown.calibration.values())


def test_layers_choose_for_themselves_and_are_saved_so(monkeypatch, tmp_path):
    """One layer wants another router, one keeps full attention."""
    order = []

    def of(attention):
        if attention is None:
            order.append(None)
            return 1.0
        layer = (len(order) - 1) % 3  # full attention comes first in each layer
        return {0: {"sampled": 0.2, "grouped": 0.5}, 1: {"sampled": 0.5, "grouped": 0.2}}.get(
            layer, {"sampled": 1.0, "grouped": 1.0}
        )[attention.router]

    seconds(monkeypatch, of)
    model, (image,) = vit().eval(), images(1)
    settings = [SETTINGS[0], SETTINGS[2]]
    how = {"settings": settings, "tolerance": 1e3, "min_tokens": 1, "repeats": 1}
    report = calibrate_routing(model, [image], **how, progress=False)
    routers = {name: layer.config.router for name, layer in routed_layers(model).items()}
    assert routers == {"blocks.0.attn": "sampled", "blocks.1.attn": "grouped"}
    assert "1.1 times as fast" in report.exact["blocks.2.attn"]

    with torch.no_grad():
        expected = model(image)
        save_routing(model, tmp_path)
        other = vit().eval()
        load_routing(other, tmp_path)
        assert torch.equal(other(image), expected)
    again = {name: layer.config for name, layer in routed_layers(other).items()}
    assert again == {name: layer.config for name, layer in routed_layers(model).items()}
    unroute_attention(model)
    with torch.no_grad():
        assert not torch.equal(model(image), expected)

    # a file whose layers disagree with the model
    about = json.loads((tmp_path / "routed_attention.json").read_text())
    about["by_layer"]["blocks.9.attn"] = about["config"]
    (tmp_path / "routed_attention.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="blocks.9.attn"):
        load_routing(model, tmp_path)
    assert not routed_layers(model)


def test_nothing_gains_and_nothing_is_routed(monkeypatch):
    seconds(monkeypatch, lambda attention: 1.0)
    model, (image,) = vit(), images(1)
    with torch.no_grad():
        expected = model.eval()(image)
        model.train()
        report = calibrate_routing(model, [image], min_tokens=1, repeats=1, progress=False)
        assert not report and len(report.exact) == 3 and not routed_layers(model)
        assert model.training and all(module.training for module in model.modules())
        assert torch.equal(model.eval()(image), expected)


class Stop(Exception):
    pass


def test_a_run_that_was_interrupted_goes_on_after_the_last_layer(monkeypatch, tmp_path):
    """Each layer's findings are on the disk when the next begins, and are not measured again."""
    path, timed = tmp_path / "calibration.json", []

    def of(attention):
        timed.append(attention)
        if len(timed) == stop:
            raise Stop
        return by_keys(attention)

    seconds(monkeypatch, of)
    how = {"settings": SETTINGS, "min_tokens": 1, "tolerance": 10.0, "repeats": 1}
    how |= {"progress": False}
    per_layer, stop = 1 + len(SETTINGS), None
    whole = calibrate_routing(vit(), images(), **how, checkpoint=tmp_path / "whole.json")
    assert len(timed) == 2 * 3 * per_layer

    # in the second layer of the second input
    model, timed[:] = vit(), []
    stop = 4 * per_layer + 2
    with pytest.raises(Stop):
        calibrate_routing(model, images(), **how, checkpoint=path)
    assert not routed_layers(model) and model.training
    timed[:], stop = [], None
    report = calibrate_routing(model, images(), **how, checkpoint=path)
    assert len(timed) == 2 * per_layer
    assert report.calibration == whole.calibration and report == whole
    unroute_attention(model)

    # all is known: another tolerance measures nothing, fewer inputs are not those of the others
    timed.clear()
    report = calibrate_routing(model, images(), **how | {"tolerance": 1e-4}, checkpoint=path)
    assert not timed
    assert {found.config.num_heavy_tokens_kv for found in report.calibration.values()} == {1.0}
    unroute_attention(model)
    one = calibrate_routing(model, images(1), **how, checkpoint=path)
    unroute_attention(model)
    assert not timed
    assert one.calibration == calibrate_routing(model, images(1), **how).calibration


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"settings": SETTINGS[:2]}, "settings: expected that of the checkpoint"),
        ({"min_tokens": 2}, "settings: expected that of the checkpoint"),
        ({"repeats": 2}, "repeats: expected that of the checkpoint"),
        ({"format": [0, 1]}, "checkpoint: .*was written by another version"),
        ({"format": [1, 256], "cut": "blocks.1.attn"}, "checkpoint: .*by another version"),
        ({"device": ["cpu", 99]}, "device: expected that of the checkpoint"),
        ({"model": lambda: torch.nn.Sequential(vit())}, "model: expected that of the checkpoint"),
        ({"inputs": images(2)[1:]}, "inputs: expected those of the checkpoint"),
        ({"seed": 1}, "and the same weights: .*blocks.0.attn"),
        ({"text": "{"}, "checkpoint: .*is damaged or not of calibrate_routing"),
        ({"text": "[]"}, "checkpoint: .*is damaged or not of calibrate_routing"),
        ({"cut": "blocks.1.attn"}, "checkpoint: .*is damaged or not of calibrate_routing"),
    ],
)
def test_a_file_of_something_else_is_refused(change, match, tmp_path):
    path = tmp_path / "calibration.json"
    how = {"settings": SETTINGS, "min_tokens": 1, "repeats": 1, "progress": False}
    calibrate_routing(vit(), images(1), **how, checkpoint=path)
    before = path.read_text()
    if "cut" in change:
        about = json.loads(before)
        about["calls"][change.pop("cut")][0][1].pop()
        path.write_text(json.dumps(about))
    other = {name: change.pop(name) for name in ("format", "device") if name in change}
    if other:
        path.write_text(json.dumps(json.loads(before) | other))
    path.write_text(change.pop("text", path.read_text()))

    model = change.pop("model", vit)()
    if change.pop("seed", 0):
        for parameter in model.parameters():
            parameter.data *= 1.01
    inputs, text = change.pop("inputs", images(1)), path.read_text()
    with pytest.raises(ValueError, match=match):
        calibrate_routing(model, inputs, **how | change, checkpoint=path)
    assert path.read_text() == text
    assert not routed_layers(model) and model.training


def test_times_are_measured(monkeypatch):
    model = vit()
    how = {"settings": SETTINGS, "tolerance": 10.0, "min_tokens": 1, "min_speedup": 1e-3}
    report = calibrate_routing(model, images(1), **how, progress=False)
    assert len(report.calibration) == 3
    assert all(0 < found.speedup < 1e3 for found in report.calibration.values())


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"inputs": torch.zeros(1)}, TypeError, "inputs"),
        ({"inputs": []}, ValueError, "inputs: none reached"),
        ({"inputs": ["a"]}, TypeError, "inputs"),
        ({"min_tokens": 10_000}, ValueError, "min_tokens|inputs"),
        ({"tolerance": 0}, ValueError, "tolerance"),
        ({"min_speedup": -1}, ValueError, "min_speedup"),
        ({"repeats": 0}, ValueError, "repeats"),
        ({"settings": []}, ValueError, "settings"),
        ({"settings": "sampled"}, TypeError, "settings"),
        ({"settings": [1]}, TypeError, "settings"),
        ({"settings": [{"router": "learned"}]}, ValueError, "settings"),
        ({"settings": [{"layers": [0]}]}, ValueError, "settings"),
        ({"model": 3}, TypeError, "model"),
        ({"checkpoint": 5}, TypeError, "checkpoint: expected a path, got int"),
    ],
)
def test_bad_input_is_named_and_nothing_is_changed(how, error, match):
    model = vit()
    how = {"model": model, "inputs": images(1), "min_tokens": 1, "progress": False} | how
    with pytest.raises(error, match=match):
        calibrate_routing(how.pop("model"), how.pop("inputs"), **how)
    assert not routed_layers(model) and model.training


def test_a_routed_model_is_refused():
    model = vit()
    route_attention(model, min_tokens=1)
    with pytest.raises(ValueError, match="routed already"):
        calibrate_routing(model, images(1), progress=False)
    assert routed_layers(model)


def test_the_settings_tried_by_default_are_both_routers():
    assert {config.router for config in calibrate.CALIBRATED} == {"sampled", "grouped"}
    default = dataclasses.asdict(RoutedAttentionConfig())
    for config in calibrate.CALIBRATED:
        assert dataclasses.asdict(config)["min_tokens"] == default["min_tokens"]
