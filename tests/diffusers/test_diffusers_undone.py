"""diffusers may change processors, fuse projections and load adapters while a model is routed, and
an assignment of a user's own is no trouble either."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from colt5_vision import route_attention, routed_layers, unroute_attention
from tests.support.diffusers_cases import CASES, build, close, config, every_family, run
from tests.support.diffusers_pipes import ip_adapter, pipeline
from tests.support.swap_cases import trace


def part_of(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def one_processor(pipe):
    part_of(pipe).set_attn_processor(AttnProcessor2_0())


def processors_by_name(pipe):
    model = part_of(pipe)
    model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})


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


CHANGES = {
    "one processor sd15": ("sd15", one_processor),
    "processors by name sdxl": ("sdxl", processors_by_name),
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


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
def test_a_model_stays_routed_whatever_diffusers_changes(name, change):
    case, pipe, stock = CASES[name], pipeline(name), pipeline(name)
    report = route_attention(pipe, config(1.0))
    for each in (pipe, stock):
        change(each)
    expected, model = run(part_of(stock), case), part_of(pipe)
    close(run(model, case), expected)
    assert report.calls.routed == len(case.tokens) and not report.calls.exact
    unroute_attention(pipe)
    assert torch.equal(run(model, case), expected)
    route_attention(pipe, config())
    assert (run(model, case) - expected).abs().max() > 1e-3
    unroute_attention(pipe)
    assert torch.equal(run(model, case), expected)


def test_assigned_processors_are_no_trouble():
    """As PAG and SAG pipelines do; one that computes its softmax itself is exact and counted."""
    case = CASES["sd15"]
    model, stock = build(case), build(case)
    report = route_attention(model, config(1.0))
    first, second, *_ = case.tokens
    for each in (model, stock):
        each.get_submodule(first).processor = AttnProcessor2_0()
        each.get_submodule(second).processor = AttnProcessor()
    with pytest.warns(RuntimeWarning, match="no call of torch's scaled_dot_product_attention"):
        found = run(model, case)
    close(found, run(stock, case))
    assert report.layer_calls[first].routed == 1 and not report.layer_calls[second].routed
    assert report.calls.routed == len(case.tokens) - 1


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux"])
def test_projections_are_fused_and_unfused_while_routed(name):
    case = CASES[name]
    model, original = build(case), run(build(case), case)
    report = route_attention(model, config())
    expected = run(model, case)
    model.fuse_qkv_projections()
    close(run(model, case), expected)
    model.unfuse_qkv_projections()
    close(run(model, case), expected)
    assert report.calls.routed == 3 * len(case.tokens)
    unroute_attention(model)
    close(run(model, case), original)


@every_family
def test_enabling_twice_is_an_error_and_keeps_the_first(case):
    model = build(case)
    route_attention(model, config(layers=[0]))
    expected, before = run(model, case), trace(model)
    with pytest.raises(ValueError, match="routed already, call unroute_attention first"):
        route_attention(model, config(1.0))
    assert trace(model) == before and len(routed_layers(model)) == 1
    assert torch.equal(run(model, case), expected)
    unroute_attention(model)
    with pytest.raises(ValueError, match="nothing is routed"):
        unroute_attention(model)


def test_what_is_no_pipeline_or_model_is_an_error():
    for function in (route_attention, unroute_attention, routed_layers):
        with pytest.raises(
            TypeError, match="model: expected a torch.nn.Module or a diffusers pipeline, got str"
        ):
            function("sd15")
    assert routed_layers(build(CASES["sd15"])) == {}
    with pytest.raises(ValueError, match="nothing is routed"):
        unroute_attention(pipeline("sd15"))
