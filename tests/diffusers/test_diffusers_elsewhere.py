"""Routing beside diffusers' other tools: guidance by perturbed attention, caches, threads, copies
of weights."""

import copy
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend
from torch.ao.quantization import quantize_dynamic

from colt5_vision import (
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from tests.support.diffusers_cases import (
    CASES,
    build,
    close,
    config,
    run,
    spread,
    unet,
)
from tests.support.diffusers_models import MODELS
from tests.support.diffusers_models import build as tiny
from tests.support.diffusers_models import run as run_tiny
from tests.support.diffusers_pipes import ddim, generate, pipeline, stable

# ---- guidance -----------------------------------------------------------------------------------

STEADY = {"clip_sample": False, "set_alpha_to_one": False}
GUIDED = {  # how to make the pipeline, whose call, and what is more in it
    "PAG": (
        lambda: stable(
            diffusers.StableDiffusionPAGPipeline, scheduler=ddim(**STEADY), pag_applied_layers="mid"
        ),
        "sd15",
        {"pag_scale": 3.0},
    ),
    "PAG of SD3": (
        lambda: diffusers.StableDiffusion3PAGPipeline.from_pipe(pipeline("sd3")),
        "sd3",
        {"pag_scale": 3.0},
    ),
    "PAG of PixArt": (
        lambda: diffusers.PixArtSigmaPAGPipeline.from_pipe(pipeline("pixart")),
        "pixart",
        {"pag_scale": 3.0},
    ),
    "SAG": (
        lambda: stable(diffusers.StableDiffusionSAGPipeline, scheduler=ddim(**STEADY)),
        "sd15",
        {"sag_scale": 0.5, "height": 128},
    ),
}


@pytest.mark.parametrize(("make", "name", "how"), GUIDED.values(), ids=GUIDED)
def test_pipelines_that_assign_processors_run(make, name, how):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float64)
    expected = generate(pipe, name, **how)
    report = route_attention(pipe, config(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # perturbed attention is not routed
        close(generate(pipe, name, **how), expected, 1e-7)
    assert report.calls.routed
    unroute_attention(pipe)
    assert torch.equal(generate(pipe, name, **how), expected)


def skip(model, name, **how):
    settings = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False} | how
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=name, **settings))
    return model


@pytest.mark.parametrize("first", ["hooks", "routing"])
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("pixart", "transformer_blocks"), ("sd15", "mid_block.attentions.0.transformer_blocks")],
)
def test_perturbed_attention_by_hooks_stays_perturbed(name, blocks, first):
    case = CASES[name]
    expected, plain = run(skip(build(case), blocks), case), run(build(case), case)
    assert (expected - plain).abs().max() > 1e-4
    model = build(case)
    if first == "hooks":
        skip(model, blocks)
    report = route_attention(model, config(1.0))
    if first == "routing":
        skip(model, blocks)
    close(run(model, case), expected)
    assert report.calls.routed


# ---- caches -------------------------------------------------------------------------------------

CACHES = {
    "first block": FirstBlockCacheConfig(threshold=0.05),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=["blocks"],
    ),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        cache_identifiers=[r"(\w*_)?blocks\..*attn1?"],  # diffusers' own do not know Wan's names
        taylor_factors_dtype=torch.float64,
    ),
    "mag": MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4), retention_ratio=0.25),
}


def two_layers(name):
    """A tiny model, and its output for another input after two steps."""
    model = tiny(name)
    model = spread(type(model).from_config({**model.config, "num_layers": 2}))
    call = MODELS[name].call(MODELS[name].grid, 2)

    def step(model, i):
        return run_tiny(model, call | {"hidden_states": call["hidden_states"] * (1 + i // 2)})

    return model, step


def flux_steps():
    return build(CASES["flux"]), lambda model, i: run(model, CASES["flux"], seed=i // 2)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("flux", "cache"),
        ("flux", "routing"),
        ("WanTransformer3DModel", "routing"),
        ("QwenImageTransformer2DModel", "cache"),
    ],
)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_gives_what_it_gives_the_stock_model(cache, name, first):
    stock, step = flux_steps() if name == "flux" else two_layers(name)
    model = copy.deepcopy(stock)

    def steps(model):
        with model.cache_context("cond") if cache != "pyramid" else warnings.catch_warnings():
            return [step(model, i) for i in range(4)]

    stock.enable_cache(copy.deepcopy(CACHES[cache]))
    expected = steps(stock)
    if first == "cache":
        model.enable_cache(copy.deepcopy(CACHES[cache]))
    report = route_attention(model, config(1.0))
    if first == "routing":
        model.enable_cache(copy.deepcopy(CACHES[cache]))
    close(steps(model), expected, 1e-6 if name == "flux" else 1e-5)
    assert 0 < report.calls.routed < 4 * len(report)


# ---- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_threads_share_a_model(name):
    """Each has its own size, and gets what it would get alone."""
    case = CASES[name]
    model = build(case)
    report = route_attention(model, config())
    sizes = [case.sizes[i % 3] for i in range(8)]
    expected = [run(model, case, size) for size in sizes]
    report.reset_calls()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda size: run(model, case, size), sizes))
    assert all(map(torch.equal, found, expected))
    assert report.calls.routed == len(sizes) * len(case.tokens) and not report.calls.exact


# ---- weights ------------------------------------------------------------------------------------

MOTION = {"block_out_channels": (16, 32), "motion_layers_per_block": 1}
MOTION |= {"motion_norm_num_groups": 2, "motion_num_attention_heads": 2}


def averaged(model, tmp_path):
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)


COPIES = {
    "EMA": averaged,
    "ControlNet": lambda model, _: diffusers.ControlNetModel.from_unet(model),
    "motion": lambda model, _: diffusers.UNetMotionModel.from_unet2d(
        model, diffusers.MotionAdapter(**MOTION)
    ),
    "state dict": lambda model, _: unet().load_state_dict(model.state_dict()),
    "saved": lambda model, path: (
        model.save_pretrained(path),
        diffusers.UNet2DConditionModel.from_pretrained(path),
    ),
}


@pytest.mark.parametrize("use", COPIES.values(), ids=COPIES)
def test_learned_routers_are_no_parameters_of_the_model(use, tmp_path):
    model = build(CASES["sd15"])
    names = [name for name, _ in model.named_parameters()]
    route_attention(model, config(router="learned"))
    assert [name for name, _ in model.named_parameters()] == names
    use(model, tmp_path)


def test_lora_on_all_linear_layers_does_not_meet_the_routers(tmp_path):
    case = CASES["sd15"]
    model = build(case, torch.float32)
    route_attention(model, config(router="learned"))
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "style")
    assert not any(
        "lora" in name
        for layer in routed_layers(model).values()
        for name, _ in layer.attention.named_modules()
    )
    save_routing(model, tmp_path)
    load_routing(build(case, torch.float32), tmp_path)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_linear_layers_of_eight_bits(name):
    case = CASES[name]
    stock = quantize_dynamic(build(case, torch.float32), {torch.nn.Linear}, torch.qint8)
    expected = run(stock, case, dtype=torch.float32)
    report = route_attention(stock, config(1.0))
    # a last bit of a float moves a rounded activation by a whole step
    error = (run(stock, case, dtype=torch.float32) - expected).abs().mean()
    assert error < 0.02 * expected.std() and report.calls.routed == len(case.tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_head_whose_queries_are_zero_is_finite(dtype):
    case = CASES["sd15"]
    model = build(case, dtype)
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attn.to_q.weight.data[: attn.to_q.out_features // attn.heads] = 0
    report = route_attention(model, config())
    assert run(model, case, dtype=dtype).isfinite().all() and report.calls.routed


def eight_bits(model):
    """In the blocks: Wan and Z-Image read the weights of the layers that take the time."""
    names = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.match(r"(\w*_)?(blocks|layers)\.\d", name)
    }
    assert names
    return quantize_dynamic(model, names, torch.qint8)


def offloaded(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return model


def cast(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


TODAY = {  # frames, a mask of keys, a list of maps, text behind the map
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "Flux2Transformer2DModel",
}


@pytest.mark.parametrize("use", [eight_bits, offloaded, cast])
@pytest.mark.parametrize("name", sorted(TODAY))
def test_a_feature_gives_what_it_gives_the_stock_model(name, use):
    stock, model, call = use(tiny(name)), use(tiny(name)), MODELS[name].call(MODELS[name].grid, 2)
    expected = run_tiny(stock, call)
    report = route_attention(model, config(1.0))
    error, scale = run_tiny(model, call) - expected, expected.std()
    if use is eight_bits:  # as above
        assert error.abs().mean() < 0.02 * scale
    else:
        assert error.abs().max() < 1e-5 * max(1, expected.abs().max())
    assert all(calls.routed and not calls.exact for calls in report.layer_calls.values())


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"]
)
def test_compiled_blocks_are_not_compiled_again_at_the_second_call(name):
    model, call = tiny(name), MODELS[name].call(MODELS[name].grid, 2)
    expected = run_tiny(model, call)
    report = route_attention(model, config(1.0))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    close(run_tiny(model, call), expected, 1e-5)
    graphs = counter.frame_count
    close(run_tiny(model, call), expected, 1e-5)
    assert counter.frame_count == graphs > 0 and report.calls.compiled
    torch.compiler.reset()
