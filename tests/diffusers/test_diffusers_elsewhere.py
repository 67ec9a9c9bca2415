"""Routing beside diffusers' other tools: guidance by perturbed attention, caches, threads, copies
of weights; and where the map cannot be told, or tokens are not its own."""

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
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
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
    why_not,
)
from colt5_vision.pipelines.sites import CACHED
from colt5_vision.pipelines.table import LEFT_MODELS
from colt5_vision.swap.report import NEVER_ROUTED
from tests.support.diffusers_cases import (
    CASES,
    arguments,
    build,
    close,
    config,
    noise,
    run,
    spread,
    unet,
)
from tests.support.diffusers_models import MODELS
from tests.support.diffusers_models import build as tiny
from tests.support.diffusers_models import run as run_tiny
from tests.support.diffusers_pipes import ddim, generate, part, pipeline, stable

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


# ---- where the map lies -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 257, 258, 512])
def test_positions_beyond_what_bfloat16_can_count(width, dtype):
    model = tiny("FluxTransformer2DModel").to(dtype)
    report = route_attention(model, config())
    call = MODELS["FluxTransformer2DModel"].call((1, 4, width), 1)
    call = {k: v if v.dtype == torch.int64 else v.to(dtype) for k, v in call.items()}
    run_tiny(model, call)
    assert report.calls.routed == len(report) and not report.calls.exact


def captions(call):
    call["encoder_attention_mask"][1, -2:] = False


def sizes(call):
    call["x"][1] = call["x"][1][..., :-2]


def positions(call):
    call["img_ids"] = call["img_ids"].clone()
    call["img_ids"][1] += 1


ELSEWHERE = {
    "Lumina2Transformer2DModel": captions,
    "ZImageTransformer2DModel": sizes,
    "Flux2Transformer2DModel": positions,
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_maps_at_different_places_are_exact_and_counted(name):
    described, model = MODELS[name], tiny(name)
    call = described.call(described.grid, 2)
    ELSEWHERE[name](call)
    expected, reason = run_tiny(model, call), "maps of the batch differ in size or place"
    report = route_attention(model, config())
    with pytest.warns(RuntimeWarning, match=f"{NEVER_ROUTED}: {reason}"):
        assert torch.equal(run_tiny(model, call), expected)
    assert report.calls.exact == {reason: len(report)} and not report.calls.routed


def test_keys_from_a_cache_of_reference_images_are_exact_and_counted():
    """Flux 2: a reference image in front of the map, then its keys alone. As many tokens as the
    text and the map together, it could be taken for the map."""
    described, model = MODELS["Flux2Transformer2DModel"], tiny("Flux2Transformer2DModel")
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    call = described.call(described.grid, 1)
    text, count = (call[f"{kind}hidden_states"].shape[1] for kind in ("encoder_", ""))
    reference = torch.randn(1, text + count, call["hidden_states"].shape[2])
    ids = torch.zeros(1, text + count, 4, dtype=torch.long)
    ids[..., 0], ids[..., 2] = 10, torch.arange(text + count)
    extract = call | {
        "hidden_states": torch.cat([reference, call["hidden_states"]], 1),
        "img_ids": torch.cat([ids, call["img_ids"]], 1),
        "kv_cache_mode": "extract",
        "num_ref_tokens": text + count,
    }

    def both():
        with torch.no_grad():
            first, cache = model(**extract, return_dict=False)
            how = {"kv_cache": cache, "kv_cache_mode": "cached", "return_dict": False}
            return first, model(**call, **how)[0]

    expected = both()
    report = route_attention(model, config())
    with pytest.warns(RuntimeWarning, match=f"{NEVER_ROUTED}: {CACHED}"):
        found = both()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert report.calls.exact == {CACHED: 3 * len(report)} and not report.calls.routed


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_more_keys_than_queries_are_routed(share):
    """Qwen-Image 2.1 keeps the keys of its text, and asks for the map alone."""
    name = "QwenImage21Transformer2DModel"
    described, model = MODELS[name], tiny(name)
    model.register_to_config(causal_condition=True)
    call = described.call(described.grid, 1)

    def both():
        cache = QwenImage21KVCache(len(model.transformer_blocks))
        modes = ("extract", "cached")
        return [run_tiny(model, call | {"kv_cache": cache, "kv_cache_mode": m}) for m in modes]

    expected = both()
    report = route_attention(model, config(share))
    found = both()
    assert report.calls.routed == 2 * len(report)
    for one, other in zip(found, expected, strict=True):
        if share == 1.0:
            close(one, other, 1e-5)
        else:
            assert (one - other).abs().max() > 1e-4


def test_tokens_that_other_code_has_merged_are_exact_counted_and_told():
    case = CASES["sd15"]
    model = build(case)
    report = route_attention(model, config())
    for block in model.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            inner = block.attn1.forward
            block.attn1.forward = lambda x, *args, inner=inner, **how: inner(
                x[:, ::2], *args, **how
            ).repeat_interleave(2, 1)
    with pytest.warns(RuntimeWarning, match=NEVER_ROUTED):
        run(model, case)
    assert not report.calls.routed and report.calls.exact.total() == len(case.tokens)


def test_the_report_of_a_controlnet_xs_tells_the_tokens_of_the_run():
    described, model = MODELS["UNetControlNetXSModel"], tiny("UNetControlNetXSModel")
    size = described.grid[1:]
    report = route_attention(model, config(), sample_size=size)
    seen = {}
    for name, layer in routed_layers(model).items():
        layer.attention.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: kwargs["grid_size"]}),
            with_kwargs=True,
        )
    run_tiny(model, described.call(described.grid, 1))
    assert {name: h * w for name, (h, w) in seen.items()} == dict(report)
    unroute_attention(model)
    with pytest.raises(ValueError, match="24 tokens: fewer tokens than min_tokens"):
        route_attention(model, config(min_tokens=90), sample_size=size)


def test_objects_that_gligen_adds_are_seen_by_all():
    model = unet(attention_type="gated").double().eval()
    case = CASES["sd15"]
    objects = {
        "boxes": torch.rand(2, 3, 4).double(),
        "positive_embeddings": torch.randn(2, 3, 16).double(),
        "masks": torch.ones(2, 3).double(),
    }
    call = arguments(case) | {"cross_attention_kwargs": {"gligen": objects}}
    with torch.no_grad():
        expected = model(**call).sample
        report = route_attention(model, config(1.0))
        close(model(**call).sample, expected, 1e-8)
    fusers = {name: calls for name, calls in report.layer_calls.items() if "fuser" in name}
    assert len(fusers) == 7 and all(calls.routed for calls in fusers.values())


# ---- what cannot be routed, and says why --------------------------------------------------------


def test_why_not_tells_every_layers_reason():
    found = why_not(build(CASES["sd15"]))
    assert found == CASES["sd15"].exact
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        intermediate_size=32,
        adaln_dim=16,
        llm_features_dim=24,
        mrope_section=(2, 1, 1),
    )
    found = why_not(model)
    assert "where its map lies in the sequence is data" in found[""]
    with pytest.raises(ValueError, match="where its map lies in the sequence is data"):
        route_attention(model)


def test_the_decoder_of_ltx2_says_why_it_is_left():
    with torch.device("meta"):
        left = why_not(LTX2VideoDiffusionDecoderModel())
    layers = {reason for name, reason in left.items() if name}
    assert layers == {LEFT_MODELS["LTX2VideoDiffusionDecoderModel"]}


def flux2_vae():
    how = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    how |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1}
    return diffusers.AutoencoderKLFlux2(**how, up_block_types=("UpDecoderBlock2D",) * 2)


@pytest.mark.parametrize("make", [lambda: part("vae"), flux2_vae], ids=["KL", "Flux 2"])
def test_a_vae_is_routed_alone(make):
    vae = spread(make()).double()
    x = noise(1, 3, 64, 96)
    with torch.no_grad():
        expected = vae(x).sample
        report = route_attention(vae, config(1.0))
        close(vae(x).sample, expected)
    assert set(report) == {"encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"}
    assert all(calls.routed == 1 for calls in report.layer_calls.values())


def test_a_vae_is_left_alone_in_a_pipeline():
    assert all(name.startswith("unet.") for name in route_attention(pipeline("sd15"), config()))


def test_a_modular_pipeline_is_routed():
    pipe = diffusers.ModularPipeline(blocks=diffusers.FluxAutoBlocks())
    pipe.update_components(transformer=build(CASES["flux"]))
    report = route_attention(pipe, config(1.0))
    assert set(report) == {f"transformer.{name}" for name in CASES["flux"].tokens}
    found = run(pipe.transformer, CASES["flux"])
    close(found, run(build(CASES["flux"]), CASES["flux"]))
    assert report.calls.routed == len(report) and not report.calls.exact
    unroute_attention(pipe)
    assert not routed_layers(pipe)
