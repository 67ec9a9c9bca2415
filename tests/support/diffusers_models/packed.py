"""Tiny models of packed tokens: Flux, Krea, Qwen-Image and their kin."""

import math
from functools import partial

import diffusers
import torch

from tests.support.diffusers_models.tiny import (
    HEADS,
    PACKED,
    TEXT,
    Grid,
    Tiny,
    noise,
    places,
    steps,
    text,
    tokens,
    valid,
)


def flux_like(kind: str, channels: int = 4, **how):
    shared = {"patch_size": 1, "in_channels": channels, "num_layers": 1, "num_single_layers": 1}
    rope = {"joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
    return getattr(diffusers, kind)(**shared | HEADS | rope | how)


def flux_call(grid: Grid, batch: int, channels: int = 4, pooled: bool = False, **more):
    call = {
        "hidden_states": tokens(grid, batch, channels),
        "encoder_hidden_states": text(batch, 16),
        "timestep": steps(batch),
        "img_ids": places(grid),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return call | ({"pooled_projections": noise(batch, 16, seed=3)} if pooled else {}) | more


def fibo_call(grid, batch):
    layers = [text(batch, 16, seed) for seed in (8, 9)]
    return flux_call(grid, batch) | {
        "encoder_hidden_states": text(batch, 32),
        "text_encoder_layers": layers,
    }


def guided_call(grid, batch):
    return flux_call(grid, batch) | {"guidance": steps(batch)}


def chroma_call(grid, batch):
    whole = torch.cat([valid(batch), torch.ones(batch, math.prod(grid), dtype=torch.bool)], 1)
    return flux_call(grid, batch) | {"attention_mask": whole}


def flux2_call(grid, batch):
    ids = places(grid, 4).long().expand(batch, -1, -1)
    return flux_call(grid, batch) | {
        "img_ids": ids,
        "txt_ids": torch.zeros(batch, TEXT, 4, dtype=torch.long),
        "guidance": steps(batch),
    }


def flux3():
    return diffusers.Flux3Transformer2DModel(
        in_channels=4,
        cond_in_channels=4,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        **HEADS,
    )


def flux3_call(grid, batch):
    return flux_call(grid, batch) | {"img_ids": places(grid, 4), "txt_ids": torch.zeros(TEXT, 4)}


def controlnet_flux_call(grid, batch):
    return flux_call(grid, batch, pooled=True) | {"controlnet_cond": tokens(grid, batch, 4)}


def krea2():
    return diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )


def krea2_call(grid, batch):
    return {
        "hidden_states": tokens(grid, batch, 16),
        "encoder_hidden_states": noise(batch, TEXT, 3, 16),
        "timestep": steps(batch),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), places(grid)]),
        "encoder_attention_mask": valid(batch),
    }


_QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_call(grid, batch, **more):
    call = {
        "hidden_states": tokens(grid, batch, 16),
        "encoder_hidden_states": text(batch, 16),
        "encoder_hidden_states_mask": valid(batch),
        "timestep": steps(batch),
        "img_shapes": [[grid]] * batch,
    }
    return call | more


def qwen_controlnet_call(grid, batch):
    return qwen_call(grid, batch) | {"controlnet_cond": tokens(grid, batch, 16)}


def qwen21():
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def qwen21_call(grid, batch):
    slots = torch.zeros(batch, TEXT + math.prod(grid) // 4, dtype=torch.bool)
    slots[:, TEXT:] = True
    return {
        "hidden_states": tokens(grid, batch, 16),
        "encoder_hidden_states": text(batch, 16),
        "timestep": steps(batch),
        "img_shapes": [[grid]] * batch,
        "img_mask": slots,
        "encoder_hidden_states_mask": valid(batch),
    }


def nucleus():
    how = {"moe_enabled": False, "capacity_factors": [8.0]}
    return diffusers.NucleusMoEImageTransformer2DModel(**_QWEN | how)


def nucleus_call(grid, batch):
    return qwen_call(grid, batch) | {"img_shapes": [grid] * batch}


MODELS: dict[str, Tiny] = {
    "BriaFiboTransformer2DModel": Tiny(
        partial(
            flux_like,
            "BriaFiboTransformer2DModel",
            joint_attention_dim=32,
            text_encoder_dim=16,
            pooled_projection_dim=None,
        ),
        fibo_call,
        **PACKED,
    ),
    "BriaTransformer2DModel": Tiny(
        partial(flux_like, "BriaTransformer2DModel", pooled_projection_dim=None),
        flux_call,
        **PACKED,
    ),
    "ChromaTransformer2DModel": Tiny(
        partial(
            flux_like,
            "ChromaTransformer2DModel",
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        chroma_call,
        **PACKED,
    ),
    "Flux2Transformer2DModel": Tiny(
        partial(flux_like, "Flux2Transformer2DModel", axes_dims_rope=(4, 4, 4, 4)),
        flux2_call,
        **PACKED,
    ),
    "Flux3Transformer2DModel": Tiny(flux3, flux3_call, **PACKED),
    "FluxControlNetModel": Tiny(
        partial(flux_like, "FluxControlNetModel", pooled_projection_dim=16),
        controlnet_flux_call,
        **PACKED,
    ),
    "FluxTransformer2DModel": Tiny(
        partial(flux_like, "FluxTransformer2DModel", pooled_projection_dim=16),
        partial(flux_call, pooled=True),
        **PACKED,
    ),
    "Krea2Transformer2DModel": Tiny(krea2, krea2_call, **PACKED),
    "LongCatImageTransformer2DModel": Tiny(
        partial(flux_like, "LongCatImageTransformer2DModel", pooled_projection_dim=16),
        guided_call,
        **PACKED,
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(nucleus, nucleus_call, **PACKED),
    "OvisImageTransformer2DModel": Tiny(
        partial(flux_like, "OvisImageTransformer2DModel", out_channels=4), flux_call, **PACKED
    ),
    "QwenImage21Transformer2DModel": Tiny(
        qwen21, qwen21_call, **PACKED, others=((1, 6, 4), (1, 4, 8), (1, 4, 6))
    ),
    "QwenImageControlNetModel": Tiny(
        lambda: diffusers.QwenImageControlNetModel(**_QWEN), qwen_controlnet_call, **PACKED
    ),
    "QwenImageTransformer2DModel": Tiny(
        lambda: diffusers.QwenImageTransformer2DModel(**_QWEN), qwen_call, **PACKED
    ),
}
"""By the name of the class."""
