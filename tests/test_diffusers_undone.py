"""What diffusers itself replaces without a word is seen, and routing is switched off and on again afterwards."""

import copy

import pytest
import torch
from colt5_vision.pipelines import (
    disable_routed_attention,
    enable_routed_attention,
    routed_layers,
)
from colt5_vision.pipelines.sizes import MapSizeHook, TimestepHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_cases import CASES, build, close, config, every_family, run
from diffusers_pipes import ip_adapter, pipeline
from swap_cases import trace

from colt5_vision.reroute import BlockMarker

SCHEDULE = [{"min_timestep": 2000, "full": True}]  # never


def part_of(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def stale_hooks(model):
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, (MapSizeHook, TimestepHook, BlockMarker))]


def slices(pipe):
    pipe.enable_attention_slicing("max")


def one_processor(pipe):
    part_of(pipe).set_attn_processor(AttnProcessor2_0())


def processors_by_name(pipe):
    model = part_of(pipe)
    model.set_attn_processor({name: AttnProcessor() for name in model.attn_processors})


def default_processor(pipe):
    part_of(pipe).set_default_attn_processor()


def slice_of_the_model(pipe):
    part_of(pipe).set_attention_slice("auto")


def slice_and_back(pipe):
    pipe.enable_attention_slicing(1)
    pipe.disable_attention_slicing()


def fuse(pipe):
    part_of(pipe).fuse_qkv_projections()


def unload(pipe):
    pipe.unload_ip_adapter()


def load(pipe):
    ip_adapter(part_of(pipe))
    pipe.unload_ip_adapter()


UNDONE = {
    "one processor sd15": ("sd15", one_processor),
    "processors by name sdxl": ("sdxl", processors_by_name),
    "default pixart": ("pixart", default_processor),
    "enable_attention_slicing sd15": ("sd15", slices),
    "set_attention_slice sdxl": ("sdxl", slice_of_the_model),
    "disable_attention_slicing sd21": ("sd21", slice_and_back),
    "fuse_qkv_projections sd15": ("sd15", fuse),
    "fuse_qkv_projections sdxl": ("sdxl", fuse),
    "fuse_qkv_projections pixart": ("pixart", fuse),
    "fuse_qkv_projections sd3": ("sd3", fuse),
    "unload_ip_adapter sd15": ("sd15", unload),
    "unload_ip_adapter sdxl": ("sdxl", unload),
    "unload_ip_adapter sd3": ("sd3", unload),
    "unload_ip_adapter sd35": ("sd35", unload),
    "unload_ip_adapter flux": ("flux", unload),
    "load and unload_ip_adapter sd15": ("sd15", load),
    "load and unload_ip_adapter flux": ("flux", load),
}


@pytest.mark.parametrize("off_first", [True, False], ids=["disabled", "enabled anew"])
@pytest.mark.parametrize(("name", "undo"), UNDONE.values(), ids=UNDONE)
def test_what_diffusers_undoes_is_seen_and_mended(name, undo, off_first):
    case, pipe, stock = CASES[name], pipeline(name), pipeline(name)
    enable_routed_attention(pipe, config(schedule=SCHEDULE))
    assert len(routed_layers(pipe)) == len(case.tokens)
    for each_pipe in (pipe, stock):
        undo(each_pipe)
    expected, model = run(part_of(stock), case), part_of(pipe)
    assert routed_layers(pipe) == {} and torch.equal(run(model, case), expected)
    if off_first:
        disable_routed_attention(pipe)
        assert not stale_hooks(model) and torch.equal(run(model, case), expected)
    enable_routed_attention(pipe, config(1.0))
    assert len(routed_layers(pipe)) == len(case.tokens)
    close(run(model, case), expected)
    disable_routed_attention(pipe)
    assert torch.equal(run(model, case), expected)
    enable_routed_attention(pipe, config())
    assert (run(model, case) - expected).abs().max() > 1e-3
    disable_routed_attention(pipe)
    assert not stale_hooks(model) and torch.equal(run(model, case), expected)


def test_a_unet_refuses_to_set_default_processors_and_stays_routed():
    case = CASES["sd15"]
    model = build(case)
    enable_routed_attention(model, config())
    expected = run(model, case)
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        model.set_default_attn_processor()
    assert set(routed_layers(model)) == set(case.tokens) and torch.equal(run(model, case), expected)


def test_flux_keeps_its_processors_when_its_projections_are_fused():
    case = CASES["flux"]
    stock, model = build(case), build(case)
    expected = run(stock, case)
    enable_routed_attention(model, config(1.0))
    model.fuse_qkv_projections()
    assert set(routed_layers(model)) == set(case.tokens)
    close(run(model, case), expected)
    model.unfuse_qkv_projections()
    close(run(model, case), expected)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3"])
def test_unfusing_brings_routing_back_until_it_is_disabled(name):
    case = CASES[name]
    model, original = build(case), run(build(case), case)
    enable_routed_attention(model, config())
    expected = run(model, case)
    model.fuse_qkv_projections()
    assert routed_layers(model) == {}
    model.unfuse_qkv_projections()
    assert set(routed_layers(model)) == set(case.tokens) and torch.equal(run(model, case), expected)
    disable_routed_attention(model)
    assert torch.equal(run(model, case), original)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3"])
def test_unfusing_after_disabling_brings_no_size_of_an_earlier_run(name):
    case = CASES[name]
    model, original = build(case), run(build(case), case)
    enable_routed_attention(model, config())
    model.fuse_qkv_projections()
    run(model, case)
    disable_routed_attention(model)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, case), original)
    assert torch.equal(run(model, case), original)


@pytest.mark.parametrize("name", ["sd15", "ddpm", "sd3", "flux"])
def test_some_layers_replaced_by_hand_stay_when_disabled(name):
    case = CASES[name]
    model = build(case)
    first, *others = case.tokens
    original, own = run(model, case), copy.copy(model.get_submodule(first).processor)
    enable_routed_attention(model, config())
    model.get_submodule(first).set_processor(own)
    assert set(routed_layers(model)) == set(others)
    with pytest.raises(ValueError, match="routed already"):
        enable_routed_attention(model, config())
    disable_routed_attention(model)
    assert model.get_submodule(first).processor is own
    assert torch.equal(run(model, case), original) and routed_layers(model) == {}


@every_family
def test_enabling_twice_is_an_error_and_keeps_the_first(case):
    model = build(case)
    enable_routed_attention(model, config(layers=[0]))
    expected, before = run(model, case), trace(model)
    with pytest.raises(ValueError, match="routed already, call disable_routed_attention first"):
        enable_routed_attention(model, config(1.0))
    assert trace(model) == before and len(routed_layers(model)) == 1
    assert torch.equal(run(model, case), expected)
    disable_routed_attention(model)
    with pytest.raises(ValueError, match="nothing is routed"):
        disable_routed_attention(model)


def test_what_is_no_pipeline_or_model_is_an_error():
    for function in (enable_routed_attention, disable_routed_attention, routed_layers):
        with pytest.raises(TypeError, match="pipe_or_model: expected a diffusers pipeline or model, got str"):
            function("sd15")
    assert routed_layers(build(CASES["sd15"])) == {}
    with pytest.raises(ValueError, match="nothing is routed"):
        disable_routed_attention(pipeline("sd15"))
