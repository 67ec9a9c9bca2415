"""Eager calls of routed models while another thread traces: routed and counted as ever.

Hooks and adapters take another way in a compiled graph, where values cannot be read. Whether a call
is in one is its own thread's matter.
"""

import pytest
import torch

from colt5_vision import route_attention, routed_layers
from tests.support.threads import another_thread_traces

HOW = {"window_size": 2, "num_heavy_tokens_kv": 0.5, "min_tokens": 1}
# maps told by images and by embeddings
TIMM = ("vit", "vit-parallel", "sam", "naflex")
# by images and by values
TRANSFORMERS = ("Dinov2Model", "Siglip2VisionModel")
# by latents, positions, and the lengths of captions, of texts, of one text
DIFFUSERS = (
    "UNet2DConditionModel",
    "FluxTransformer2DModel",
    "Lumina2Transformer2DModel",
    "BriaFibo2Transformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
)


def check(model, run):
    """The same output, and every layer routed as often, as without the other thread."""
    layers = routed_layers(model).values()
    expected, first = run(), [one.calls.routed for one in layers]
    assert layers and all(first)
    with another_thread_traces():
        torch.testing.assert_close(run(), expected)  # libraries ask for the whole process
    assert [one.calls.routed for one in layers] == [2 * count for count in first]
    assert not any(one.calls.exact for one in layers)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm(name):
    pytest.importorskip("timm.models")
    from tests.support.swap_cases import CASES, build, image

    model, x = build(CASES[name]), image(CASES[name])
    route_attention(model, router="learned", **HOW)
    check(model, lambda: model(x))


@torch.no_grad()
def test_timm_with_places():
    """NaFlexViT is given patches and their places, which are read."""
    pytest.importorskip("timm.models")
    from tests.support.swap_cases import CASES, build

    model = build(CASES["naflex"])
    route_attention(model, **HOW)
    patches = torch.randn(1, 30, 16 * 16 * 3, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(6), torch.arange(5))[None]
    filled = torch.ones(1, 30, dtype=torch.bool)
    check(model, lambda: model(patches, patch_coord=places, patch_valid=filled))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers.models")
    from tests.support.transformers_cases import CASES, build, run

    model, inputs = build(CASES[name]), CASES[name].inputs()
    route_attention(model, **HOW)
    check(model, lambda: run(model, inputs))


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name):
    """By a schedule, which reads the timestep."""
    pytest.importorskip("diffusers.models")
    from tests.support.diffusers_models import MODELS, build, run

    model, call = build(name), MODELS[name].call(MODELS[name].grid, 1)
    late = {"max_timestep": 1000, "num_heavy_tokens_kv": 0.25}
    route_attention(model, schedule=[late], **HOW)
    check(model, lambda: run(model, call))
