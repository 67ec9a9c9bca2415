"""Saving and loading what routing adds to a diffusers model."""

import json
import shutil

import pytest
import torch

from colt5_vision import (
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from tests.support.diffusers_cases import CASES, build, config, every_family, run, some
from tests.support.diffusers_pipes import generate, pipeline
from tests.support.swap_cases import trace


def trained(model, dtype=torch.float64, **how):
    """Routed, with routers that say something."""
    route_attention(model, config(router="learned", **how))
    generator = torch.Generator().manual_seed(3)
    for processor in routed_layers(model).values():
        for parameter in processor.attention.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def weights(model):
    return {name: dict(part.attention.state_dict()) for name, part in routed_layers(model).items()}


@every_family
def test_a_round_trip_is_bit_exact(case, tmp_path):
    schedule = [
        {"min_tokens": 10**6, "full": True},
        {"max_timestep": 3.5, "num_heavy_tokens_kv": 7},
    ]
    model = trained(build(case), schedule=schedule, num_heavy_tokens_q=0.5)
    save_routing(model, tmp_path / "new" / "routed")
    twin = build(case)
    report = load_routing(twin, tmp_path / "new" / "routed")
    assert set(report) == set(case.tokens) == set(routed_layers(twin))
    for name, tensors in weights(model).items():
        assert (
            all(torch.equal(x, weights(twin)[name][key]) for key, x in tensors.items()) and tensors
        )
        assert routed_layers(twin)[name].config == routed_layers(model)[name].config
    assert torch.equal(run(twin, case), run(model, case))


def test_without_weights_the_configuration_is_kept(tmp_path):
    case = CASES["sd15"]
    model, twin = build(case), build(case)
    route_attention(model, config(layers=["mid_block.*"]))
    save_routing(model, str(tmp_path))
    assert list(load_routing(twin, str(tmp_path))) == list(routed_layers(model))
    assert torch.equal(run(twin, case), run(model, case))


def test_a_pipeline_is_saved_whole(tmp_path):
    pipe = pipeline("sd15")
    trained(pipe)
    expected = generate(pipe)
    save_routing(pipe, tmp_path)
    unroute_attention(pipe)
    load_routing(pipe, tmp_path)
    assert torch.equal(torch.as_tensor(generate(pipe)), torch.as_tensor(expected))
    assert all(name.startswith("unet.") for name in routed_layers(pipe))


def test_loading_replaces_earlier_routing(tmp_path):
    case = CASES["pixart"]
    model = trained(build(case))
    save_routing(model, tmp_path)
    twin = trained(build(case), layers=[0], share=0.5)
    load_routing(twin, tmp_path)
    assert torch.equal(run(twin, case), run(model, case))
    unroute_attention(twin)
    assert torch.equal(run(twin, case), run(build(case), case))


def test_maps_smaller_than_min_tokens_do_not_stop_loading(tmp_path):
    case = CASES["sd15"]
    model = build(case)
    route_attention(model, config(min_tokens=10_000), sample_size=(256, 256))
    save_routing(model, tmp_path)
    assert load_routing(build(case), tmp_path) == {}


def test_saving_again_leaves_one_set_of_files(tmp_path):
    case = CASES["ddpm"]
    for seed in (0, 1):
        model = trained(build(case))
        for processor in routed_layers(model).values():
            processor.attention.correction[0].bias.data.fill_(seed)
        save_routing(model, tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    load_routing(twin := build(case), tmp_path)
    assert torch.equal(run(twin, case), run(model, case))


def test_an_interrupted_save_leaves_the_old_files_readable(tmp_path, monkeypatch):
    case = CASES["ddpm"]
    model = trained(build(case))
    save_routing(model, tmp_path)
    expected = run(model, case)
    for processor in routed_layers(model).values():
        processor.attention.correction[0].bias.data.fill_(5)
    monkeypatch.setattr(
        json, "dumps", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save_routing(model, tmp_path)
    load_routing(twin := build(case), tmp_path)
    assert torch.equal(run(twin, case), expected)


def _edit(directory, change):
    path = directory / "routed_attention.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def _cut(directory):
    path = next(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE = {
    "no directory": (shutil.rmtree, "missing, damaged or foreign"),
    "no json": (lambda d: (d / "routed_attention.json").unlink(), "missing, damaged or foreign"),
    "no weights": (lambda d: next(d.glob("*.safetensors")).unlink(), "missing, damaged or foreign"),
    "cut weights": (_cut, "sha256"),
    "cut json": (
        lambda d: (d / "routed_attention.json").write_text("{"),
        "missing, damaged or foreign",
    ),
    "another json": (lambda d: (d / "routed_attention.json").write_text("[1]"), "format 2"),
    "a later format": (lambda d: _edit(d, lambda about: about.update(format=3)), "format 2"),
    "unknown settings": (
        lambda d: _edit(d, lambda about: about["config"].update(speed=3)),
        "speed",
    ),
    "wrong settings": (
        lambda d: _edit(d, lambda about: about["config"].update(window_size=0)),
        "window_size",
    ),
    "other layers": (lambda d: _edit(d, lambda about: about["layers"].pop()), "1 layers differ"),
    "no weights named": (lambda d: _edit(d, lambda about: about.pop("weights")), "weights"),
    "other shapes": (
        lambda d: _edit(d, lambda about: about["config"].update(router="sampled")),
        "tensors",
    ),
}


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_changes_nothing_and_says_why(damage, routed, tmp_path):
    case, (spoil, message) = CASES["sd15"], DAMAGE[damage]
    save_routing(trained(build(case)), tmp_path / "saved")
    spoil(tmp_path / "saved")
    model = build(case)
    if routed:
        route_attention(model, config(0.5))
    expected, before = run(model, case), trace(model)
    with pytest.raises(ValueError, match=message):
        load_routing(model, tmp_path / "saved")
    assert trace(model) == before and torch.equal(run(model, case), expected)
    assert len(routed_layers(model)) == (len(case.tokens) if routed else 0)


@some("pixart", "flux")
def test_a_directory_of_another_model_is_refused(case, tmp_path):
    save_routing(trained(build(CASES["sd15"])), tmp_path)
    model = build(case)
    with pytest.raises(ValueError, match="is of another model than .* layers differ"):
        load_routing(model, tmp_path)
    assert routed_layers(model) == {}


def test_the_size_is_told_again_when_loading(tmp_path):
    case = CASES["flux"]
    model = build(case)
    route_attention(model, config())
    save_routing(model, tmp_path)
    assert set(load_routing(build(case), tmp_path, sample_size=(8, 12)).values()) == {24}


def test_layers_of_several_configurations_keep_their_own(tmp_path):
    pipe, other = pipeline("sd15"), pipeline("sd15")
    route_attention(pipe, config())
    own = next(iter(routed_layers(pipe).values()))
    own.config = config(0.5)
    save_routing(pipe, tmp_path)
    load_routing(other, tmp_path)
    found = {name: layer.config for name, layer in routed_layers(other).items()}
    assert found == {name: layer.config for name, layer in routed_layers(pipe).items()}
    assert found[own.name] != config() and routed_layers(other)[own.name].config == config(0.5)


def test_what_is_not_routed_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="nothing is routed"):
        save_routing(build(CASES["ddpm"]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_offloaded_models_routers_are_saved(tmp_path):
    case = CASES["ddpm"]
    model = trained(build(case))
    expected = run(model, case)
    save_routing(model.to("meta"), tmp_path)
    load_routing(twin := build(case), tmp_path)
    assert torch.equal(run(twin, case), expected)
