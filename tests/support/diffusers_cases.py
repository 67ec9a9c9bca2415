"""Tiny diffusers models of the families most used, made in memory."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

from colt5_vision import RoutedAttentionConfig

diffusers.utils.logging.set_verbosity_error()
TEXT = 5  # tokens of the text in calls without a tokenizer
WIDTH = 16  # channels of the text


class Case(NamedTuple):
    make: Callable[[], torch.nn.Module]
    conditions: Callable[[int, torch.dtype], dict[str, Any]]
    channels: int
    size: tuple[int, int]
    tokens: dict[str, int]  # routed layers at `size`
    exact: dict[str, str]  # the others at `size`
    sizes: tuple[tuple[int, int], ...] = ((13, 21), (21, 13), (9, 12), (12, 9), (13, 21))


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def spread(model, seed=1):
    """Random weights at which attention is peaked and every part is visible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        asks = any(
            part in name
            for part in ("to_q", "to_k", "add_q", "add_k", "norm_q", "norm_k", "norm_added")
        )
        if parameter.numel() == 0:
            continue
        if parameter.ndim > 1:
            value = (
                value * (2.0 if asks else 1.0) * (parameter.numel() / parameter.shape[0]) ** -0.5
            )
        elif name.endswith("weight"):
            value = (2 if asks else 1) * (1 + 0.2 * value)
        else:
            value = value * 0.2
        parameter.data.copy_(value)
    return model.eval()


def unet(**how):
    plain = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**plain | how)


def sdxl():
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )


def ddpm(**how):
    return diffusers.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }
        | how,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def transformer(kind, **how):
    shared = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
    return kind(**shared | how)


def pixart(**how):
    return transformer(
        diffusers.PixArtTransformer2DModel,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=26,
        use_additional_conditions=False,
        **how,
    )


def dit():
    return transformer(
        diffusers.DiTTransformer2DModel, out_channels=4, sample_size=20, num_embeds_ada_norm=1000
    )


def sd3(**how):
    return transformer(
        diffusers.SD3Transformer2DModel,
        sample_size=26,
        out_channels=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=32,
        **how,
    )


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(**how):
    return transformer(
        diffusers.FluxTransformer2DModel,
        **{"in_channels": 16, "num_single_layers": 2} | how,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def text(batch, dtype, width=WIDTH):
    return {
        "encoder_hidden_states": noise(batch, TEXT, width, seed=7, dtype=dtype),
        "timestep": torch.tensor(500),
    }


def pooled(batch, dtype):
    each = {
        "timestep": torch.full((batch,), 500),
        "pooled_projections": noise(batch, WIDTH, seed=8, dtype=dtype),
    }
    return text(batch, dtype) | each


def added(batch, dtype):
    ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(batch, -1).to(dtype)
    each = {"text_embeds": noise(batch, WIDTH, seed=8, dtype=dtype), "time_ids": ids}
    return text(batch, dtype, 2 * WIDTH) | {"added_cond_kwargs": each}


def classes(batch, dtype):
    return {"timestep": torch.full((batch,), 500), "class_labels": torch.arange(batch)}


def unet_layers(blocks, part="attn1"):
    return {
        f"{name}.transformer_blocks.{i}.{part}": n
        for name, count, n in blocks
        for i in range(count)
    }


SD = (
    ("down_blocks.0.attentions.0", 1, 256),
    ("down_blocks.1.attentions.0", 1, 64),
    ("up_blocks.0.attentions.0", 1, 64),
    ("up_blocks.0.attentions.1", 1, 64),
    ("up_blocks.1.attentions.0", 1, 256),
    ("up_blocks.1.attentions.1", 1, 256),
    ("mid_block.attentions.0", 1, 64),
)
XL = tuple((name, 2, 64) for name, *_ in (SD[1], *SD[2:4], SD[6]))


def cross(layers):
    return dict.fromkeys(unet_layers(layers, "attn2"), "cross-attention")


CASES = {
    "sd15": Case(unet, text, 4, (16, 16), unet_layers(SD), cross(SD)),
    "sd21": Case(
        lambda: unet(use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True),
        text,
        4,
        (16, 16),
        unet_layers(SD),
        cross(SD),
    ),
    "sdxl": Case(sdxl, added, 4, (16, 16), unet_layers(XL), cross(XL)),
    "ddpm": Case(
        ddpm,
        lambda batch, dtype: {"timestep": torch.tensor(500)},
        3,
        (16, 16),
        {
            "down_blocks.1.attentions.0": 64,
            "up_blocks.0.attentions.0": 64,
            "up_blocks.0.attentions.1": 64,
            "mid_block.attentions.0": 64,
        },
        {},
        sizes=((14, 20), (20, 14), (10, 12), (12, 10), (14, 20)),
    ),
    "pixart": Case(
        pixart,
        lambda batch, dtype: text(batch, dtype) | {"timestep": torch.full((batch,), 500)},
        4,
        (26, 26),
        {f"transformer_blocks.{i}.attn1": 169 for i in range(2)},
        {f"transformer_blocks.{i}.attn2": "cross-attention" for i in range(2)},
    ),
    "dit": Case(
        dit,
        classes,
        4,
        (20, 20),
        {f"transformer_blocks.{i}.attn1": 100 for i in range(2)},
        {},
        sizes=((20, 20), (12, 12), (16, 16)),
    ),
    "sd3": Case(
        sd3, pooled, 4, (26, 26), {f"transformer_blocks.{i}.attn": 169 for i in range(2)}, {}
    ),
    "sd35": Case(
        sd35,
        pooled,
        4,
        (26, 26),
        {f"transformer_blocks.{name}": 169 for name in ("0.attn", "0.attn2", "1.attn")},
        {},
    ),
    "flux": Case(
        flux,
        lambda batch, dtype: (
            pooled(batch, dtype) | {"timestep": torch.full((batch,), 0.5, dtype=dtype)}
        ),
        16,
        (26, 42),
        {f"{kind}transformer_blocks.{i}.attn": 273 for kind in ("", "single_") for i in range(2)},
        {},
        sizes=((26, 42), (42, 26), (18, 24), (24, 18), (26, 42)),
    ),
}
every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def some(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


@cache
def _pristine(make):
    torch.manual_seed(0)
    return spread(make())


def build(case, dtype=torch.float64):
    return copy.deepcopy(_pristine(case.make)).to(dtype)


def positions(height, width):
    """img_ids of a map of so many tokens, as Flux's pipelines make them."""
    return diffusers.FluxPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)


def arguments(case, size=None, batch=2, dtype=torch.float64, seed=0):
    """What the model's forward takes at latents of ``size``; Flux gets them packed."""
    height, width = size or case.size
    call = case.conditions(batch, dtype)
    if "single_transformer_blocks.0.attn" in case.tokens:
        tokens = height // 2 * (width // 2)
        packed = {"hidden_states": noise(batch, tokens, case.channels, seed=seed, dtype=dtype)}
        return (
            call
            | packed
            | {"img_ids": positions(height // 2, width // 2), "txt_ids": torch.zeros(TEXT, 3)}
        )
    x = noise(batch, case.channels, height, width, seed=seed, dtype=dtype)
    a_transformer = all(name.startswith("transformer_blocks.") for name in case.tokens)
    return call | {"hidden_states" if a_transformer else "sample": x}


def run(model, case, size=None, **how):
    """The output, without gradients."""
    with torch.no_grad():
        return model(**arguments(case, size, **how), return_dict=False)[0]


def config(share=0.25, **how):
    return RoutedAttentionConfig(
        **{"window_size": 3, "num_heavy_tokens_kv": share, "min_tokens": 1} | how
    )


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
