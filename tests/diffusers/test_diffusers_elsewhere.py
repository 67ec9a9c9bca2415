"""Routing beside diffusers' other tools: guidance by perturbed attention, caches, threads, copies
of weights; and where the map cannot be told, or tokens are not its own."""

import copy
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
from colt5_vision.swap.report import NEVER_ROUTED
from tests.support.diffusers_cases import CASES, arguments, build, close, config, run, unet
from tests.support.diffusers_models import MODELS
from tests.support.diffusers_models import build as tiny
from tests.support.diffusers_models import run as run_tiny
from tests.support.diffusers_pipes import ddim, generate, part, pipeline, stable

# ---- guidance -----------------------------------------------------------------------------------

GUIDED = {
    "pag": (
        diffusers.StableDiffusionPAGPipeline,
        {"pag_applied_layers": ["mid"]},
        {"pag_scale": 3.0},
    ),
    "sag": (diffusers.StableDiffusionSAGPipeline, {}, {"sag_scale": 0.5, "height": 128}),
}


@pytest.mark.parametrize(("kind", "more", "how"), GUIDED.values(), ids=GUIDED)
def test_pipelines_that_assign_processors_run(kind, more, how):
    pipe = stable(kind, scheduler=ddim(clip_sample=False, set_alpha_to_one=False), **more)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float64)
    expected = generate(pipe, **how)
    report = route_attention(pipe, config(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # perturbed attention is not routed
        close(generate(pipe, **how), expected, 1e-7)
    assert report.calls.routed
    unroute_attention(pipe)
    assert torch.equal(generate(pipe, **how), expected)


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
    "taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
    "mag": MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4), retention_ratio=0.25),
}


@pytest.mark.parametrize("first", ["cache", "routing"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_gives_what_it_gives_the_stock_model(cache, first):
    case = CASES["flux"]

    def steps(model):
        with model.cache_context("cond") if cache != "pyramid" else warnings.catch_warnings():
            return [run(model, case, seed=step // 2) for step in range(4)]

    stock, model = build(case), build(case)
    stock.enable_cache(copy.deepcopy(CACHES[cache]))
    expected = steps(stock)
    if first == "cache":
        model.enable_cache(copy.deepcopy(CACHES[cache]))
    report = route_attention(model, config(1.0))
    if first == "routing":
        model.enable_cache(copy.deepcopy(CACHES[cache]))
    close(steps(model), expected, 1e-6)
    assert 0 < report.calls.routed < 4 * len(case.tokens)


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


def test_compiled_blocks_are_not_compiled_again_at_the_second_call():
    case = CASES["flux"]
    model = build(case)
    report = route_attention(model, config())
    expected = run(model, case)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    close(run(model, case), expected)
    graphs = counter.frame_count
    close(run(model, case), expected)
    assert counter.frame_count == graphs > 0 and report.calls.routed == len(report)
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


def test_a_vae_is_routed_alone_and_left_alone_in_a_pipeline():
    vae = part("vae").eval()
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(x).sample
        report = route_attention(vae, config(1.0))
        close(vae.decode(x).sample, expected, 1e-4)
    assert set(report) == {"encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"}
    assert report.layer_calls["decoder.mid_block.attentions.0"].routed
    assert all(name.startswith("unet.") for name in route_attention(pipeline("sd15"), config()))


def test_a_modular_pipeline_is_routed():
    pipe = diffusers.ModularPipeline(blocks=diffusers.FluxAutoBlocks())
    pipe.update_components(transformer=build(CASES["flux"]))
    report = route_attention(pipe, config())
    assert set(report) == {f"transformer.{name}" for name in CASES["flux"].tokens}
    unroute_attention(pipe)
    assert not routed_layers(pipe)
