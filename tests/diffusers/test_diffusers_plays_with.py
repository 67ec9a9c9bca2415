"""Whole pipelines with routing beside what diffusers offers: the stock's output at 1.0, another one
at 1/4."""

import diffusers
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_align_device_hook,
)
from peft import LoraConfig

from colt5_vision import (
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
    noise,
    run,
    spread,
)
from tests.support.diffusers_pipes import EMBED, generate, ip_adapter, pipeline, stable

CPU = torch.device("cpu")
IMAGE = (noise(1, 3, 104, 168, seed=5) + 3).div(6).clamp(0, 1)


def part_of(pipe):
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def nothing(pipe):
    pass


def adapter(model, name, seed):
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), name)


def lora(pipe):
    adapter(part_of(pipe), "style", 0)


def two_loras(pipe):
    lora(pipe)
    adapter(part_of(pipe), "subject", 1)
    pipe.set_adapters(["style", "subject"], [0.5, 1.5])


def ip(pipe):
    ip_adapter(part_of(pipe))


def fused(pipe):
    part_of(pipe).fuse_qkv_projections()


def vae(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    """What enable_sequential_cpu_offload puts on each leaf; accelerate's own call cannot take the
    CPU to run on."""
    for model in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
        attach_align_device_hook(model, execution_device=CPU, offload=True, weights_map=weights)
        assert all(parameter.is_meta for parameter in model.parameters())


def group_offload(kind):
    def offload(pipe):
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        part_of(pipe).enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type=kind, **more
        )

    return offload


def casting(pipe):
    part_of(pipe).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64
    )


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def unguided(pipe, step, time, tensors):
    pipe._guidance_scale = 1.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if step == 0 else {}


def controlnet():
    net = diffusers.ControlNetModel.from_unet(build(CASES["sd15"]))
    return stable(diffusers.StableDiffusionControlNetPipeline, controlnet=spread(net, seed=2))


def img2img():
    return stable(diffusers.StableDiffusionImg2ImgPipeline)


def inpaint():
    return stable(diffusers.StableDiffusionInpaintPipeline)


HINT = {"ip_adapter_image_embeds": [noise(2, 1, EMBED)]}
FLUX_HINT = {
    f"{sign}ip_adapter_image_embeds": [noise(1, 1, EMBED, seed=i)]
    for i, sign in enumerate(("", "negative_"))
}
MASK = (torch.arange(168) > 80).double().expand(1, 1, 104, 168)
FREE = {"height": None, "width": None}
OFF = {"guidance_scale": 1.0}
PICTURE = {"output_type": "pt", "num_images_per_prompt": 2}
BEFORE, AFTER = True, False  # of enabling
WAYS = {
    "guidance": ("sd15", nothing, {"guidance_scale": 7.0}, BEFORE),
    "no guidance": ("sd15", nothing, OFF, BEFORE),
    "guidance that a callback ends": (
        "sd15",
        nothing,
        {"callback_on_step_end": unguided, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        BEFORE,
    ),
    "several images": ("sdxl", nothing, {"num_images_per_prompt": 2}, BEFORE),
    "guidance rescale": ("sdxl", nothing, {"guidance_rescale": 0.7}, BEFORE),
    "lora": ("sd15", lora, {}, BEFORE),
    "lora later": ("sd15", lora, {}, AFTER),
    "lora scaled": ("sd15", lora, {"cross_attention_kwargs": {"scale": 0.3}}, AFTER),
    "loras sdxl": ("sdxl", two_loras, {}, BEFORE),
    "loras sdxl later": ("sdxl", two_loras, {}, AFTER),
    "lora sd3": ("sd35", lora, {"joint_attention_kwargs": {"scale": 0.3}}, BEFORE),
    "loras flux": ("flux", two_loras, {}, BEFORE),
    "lora flux later": ("flux", lora, {"joint_attention_kwargs": {"scale": 0.3}}, AFTER),
    "ip-adapter": ("sd15", ip, HINT, BEFORE),
    "ip-adapter sdxl": ("sdxl", ip, HINT, BEFORE),
    "ip-adapter flux": ("flux", ip, FLUX_HINT, BEFORE),
    "controlnet": (controlnet, nothing, {"image": IMAGE}, BEFORE),
    "img2img": (img2img, nothing, {"image": IMAGE, "strength": 1.0}, BEFORE),
    "inpaint": (inpaint, nothing, {"image": IMAGE, "mask_image": MASK, "strength": 1.0}, BEFORE),
    "vae slicing and tiling": ("sd15", vae, PICTURE, BEFORE),
    "vae slicing and tiling later": ("sd15", vae, PICTURE, AFTER),
    "fused": ("sd15", fused, {}, BEFORE),
    "fused pixart": ("pixart", fused, {}, BEFORE),
    "fused sd3": ("sd3", fused, {}, BEFORE),
    "fused flux": ("flux", fused, {}, BEFORE),
    "freeu": ("sd15", freeu, {}, AFTER),
    "model offload": ("sd15", model_offload, {}, AFTER),
    "model offload first": ("sdxl", model_offload, {}, BEFORE),
    "sequential offload": ("sd15", sequential_offload, {}, AFTER),
    "sequential offload first": ("sd15", sequential_offload, {}, BEFORE),
    "sequential offload flux": ("flux", sequential_offload, {}, AFTER),
    "sequential offload sd3": ("sd35", sequential_offload, {}, AFTER),
    "blocks offloaded": ("sd15", group_offload("block_level"), {}, AFTER),
    "blocks offloaded flux": ("flux", group_offload("block_level"), {}, AFTER),
    "blocks offloaded first": ("pixart", group_offload("block_level"), {}, BEFORE),
    "leaves offloaded": ("sd15", group_offload("leaf_level"), {}, AFTER),
    "leaves offloaded sd3": ("sd35", group_offload("leaf_level"), {}, AFTER),
    "leaves offloaded first": ("flux", group_offload("leaf_level"), {}, BEFORE),
    "casting": ("sd15", casting, {}, AFTER),
    "casting first": ("sdxl", casting, {}, BEFORE),
    "casting flux": ("flux", casting, {}, AFTER),
    "casting pixart": ("pixart", casting, {}, BEFORE),
}


def made(name):
    if isinstance(name, str):
        return pipeline(name)
    pipe = name()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def result(pipe, name, call):
    """Img2img and inpainting take their size from the image."""
    drop = FREE if name is img2img else {}
    return generate(pipe, name if isinstance(name, str) else "sd15", **call, drop=drop)


@pytest.mark.parametrize(("name", "prepare", "call", "first"), WAYS.values(), ids=WAYS)
def test_a_run_is_the_stock_pipelines_when_every_key_is_routed_and_differs_at_a_quarter(
    name, prepare, call, first
):
    stock = made(name)
    prepare(stock)
    expected = result(stock, name, call)
    assert expected.isfinite().all() and expected.std() > 0.1
    for share in (1.0, 0.25):
        pipe = made(name)
        if first:
            prepare(pipe)
        report = route_attention(pipe, config(share, router="learned"))
        if not first:
            prepare(pipe)
        found = result(pipe, name, call)
        assert set(routed_layers(pipe)) == set(report) != set()
        if share == 1.0:
            close(found, expected)
    assert (found - expected).abs().max() > 1e-2 and found.isfinite().all()


def test_a_controlnet_is_routed_with_its_unet():
    report = route_attention(made(controlnet), config())
    names = {name for name in CASES["sd15"].tokens if not name.startswith("up_blocks.")}
    assert {name.partition(".")[2] for name in report if name.startswith("controlnet.")} == names
    assert {name.partition(".")[2] for name in report if name.startswith("unet.")} == set(
        CASES["sd15"].tokens
    )


CONTROLNETS = {
    "sd3": lambda model: diffusers.SD3ControlNetModel.from_transformer(
        model, num_layers=1, num_extra_conditioning_channels=0
    ),
    "flux": lambda model: diffusers.FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16
    ),
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_of_transformers_are_the_stock_ones_when_every_key_is_routed(name):
    case = CASES[name]
    net = spread(CONTROLNETS[name](build(case)), seed=2).double()
    given = arguments(case, case.sizes[0])
    call = given | {"controlnet_cond": given["hidden_states"], "return_dict": False}
    with torch.no_grad():
        expected = net(**call)
        routed = []
        for share in (1.0, 0.25):
            route_attention(net, config(share))
            routed.append(net(**call))
            unroute_attention(net)
    assert expected[0][0].std() > 0.1
    close(routed[0], expected)
    assert (routed[1][0][0] - expected[0][0]).abs().max() > 1e-3


def trained(model):
    for layer in routed_layers(model).values():
        torch.nn.init.normal_(layer.attention.correction[2].weight, std=3)
    return model


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_learned_router_is_kept_in_use_when_the_model_is_cast(name, compute):
    case = CASES[name]
    plain, model = build(case, compute), build(case, compute)
    route_attention(plain, config())
    torch.manual_seed(0)
    route_attention(model, config(router="learned"))
    uncast = run(trained(model), case, dtype=compute)
    for each in (plain, model):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    found, other = (run(each, case, dtype=compute) for each in (model, plain))
    assert found.dtype == other.dtype == compute and found.isfinite().all()
    assert (found - other).abs().max() > 1e-2
    assert (found - uncast).abs().mean() < uncast.std()


def test_sliced_attention_is_the_stock_models_and_counted():
    """It computes its softmax itself, and nothing can be routed."""
    stock, pipe = pipeline("sd15"), pipeline("sd15")
    report = route_attention(pipe, config())
    for one in (stock, pipe):
        one.enable_attention_slicing("max")
    with pytest.warns(RuntimeWarning, match="no call of torch's scaled_dot_product_attention"):
        found = generate(pipe)
    assert torch.equal(found, generate(stock)) and not report.calls.routed
    pipe.disable_attention_slicing()
    generate(pipe)
    assert report.calls.routed


@pytest.mark.parametrize(
    "prepare", [sequential_offload, group_offload("leaf_level"), group_offload("block_level")]
)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_learned_router_is_offloaded_and_kept_in_use(name, prepare):
    outs = []
    for offloaded in (False, True):
        pipe = pipeline(name)
        torch.manual_seed(0)
        route_attention(pipe, config(router="learned"))
        trained(pipe)
        if offloaded:
            prepare(pipe)
        outs.append(generate(pipe, name))
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux"])
def test_adapters_come_and_go_while_routed(name):
    case, stock, model = CASES[name], build(CASES[name]), build(CASES[name])
    route_attention(model, config(1.0))
    for each in (stock, model):
        adapter(each, "style", 0)
    with_adapter = run(stock, case)
    close(run(model, case), with_adapter)
    for each in (stock, model):
        each.disable_adapters()
    assert (run(stock, case) - with_adapter).abs().max() > 1e-2
    close(run(model, case), run(stock, case))
    for each in (stock, model):
        each.delete_adapters("style")
    unroute_attention(model)
    assert torch.equal(run(model, case), run(stock, case))


def test_a_callback_may_switch_routing_off_in_the_middle_of_a_run():
    def stop(pipe, step, time, tensors):
        if step == 0:
            unroute_attention(pipe)
        return {}

    switched, scheduled = pipeline("sd15"), pipeline("sd15")
    route_attention(switched, config())
    route_attention(scheduled, config(schedule=[{"max_timestep": 100, "full": True}]))
    found = generate(switched, callback_on_step_end=stop)
    assert routed_layers(switched) == {}
    assert torch.equal(found, generate(scheduled))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_a_callback_sees_the_stock_pipelines_latents_after_each_step(name):
    seen = []

    def keep(pipe, step, time, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    pipe = pipeline(name)
    generate(pipe, name, callback_on_step_end=keep)
    route_attention(pipe, config(1.0))
    generate(pipe, name, callback_on_step_end=keep)
    assert len(seen) == 4
    close(seen[2:], seen[:2])
