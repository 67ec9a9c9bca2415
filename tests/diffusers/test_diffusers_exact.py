"""Where the map of diffusers' layers cannot be told, or tokens are not its own: routed, or exact,
counted and told why."""

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from colt5_vision import route_attention, routed_layers, unroute_attention, why_not
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
from tests.support.diffusers_pipes import part, pipeline

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
