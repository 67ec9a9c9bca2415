"""Tiny diffusers pipelines of the families most used, made in memory."""

import copy
from functools import cache

import diffusers
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.support.diffusers_cases import CASES, TEXT, WIDTH, build, noise, spread


@cache
def _parts():
    """Autoencoder, text encoders and tokenizer, as many times smaller than latents as the real
    ones."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    return {
        "vae": spread(vae),
        "text_encoder": spread(CLIPTextModel(text)),
        "text_encoder_2": spread(CLIPTextModelWithProjection(text), seed=2),
        "tokenizer": CLIPTokenizer(vocabulary, [], model_max_length=77),
    }


def part(name):
    return copy.deepcopy(_parts()[name])


def ddim(**how):
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **how
    )


def stable(kind=diffusers.StableDiffusionPipeline, case="sd15", scheduler=None, **more):
    parts = {name: part(name) for name in ("vae", "text_encoder", "tokenizer")}
    parts |= {
        "unet": build(CASES[case]),
        "scheduler": scheduler or ddim(clip_sample=False, set_alpha_to_one=False),
    }
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**parts | more)


def embeddings(*negative):
    """Conditions of pipelines without text encoders."""
    call = {
        f"{sign}prompt_embeds": noise(1, TEXT, WIDTH, seed=i)
        for i, sign in enumerate(("", *negative))
    }
    return call | {"height": 208, "width": 336, "guidance_scale": 3.0}


def pooled_embeddings(*negative):
    return {
        f"{sign}pooled_prompt_embeds": noise(1, WIDTH, seed=i + 5)
        for i, sign in enumerate(("", *negative))
    }


def make_pipe(name):
    if name in ("sd15", "sd21"):
        later = diffusers.PNDMScheduler(
            skip_prk_steps=True, steps_offset=1, prediction_type="v_prediction"
        )
        return stable(case=name, scheduler=later if name == "sd21" else None)
    if name == "sdxl":
        parts = {
            name: part(name) for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer")
        }
        parts |= {"tokenizer_2": part("tokenizer"), "unet": build(CASES[name])}
        return diffusers.StableDiffusionXLPipeline(
            **parts, scheduler=diffusers.EulerDiscreteScheduler()
        )
    if name == "ddpm":
        return diffusers.DDPMPipeline(build(CASES[name]), diffusers.DDPMScheduler())
    model = build(CASES[name])
    if name == "dit":
        return diffusers.DiTPipeline(model, part("vae"), ddim())
    none = {f"{kind}{i}": None for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    if name == "pixart":
        return diffusers.PixArtAlphaPipeline(
            None, None, part("vae"), model, diffusers.DPMSolverMultistepScheduler()
        )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    if name in ("sd3", "sd35"):
        return diffusers.StableDiffusion3Pipeline(model, flow, part("vae"), **none)
    none = {name: None for name in none if not name.endswith("_3")}
    return diffusers.FluxPipeline(vae=part("vae"), transformer=model, scheduler=flow, **none)


def pipeline(name):
    pipe = make_pipe(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


PROMPT = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "guidance_scale": 3.0,
    "height": 104,
    "width": 168,
}
NEGATIVE = "negative_"
MASKS = {f"{sign}prompt_attention_mask": torch.ones(1, TEXT) for sign in ("", NEGATIVE)}
CALLS = {
    "sd15": PROMPT,
    "sd21": PROMPT,
    "sdxl": PROMPT,
    "ddpm": {},
    "dit": {"class_labels": [3], "guidance_scale": 3.0},
    "pixart": embeddings(NEGATIVE)
    | MASKS
    | {"negative_prompt": None, "use_resolution_binning": False},
    "sd3": embeddings(NEGATIVE) | pooled_embeddings(NEGATIVE),
    "sd35": embeddings(NEGATIVE) | pooled_embeddings(NEGATIVE),
    "flux": embeddings() | pooled_embeddings(),
}
every_pipeline = pytest.mark.parametrize("name", CALLS)


def generate(pipe, name="sd15", drop=(), **how):
    """Two steps; latents where the pipeline can give them."""
    call = CALLS[name] | {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    call |= {"output_type": "np"} if name in ("ddpm", "dit") else {"output_type": "latent"}
    return torch.as_tensor(
        pipe(**{key: value for key, value in (call | how).items() if key not in drop})[0]
    )


EMBED = 8  # channels of an IP-Adapter's image


def ip_adapter(model):
    """Load a random IP-Adapter into a UNet or Flux, as their pipelines' load_ip_adapter does."""
    flux = isinstance(model, diffusers.FluxTransformer2DModel)
    joint = model.config.joint_attention_dim if flux else model.config.cross_attention_dim
    names = [
        n
        for n in model.attn_processors
        if not n.startswith("single") and (flux or n.endswith("attn2.processor"))
    ]
    weights = {}
    for i, name in enumerate(names):
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for letter in "kv":
            key = f"{i if flux else 2 * i + 1}.to_{letter}_ip"
            weights[f"{key}.weight"] = noise(width, joint, seed=i + ord(letter)) * joint**-0.5
            weights |= {f"{key}.bias": noise(width, seed=i)} if flux else {}
    project = {
        "proj.weight": noise(4 * joint, EMBED, seed=3),
        "proj.bias": noise(4 * joint, seed=4),
    }
    project |= {"norm.weight": torch.ones(joint).double(), "norm.bias": torch.zeros(joint).double()}
    model._load_ip_adapter_weights(
        [{"image_proj": project, "ip_adapter": weights}], low_cpu_mem_usage=False
    )
    return model.to(torch.float64)
