"""Tiny UNets and their ControlNets."""

from functools import partial

import diffusers
import torch
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

from tests.support.diffusers_models.tiny import Tiny, image, noise, steps, text, valid

_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
UNET = {"layout": "", "argument": "sample", "grid": (1, 8, 12), "others": ((1, 12, 8), (1, 8, 12))}


def unet(**how):
    return diffusers.UNet2DConditionModel(
        **_UNET | {"sample_size": 8, "down_block_types": _CROSS, "up_block_types": _UP} | how
    )


def unet_call(grid, batch, **more):
    call = {
        "sample": image(grid, batch, 4, 1),
        "timestep": torch.tensor(44),
        "encoder_hidden_states": text(batch, 16),
    }
    return call | more


def kandinsky2():
    blocks = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    return unet(**blocks, mid_block_type="UNetMidBlock2DSimpleCrossAttn")


def upscaler():
    """With the blocks of k-diffusion, as in Stable Diffusion's latent upscaler."""
    down, up = ("KCrossAttnDownBlock2D",) * 2, ("KCrossAttnUpBlock2D",) * 2
    return unet(
        down_block_types=("KDownBlock2D", *down),
        up_block_types=(*up, "KUpBlock2D"),
        mid_block_type=None,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_head_dim=8,
        norm_num_groups=None,
        conv_in_kernel=1,
        conv_out_kernel=1,
        act_fn="gelu",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=8,
        resnet_time_scale_shift="scale_shift",
    )


def upscaler_call(grid, batch):
    return unet_call(grid, batch, timestep_cond=noise(batch, 8))


def ddpm():
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def ddpm_call(grid, batch):
    return {"sample": image(grid, batch, 3, 1), "timestep": torch.tensor(44)}


def controlnet(kind, **how):
    conv = {"conditioning_embedding_out_channels": (8, 8), "down_block_types": _CROSS}
    return getattr(diffusers, kind)(**_UNET | conv | how)


def controlnet_call(grid, batch):
    return unet_call(grid, batch) | {"controlnet_cond": image(grid, batch, 3, 2)}


def union():
    how = {
        "num_trans_channel": 16,
        "num_trans_head": 2,
        "num_proj_channel": 16,
        "addition_time_embed_dim": 8,
    }
    how |= {"projection_class_embeddings_input_dim": 48}
    return controlnet("ControlNetUnionModel", **how)


def union_call(grid, batch):
    control = torch.zeros(batch, 6)
    control[:, 0] = 1
    return unet_call(grid, batch) | {
        "controlnet_cond": [image(grid, batch, 3, 2)],
        "control_type": control,
        "control_type_idx": [0],
    }


def controlnet_xs():
    how = {key: value for key, value in _UNET.items() if "layers" not in key and "head" not in key}
    return diffusers.UNetControlNetXSModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        num_attention_heads=2,
        ctrl_block_out_channels=(8, 8),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(2, 2),
        **how,
    )


def motion_call(grid, batch, frames=3):
    return {
        "sample": noise(batch, 4, frames, *grid[1:]),
        "timestep": torch.tensor(44),
        "encoder_hidden_states": text(batch, 16),
    }


def unet_motion():
    how = {key: value for key, value in _UNET.items() if "head" not in key}
    return diffusers.UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        **how,
    )


def unet_motion_call(grid, batch):
    call = motion_call(grid, batch)
    return call | {"encoder_hidden_states": call["encoder_hidden_states"].repeat_interleave(3, 0)}


def unet_3d():
    return diffusers.UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **_UNET,
    )


def i2vgen():
    return diffusers.I2VGenXLUNet(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **_UNET | {"attention_head_dim": 2},
    )


def i2vgen_call(grid, batch):
    return motion_call(grid, batch) | {
        "fps": torch.full((batch,), 8),
        "image_latents": noise(batch, 4, 3, *grid[1:], seed=5),
        "image_embeddings": noise(batch, 16),
    }


def sparse_controlnet():
    return diffusers.SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        conditioning_channels=4,
        motion_num_attention_heads=2,
        **_UNET,
    )


def sparse_call(grid, batch):
    call = unet_motion_call(grid, batch)
    condition = noise(batch, 4, 3, *grid[1:], seed=6)
    return call | {
        "controlnet_cond": condition,
        "conditioning_mask": torch.ones(batch, 1, 3, *grid[1:]),
    }


def svd():
    return diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=2,
        in_channels=4,
        layers_per_block=1,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )


def svd_call(grid, batch):
    return {
        "sample": noise(batch, 2, 4, *grid[1:]),
        "timestep": torch.tensor(44),
        "encoder_hidden_states": noise(batch, 1, 16),
        "added_time_ids": noise(batch, 3),
    }


def dreamlite():
    return DreamLiteUNetModel(
        sample_size=8,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )


def kandinsky3():
    return diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=8,
        encoder_hid_dim=16,
    )


def kandinsky3_call(grid, batch):
    return unet_call(grid, batch) | {"encoder_attention_mask": valid(batch)}


def cascade():
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(blocks, blocks),
        clip_text_pooled_in_channels=16,
        dropout=(0.0, 0.0),
    )


def cascade_call(grid, batch):
    return {
        "sample": image(grid, batch, 4, 1),
        "timestep_ratio": steps(batch),
        "clip_text_pooled": noise(batch, 1, 16),
    }


MODELS: dict[str, Tiny] = {
    "ControlNetModel": Tiny(partial(controlnet, "ControlNetModel"), controlnet_call, **UNET),
    "ControlNetUnionModel": Tiny(union, union_call, **UNET, batch=False),
    "DreamLiteUNetModel": Tiny(dreamlite, unet_call, **UNET),
    "I2VGenXLUNet": Tiny(i2vgen, i2vgen_call, **UNET),
    "Kandinsky3UNet": Tiny(kandinsky3, kandinsky3_call, **UNET),
    "SparseControlNetModel": Tiny(sparse_controlnet, sparse_call, **UNET),
    "StableCascadeUNet": Tiny(cascade, cascade_call, **UNET),
    "UNet2DConditionModel": Tiny(unet, unet_call, **UNET),
    "UNet2DConditionModel-added": Tiny(kandinsky2, unet_call, **UNET),
    "UNet2DConditionModel-k": Tiny(
        upscaler,
        upscaler_call,
        **UNET | {"grid": (1, 16, 24), "others": ((1, 24, 16), (1, 16, 24))},
    ),
    "UNet2DModel": Tiny(ddpm, ddpm_call, **UNET),
    "UNet3DConditionModel": Tiny(unet_3d, motion_call, **UNET),
    "UNetControlNetXSModel": Tiny(controlnet_xs, controlnet_call, **UNET),
    "UNetMotionModel": Tiny(unet_motion, unet_motion_call, **UNET),
    "UNetSpatioTemporalConditionModel": Tiny(svd, svd_call, **UNET),
}
"""By the name of the class."""
