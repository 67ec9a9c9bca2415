"""Settings chosen layer by layer from the inputs of a pipeline's own denoising."""

import pytest
import torch

from colt5_vision import (
    calibrate_routing,
    load_routing,
    routed_layers,
    save_routing,
    unroute_attention,
)
from colt5_vision.swap import calibrate
from tests.support.diffusers_cases import CASES, arguments, build
from tests.support.diffusers_pipes import CALLS, generate, pipeline

HOW = {
    "settings": [{"window_size": 3, "num_heavy_tokens_kv": keys} for keys in (1 / 8, 1.0)],
    "min_tokens": 64,
    "tolerance": 1e-4,
    "repeats": 1,
    "progress": False,
}


@pytest.fixture(autouse=True)
def all_settings_are_fast(monkeypatch):
    def timed(call, device):
        return call(), 0.5 if hasattr(call, "func") else 1.0

    monkeypatch.setattr(calibrate, "_timed", timed)


def prompt(steps=2):
    call = CALLS["sd15"] | {"num_inference_steps": steps, "output_type": "latent"}
    return call | {"generator": torch.Generator().manual_seed(0)}


def test_a_pipeline_is_calibrated_on_its_own_denoising(tmp_path):
    pipe, path = pipeline("sd15"), tmp_path / "calibration.json"
    expected = generate(pipe)
    report = calibrate_routing(pipe, [prompt()], **HOW, checkpoint=path)
    assert report and set(report.calibration) == set(routed_layers(pipe))
    assert all(name.startswith("unet.") for name in report.calibration)
    for found in report.calibration.values():  # an eighth of the keys is not exact enough
        assert found.config.num_heavy_tokens_kv == 1.0 and found.error <= 1e-4
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)

    # saved with the routing
    save_routing(pipe, tmp_path / "routing")
    other = pipeline("sd15")
    load_routing(other, tmp_path / "routing")
    assert torch.equal(generate(other), generate(pipe))
    unroute_attention(pipe)
    assert torch.equal(generate(pipe), expected)

    # every step is another input: as many as the file holds are gone on with
    longer = calibrate_routing(pipe, [prompt(), prompt(1)], **HOW, checkpoint=path)
    assert set(longer.calibration) == set(report.calibration)
    unroute_attention(pipe)
    with pytest.raises(ValueError, match="inputs: expected those of the checkpoint"):
        other_seed = prompt() | {"generator": torch.Generator().manual_seed(1)}
        calibrate_routing(pipe, [other_seed], **HOW, checkpoint=path)
    assert not routed_layers(pipe) and torch.equal(generate(pipe), expected)


def test_a_model_is_calibrated_on_its_arguments():
    case = CASES["sd15"]
    model = build(case, torch.float32)
    report = calibrate_routing(model, [arguments(case, dtype=torch.float32)], **HOW)
    assert set(report.calibration) == set(routed_layers(model))


def test_a_pipeline_takes_mappings_of_its_arguments():
    pipe = pipeline("sd15")
    with pytest.raises(TypeError, match="inputs: expected mappings of the pipeline's arguments"):
        calibrate_routing(pipe, ["a cat"], **HOW)
    with pytest.raises(TypeError, match="mappings of the pipeline's arguments.*Tensor"):
        calibrate_routing(pipe, [torch.zeros(1, 4, 8, 8)], **HOW)
    assert not routed_layers(pipe)
