"""route_attention on every family: what it reports, the original at 1.0, no trace after it
is disabled."""

import copy
import io
import pickle
import re
import warnings

import diffusers
import pytest
import torch

from colt5_vision import (
    RoutedAttentionConfig,
    route_attention,
    routed_layers,
    unroute_attention,
)
from tests.support.diffusers_cases import (
    CASES,
    arguments,
    build,
    close,
    config,
    every_family,
    run,
    some,
    unet,
)
from tests.support.diffusers_pipes import every_pipeline, generate, pipeline
from tests.support.swap_cases import trace


def enable(model, share=0.25, size=None, **how):
    route_attention(model, config(share, **how), sample_size=size)
    return model


def processors_of(model):
    return {
        name: module.processor
        for name, module in model.named_modules()
        if hasattr(module, "set_processor")
    }


def grids(model, case, size=None, **how):
    """(H, W) that each layer's routing was given in a forward, and the output."""
    seen, hooks = {}, []
    for name, layer in routed_layers(model).items():
        record = lambda _, args, kwargs, name=name: seen.setdefault(name, []).append(
            kwargs["grid_size"]
        )
        hooks.append(layer.attention.register_forward_pre_hook(record, with_kwargs=True))
    out = run(model, case, size, **how)
    for hook in hooks:
        hook.remove()
    return seen, out


@every_family
def test_the_report_lists_layers_tokens_and_reasons(case):
    model = build(case)
    report = route_attention(model, config(), sample_size=case.size)
    assert dict(report) == case.tokens and report.exact == case.exact
    assert list(routed_layers(model)) == [
        name for name, _ in model.named_modules() if name in case.tokens
    ]
    text = str(report)
    assert text.startswith(f"{len(case.tokens)} layers routed, {len(case.exact)} as they were")
    told = {name: f"{tokens} tokens" for name, tokens in case.tokens.items()}
    told |= {name: f"full attention, {reason}" for name, reason in case.exact.items()}
    for name, what in told.items():  # alone, or with others that differ in numbers only
        alike = re.escape(re.sub(r"\b\d+\b", "*", name)) + r" \(\d+\)"
        assert re.search(rf"  ({re.escape(name)}|{alike}): {re.escape(what)}", text)


@every_family
def test_tokens_in_the_report_are_those_of_the_maps_that_are_routed(case):
    for size in case.sizes:
        model = build(case)
        report = route_attention(model, config(), sample_size=size)
        seen, _ = grids(model, case, size)
        assert {name: [h * w for h, w in found] for name, found in seen.items()} == {
            n: [t] for n, t in report.items()
        }


def test_maps_that_no_stride_divides_have_the_models_own_sizes():
    expected = {
        "sd15": {(13, 21), (7, 11)},
        "pixart": {(6, 10)},
        "sd35": {(6, 10)},
        "sdxl": {(7, 11)},
    }
    for name, sizes in expected.items():
        seen, _ = grids(enable(build(CASES[name])), CASES[name], (13, 21))
        assert {size for found in seen.values() for size in found} == sizes
    seen, _ = grids(enable(build(CASES["flux"])), CASES["flux"], (26, 42))
    assert {size for found in seen.values() for size in found} == {(13, 21)}


def test_a_model_that_does_not_say_its_size_is_routed_at_any():
    report = route_attention(build(CASES["flux"]), RoutedAttentionConfig())
    assert dict(report) == dict.fromkeys(CASES["flux"].tokens)
    assert "single_transformer_blocks.*.attn (2): ? tokens" in str(report)


@every_family
def test_every_key_routed_is_the_original_and_fewer_differ(case):
    model = build(case)
    for size in case.sizes[:2]:
        expected = run(model, case, size)
        assert expected.std() > 0.1
        close(run(enable(model, 1.0), case, size), expected)
        unroute_attention(model)
        found = run(enable(model), case, size)
        unroute_attention(model)
        assert (found - expected).abs().max() > 1e-2 and found.isfinite().all()


@every_family
def test_disabling_leaves_no_trace(case):
    model = build(case)
    model.register_forward_pre_hook(lambda *_: None)  # the user's own stays
    expected, before, processors = run(model, case), trace(model), processors_of(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    enable(model, schedule=[{"min_timestep": 2000, "full": True}])
    assert trace(model) != before and list(model.state_dict()) == list(state)
    assert not torch.equal(run(model, case), expected)
    assert unroute_attention(model) is None
    assert trace(model) == before and len(model._forward_pre_hooks) == 1
    assert all(found is processors[name] for name, found in processors_of(model).items())
    assert not routed_layers(model) and torch.equal(run(model, case), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@every_pipeline
def test_pipelines_are_routed_and_restored(name):
    pipe = pipeline(name)
    model = "transformer" if hasattr(pipe, "transformer") else "unet"
    expected, before = generate(pipe, name), trace(getattr(pipe, model))
    report = route_attention(pipe, config(1.0))
    assert (
        set(report)
        == {f"{model}.{layer}" for layer in CASES[name].tokens}
        == set(routed_layers(pipe))
    )
    tokens = dict.fromkeys(report, 64 * 64) if name == "flux" else None
    assert dict(report) == (
        tokens or {f"{model}.{layer}": n for layer, n in CASES[name].tokens.items()}
    )
    close(generate(pipe, name), expected)
    unroute_attention(pipe)
    route_attention(pipe, config())
    assert (generate(pipe, name) - expected).abs().max() > 1e-2
    unroute_attention(pipe)
    assert trace(getattr(pipe, model)) == before and torch.equal(generate(pipe, name), expected)


@every_family
def test_sizes_change_between_calls(case):
    model = enable(build(case))
    for size in case.sizes:
        assert torch.equal(run(model, case, size), run(enable(build(case)), case, size))


@every_family
def test_a_batch_gives_what_its_samples_give(case):
    model, given = enable(build(case), num_heavy_tokens_q=0.5), arguments(case)

    def one(i):
        shared = {"img_ids", "txt_ids"}

        def cut(name, value):
            if isinstance(value, dict):
                return {n: cut(n, v) for n, v in value.items()}
            return value if name in shared or value.ndim == 0 else value[i : i + 1]

        return model(
            **{name: cut(name, value) for name, value in given.items()}, return_dict=False
        )[0]

    with torch.no_grad():
        close(model(**given, return_dict=False)[0], torch.cat([one(0), one(1)]))


@every_family
def test_copies_and_pickles_route_on_their_own(case):
    model = enable(build(case), router="learned", schedule=[{"min_timestep": 2000, "full": True}])
    expected, file = run(model, case), io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.load(file)):
        assert list(routed_layers(twin)) == list(routed_layers(model))
        assert torch.equal(run(twin, case, case.sizes[1]), run(model, case, case.sizes[1]))
        unroute_attention(twin)
        assert not torch.equal(run(twin, case), expected)
    assert torch.equal(run(model, case), expected)


def layer_names(case):
    return list(routed_layers(enable(build(case))))


def test_layers_are_chosen_by_name_pattern_and_index():
    case, names = CASES["sd15"], layer_names(CASES["sd15"])
    assert set(names) == set(case.tokens)
    up = [name for name in names if name.startswith("up_blocks.")]
    chosen = (
        ([0], names[:1]),
        ([-1, 1], [names[1], names[-1]]),
        ([names[3]], [names[3]]),
        (["up_blocks.*"], up),
    )
    for layers, expected in (*chosen, (["up_blocks.*", -1], up + names[-1:])):
        model = build(case)
        report = route_attention(model, config(layers=layers))
        assert set(report) == set(expected) == set(routed_layers(model))
        rest = {name: "not among layers" for name in names if name not in expected}
        assert report.exact == case.exact | rest
    pipe = pipeline("sd15")
    assert list(route_attention(pipe, config(layers=["unet.mid_block.*"]))) == [f"unet.{names[-1]}"]


@some("sd15", "sdxl")
def test_min_tokens_is_of_each_call_not_of_the_report(case):
    kept = 100 if case is CASES["sd15"] else 64
    model, original = build(case), build(case)
    report = route_attention(model, config(min_tokens=kept))
    few = {
        name: "64 tokens: fewer tokens than min_tokens"
        for name, n in case.tokens.items()
        if n < kept
    }
    assert report.exact == case.exact | few and set(report) == set(case.tokens) - set(few)
    assert set(grids(model, case)[0]) == set(report)
    assert set(grids(model, case, (26, 26))[0]) == set(case.tokens)
    assert torch.equal(run(model, case, (8, 8)), run(original, case, (8, 8)))


def linear():
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )


def only_cross():
    return unet(only_cross_attention=True, mid_block_type=None)


def sd15():
    return build(CASES["sd15"])


BAD = {
    "linear": (
        linear,
        {},
        ValueError,
        r"Sana\w+ has no attention that can be routed: its attention is linear \(1\), cross-at",
    ),
    "only cross": (
        only_cross,
        {},
        ValueError,
        r"UNet2DCond\w+ has no attention that can be routed: cross-attention \(12\)",
    ),
    "no attention": (
        lambda: torch.nn.Linear(2, 2),
        {},
        ValueError,
        "Linear has no attention over a map that is known",
    ),
    "few": (
        sd15,
        {"min_tokens": 257},
        ValueError,
        r"256 tokens: fewer tokens than min_tokens \(3\), 64 .*min_tokens is 257",
    ),
    "schedule": (
        sd15,
        {"schedule": [{"full": True}]},
        ValueError,
        "256 tokens: the schedule says so",
    ),
    "index": (sd15, {"layers": [0, 7]}, ValueError, r"layers: expected indices in \[0, 7\), got 7"),
    "negative": (sd15, {"layers": [-8]}, ValueError, "layers: expected indices"),
    "name": (
        sd15,
        {"layers": ["mid_block"]},
        ValueError,
        "layers: 'mid_block' is no layer.*there are down_blocks",
    ),
    "cross": (
        sd15,
        {"layers": ["mid_block.attentions.0.transformer_blocks.0.attn2"]},
        ValueError,
        "is no layer that can be routed: cross-attention",
    ),
    "size": (sd15, {"sample_size": (16, 0)}, ValueError, "sample_size"),
    "size type": (sd15, {"sample_size": "16"}, TypeError, "sample_size"),
    "config": (
        sd15,
        {"config": {"min_tokens": 1}},
        TypeError,
        "config: expected a RoutedAttentionConfig, got dict",
    ),
}


@pytest.mark.parametrize(("make", "how", "error", "match"), BAD.values(), ids=BAD)
def test_an_error_says_why_and_leaves_the_model_untouched(make, how, error, match):
    model = make()
    before, size, given = (
        trace(model),
        how.pop("sample_size", None) if "sample_size" in how else None,
        how,
    )
    with pytest.raises(error, match=match):
        route_attention(
            model, given["config"] if "config" in given else config(**given), sample_size=size
        )
    assert trace(model) == before
    with pytest.raises(ValueError, match="nothing is routed"):
        unroute_attention(model)


class Own(diffusers.UNet2DConditionModel):
    """A user's subclass, from a module that is not diffusers'."""


def test_models_of_subclasses_are_routed_in_a_pipeline():
    case, pipe = CASES["sd15"], pipeline("sd15")
    own = Own.from_config(pipe.unet.config).double().eval()
    own.load_state_dict(pipe.unet.state_dict())
    pipe.unet = own
    assert set(route_attention(pipe, config())) == {f"unet.{name}" for name in case.tokens}


def test_patterns_match_in_a_pipeline_without_its_prefix():
    pipe, model = pipeline("sd15"), build(CASES["sd15"])
    short = route_attention(pipe, config(layers=["up_blocks.*"]))
    assert set(short) == {
        f"unet.{name}" for name in route_attention(model, config(layers=["up_blocks.*"]))
    }
    unroute_attention(pipe)
    assert route_attention(pipe, config(layers=["unet.up_blocks.*"])) == short


def test_pixels_in_place_of_latents_are_told():
    pipe = pipeline("sd15")  # made for latents of 16 x 16
    with pytest.warns(
        UserWarning, match=r"^sample_size: expected .* latents, \(16, 16\) by default"
    ):
        route_attention(pipe, config(), sample_size=16 * pipe.vae_scale_factor)
    unroute_attention(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route_attention(pipe, config(), sample_size=(16 * pipe.vae_scale_factor, 64))


def test_a_controlnet_is_judged_by_the_size_of_the_unet_beside_it():
    pipe = pipeline("sd15")
    net = diffusers.ControlNetModel.from_unet(pipe.unet).double()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    both = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=net, requires_safety_checker=False
    )
    report = route_attention(both, config())
    assert None not in report.values() and any(name.startswith("controlnet.") for name in report)
    unroute_attention(both)
    with pytest.raises(ValueError, match="256 tokens: fewer tokens than min_tokens"):
        route_attention(both, config(min_tokens=10_000))


def test_a_schedule_by_timestep_needs_a_model_that_takes_one():
    model = torch.nn.Sequential(build(CASES["sd15"]))
    before = trace(model)
    with pytest.raises(
        ValueError, match="schedule: expected a model that takes timestep, got Sequential"
    ):
        route_attention(model, config(schedule=[{"min_timestep": 500, "full": True}]))
    assert trace(model) == before
