"""Tiny models of every class of the table, made in memory, and the arguments of their forwards for
a map of so many tokens."""

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

from tests.support.diffusers_cases import spread

diffusers.utils.logging.set_verbosity_error()
Grid = tuple[int, int, int]
TEXT = 5  # tokens of a text


class Tiny(NamedTuple):
    """A model.

    Attributes:
        make: it, with the weights of its class.
        call: arguments of its forward for a map of (T, H, W) tokens, and so many samples.
        layout: axes of the argument that holds the map, ``"BNC"`` of packed tokens; ``""``: other
            layers than attention mix tokens before it, so that no single one can be changed.
        argument: its name.
        grid, others: that it is tried with.
        batch: it takes several samples, independent of each other (ControlNetUnionModel's attend
            to each other).
    """

    make: Callable[[], torch.nn.Module]
    call: Callable[[Grid, int], dict[str, Any]]
    layout: str = "BCHW"
    argument: str = "hidden_states"
    grid: Grid = (1, 4, 6)
    others: tuple[Grid, ...] = ((1, 6, 4), (1, 3, 5), (1, 4, 6))
    batch: bool = True


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator)


def image(grid: Grid, batch: int, channels: int, patch: int = 2) -> torch.Tensor:
    """Latents (B, C, H, W)."""
    return noise(batch, channels, grid[1] * patch, grid[2] * patch)


def video(grid: Grid, batch: int, channels: int, patch: int = 2, frames: int = 1) -> torch.Tensor:
    """Latents (B, C, T, H, W)."""
    t, height, width = grid
    return noise(batch, channels, t * frames, height * patch, width * patch)


def tokens(grid: Grid, batch: int, channels: int) -> torch.Tensor:
    return noise(batch, math.prod(grid), channels)


def text(batch: int, width: int, seed: int = 7, length: int = TEXT) -> torch.Tensor:
    return noise(batch, length, width, seed=seed)


def steps(batch: int, value: float = 0.5) -> torch.Tensor:
    return torch.full((batch,), value)


def valid(batch: int, length: int = TEXT, dtype=torch.bool) -> torch.Tensor:
    """Of several texts, all but the first are two tokens shorter."""
    mask = torch.ones(batch, length, dtype=dtype)
    mask[1:, -2:] = 0
    return mask


def places(grid: Grid, columns: int = 3) -> torch.Tensor:
    """Positions of packed tokens, as Flux's pipelines make them."""
    _, height, width = grid
    ids = torch.zeros(height, width, columns)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.flatten(0, 1)


VIDEO = {"grid": (2, 4, 6), "others": ((2, 6, 4), (3, 3, 5), (1, 4, 6), (2, 4, 6))}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

# ---- Flux and its kin ---------------------------------------------------------------------------


def flux_like(kind: str, channels: int = 4, **how):
    shared = {"patch_size": 1, "in_channels": channels, "num_layers": 1, "num_single_layers": 1}
    rope = {"joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}
    return getattr(diffusers, kind)(**shared | _HEADS | rope | how)


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
        **_HEADS,
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


# ---- Qwen-Image and its kin ---------------------------------------------------------------------

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


# ---- Z-Image, Lumina, Bria Fibo 2 and others with refiners --------------------------------------

_Z = {"all_patch_size": (2,), "all_f_patch_size": (1,), "dim": 32, "n_refiner_layers": 1}
_Z |= {"n_heads": 2, "n_kv_heads": 2, "qk_norm": True}


def z_image():
    rope = {"rope_theta": 256.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    return diffusers.ZImageTransformer2DModel(
        in_channels=16, n_layers=1, cap_feat_dim=16, **_Z | rope
    )


def z_image_call(grid, batch):
    return {
        "x": [video(grid, 1, 16)[0] + i for i in range(batch)],
        "cap_feats": [noise(7 + 30 * i, 16) for i in range(batch)],
        "t": steps(batch),
    }


def z_controlnet():
    how = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
    how |= {"control_in_dim": 16, "add_control_noise_refiner": "control_noise_refiner"}
    controlnet = ZImageControlNetModel(**_Z | how)
    return ZImageControlNetModel.from_transformer(controlnet, z_image())


def z_controlnet_call(grid, batch):
    call = z_image_call(grid, batch)
    control = [x * 0.5 for x in call["x"]]
    return call | {"control_context": control, "cap_feats": call["cap_feats"][:1] * batch}


_LUMINA = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24}
_LUMINA |= {"num_attention_heads": 3, "num_kv_heads": 1, "num_layers": 1}


def lumina2():
    rope = {"axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128), "cap_feat_dim": 32}
    return diffusers.Lumina2Transformer2DModel(
        **_LUMINA, num_refiner_layers=1, multiple_of=2, **rope
    )


def lumina2_call(grid, batch):
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[:, -1] = False
    return {
        "hidden_states": image(grid, batch, 4),
        "encoder_hidden_states": text(batch, 32),
        "timestep": steps(batch),
        "encoder_attention_mask": mask,
    }


def lumina():
    return diffusers.LuminaNextDiT2DModel(
        **_LUMINA, multiple_of=16, learn_sigma=False, cross_attention_dim=32
    )


def lumina_call(grid, batch):
    rope = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(8, 32, 32)
    return {
        "hidden_states": image(grid, batch, 4),
        "encoder_hidden_states": text(batch, 32),
        "timestep": steps(batch),
        "encoder_mask": torch.ones(batch, TEXT),
        "image_rotary_emb": rope,
        "cross_attention_kwargs": {},
    }


def fibo2():
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 32, 32),
    )


def fibo2_call(grid, batch):
    return {
        "hidden_states": image(grid, batch, 4),
        "encoder_hidden_states": noise(batch, 2, TEXT, 16),
        "timestep": steps(batch),
        "encoder_attention_mask": valid(batch),
    }


# ---- images, from latents -----------------------------------------------------------------------


def dit():
    return diffusers.DiTTransformer2DModel(
        num_layers=1, in_channels=4, out_channels=4, sample_size=8, num_embeds_ada_norm=8, **_HEADS
    )


def dit_call(grid, batch):
    each = {"timestep": torch.full((batch,), 9), "class_labels": torch.arange(batch)}
    return {"hidden_states": image(grid, batch, 4)} | each


def pixart():
    return diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        in_channels=4,
        cross_attention_dim=32,
        caption_channels=16,
        use_additional_conditions=False,
        **_HEADS,
    )


def text_call(grid, batch, channels=4, width=16, patch=2, **more):
    call = {
        "hidden_states": image(grid, batch, channels, patch),
        "encoder_hidden_states": text(batch, width),
        "timestep": torch.full((batch,), 44),
    }
    return call | more


_SD3 = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 1, "out_channels": 4}
_SD3 |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "caption_projection_dim": 32}
_SD3 |= {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "pos_embed_max_size": 16} | _HEADS


def sd3_call(grid, batch):
    return text_call(grid, batch) | {"pooled_projections": noise(batch, 16)}


def sd3_controlnet_call(grid, batch):
    return sd3_call(grid, batch) | {"controlnet_cond": image(grid, batch, 4)}


def aura():
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        caption_projection_dim=32,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=256,
        **_HEADS,
    )


def cogview(kind, **how):
    return getattr(diffusers, kind)(
        in_channels=4,
        num_layers=1,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        **_HEADS | how,
    )


def cogview_call(grid, batch):
    size = torch.tensor([[64.0, 64.0]]).expand(batch, -1)
    return text_call(grid, batch) | {
        "original_size": size,
        "target_size": size,
        "crop_coords": size * 0,
    }


def glm_call(grid, batch):
    size = torch.tensor([[64.0, 64.0]]).expand(batch, -1)
    return text_call(grid, batch) | {
        "prior_token_id": torch.full((batch, 1), 44),
        "prior_token_drop": torch.zeros(batch, 1, dtype=torch.bool),
        "target_size": size,
        "crop_coords": size * 0,
    }


def ernie():
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        text_in_dim=16,
        rope_axes_dim=(8, 4, 4),
        qk_layernorm=True,
    )


def ernie_call(grid, batch):
    return {
        "hidden_states": image(grid, batch, 8, 1),
        "timestep": steps(batch),
        "text_bth": text(batch, 16),
        "text_lens": valid(batch).sum(1),
    }


def hidream():
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
        force_inference_output=True,
    )


def hidream_call(grid, batch):
    return {
        "hidden_states": image(grid, batch, 4),
        "encoder_hidden_states_t5": text(batch, 8),
        "encoder_hidden_states_llama3": noise(2, batch, TEXT, 4),
        "pooled_embeds": noise(batch, 8),
        "timesteps": torch.full((batch,), 44),
    }


_HUNYUAN_DIT = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "attention_head_dim": 8}
_HUNYUAN_DIT |= {"num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8}
_HUNYUAN_DIT |= {"pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4}


def hunyuan_dit_call(grid, batch):
    _, height, width = grid
    rope = get_2d_rotary_pos_embed(8, ((0, 0), (height, width)), (height, width), output_type="pt")
    return {
        "hidden_states": image(grid, batch, 4),
        "encoder_hidden_states": noise(batch, 4, 8),
        "text_embedding_mask": torch.ones(batch, 4),
        "encoder_hidden_states_t5": noise(batch, 4, 8),
        "text_embedding_mask_t5": torch.ones(batch, 4),
        "timestep": steps(batch),
        "image_meta_size": torch.ones(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": rope,
    }


def hunyuan_dit_controlnet():
    return diffusers.HunyuanDiT2DControlNetModel(transformer_num_layers=4, **_HUNYUAN_DIT)


def hunyuan_dit_controlnet_call(grid, batch):
    more = {"controlnet_cond": image(grid, batch, 4), "return_dict": False}
    return hunyuan_dit_call(grid, batch) | more


def hunyuan_image():
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(2, 2),
        text_embed_dim=16,
        rope_axes_dim=(8, 8),
        **_HEADS,
    )


def hunyuan_image_call(grid, batch):
    each = {"timestep": steps(batch), "encoder_attention_mask": valid(batch)}
    return text_call(grid, batch) | each


_JOY = {"patch_size": [1, 2, 2], "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2}
_JOY |= {"text_dim": 16, "num_layers": 1, "rope_dim_list": [4, 6, 6], "theta": 256}


def joy_call(grid, batch):
    call = {"encoder_hidden_states": text(batch, 16), "timestep": steps(batch)}
    return call | {"hidden_states": video(grid, batch, 16)}


def joy_plus_call(grid, batch):
    """The map, a second image, and a place that only fills up."""
    count = math.prod(grid) + 4 + 1
    return {
        "hidden_states": noise(batch, count, 16, 1, 2, 2),
        "encoder_hidden_states": text(batch, 16),
        "encoder_hidden_states_mask": valid(batch),
        "timestep": steps(batch),
        "shape_list": [[grid, (1, 2, 2)]] * batch,
    }


def omnigen():
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=1,
        pad_token_id=0,
        vocab_size=100,
        in_channels=4,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )


def omnigen_call(grid, batch):
    """The first token of all but the first text only fills up; a text looks back, the map looks at
    all."""
    length = TEXT + 1 + math.prod(grid)
    mask = torch.ones(length, length).tril().expand(batch, -1, -1).clone()
    mask[:, TEXT + 1 :] = 1
    mask[1:, 1:, 0] = 0
    return {
        "hidden_states": image(grid, batch, 4),
        "timestep": steps(batch),
        "input_ids": torch.arange(1, TEXT + 1).expand(batch, -1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).expand(batch, -1),
    }


def prx():
    return diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=16,
        hidden_size=32,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
    )


def prx_call(grid, batch):
    return text_call(grid, batch) | {"timestep": steps(batch), "attention_mask": valid(batch)}


def uvit():
    return diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=16,
        vocab_size=32,
        codebook_size=24,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        sample_size=8,
    )


def uvit_call(grid, batch):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(0, 24, (batch, *grid[1:]), generator=generator),
        "encoder_hidden_states": text(batch, 16),
        "pooled_text_emb": noise(batch, 16),
        "micro_conds": noise(batch, 5),
    }


# ---- UNets --------------------------------------------------------------------------------------

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


# ---- videos -------------------------------------------------------------------------------------

_WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
_WAN |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
_WAN |= {"num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 32}


def wan(kind="WanTransformer3DModel", **how):
    return getattr(diffusers, kind)(**_WAN | how)


def wan_call(grid, batch, channels=4, **more):
    call = {
        "hidden_states": video(grid, batch, channels),
        "timestep": torch.full((batch,), 44),
        "encoder_hidden_states": text(batch, 16),
    }
    return call | more


def vace_call(grid, batch):
    return wan_call(grid, batch) | {"control_hidden_states": video(grid, batch, 12)}


def animate():
    return wan(
        "WanAnimateTransformer3DModel",
        in_channels=12,
        latent_channels=4,
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )


def animate_call(grid, batch):
    return wan_call(grid, batch, 12) | {
        "encoder_hidden_states_image": text(batch, 16),
        "pose_hidden_states": noise(batch, 4, grid[0] - 1, 2 * grid[1], 2 * grid[2]),
        "face_pixel_values": noise(batch, 3, 4 * grid[0] - 7, 16, 16),
    }


def anyflow_call(grid, batch):
    return wan_call(grid, batch) | {
        "hidden_states": video(grid, batch, 4).transpose(1, 2).contiguous(),
        "timestep": noise(batch, grid[0]).abs(),
        "r_timestep": noise(batch, grid[0], seed=1).abs(),
    }


def anyflow():
    return wan("AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r", freq_dim=256)


_COG = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 16}
_COG |= {"num_layers": 1, "sample_width": 12, "sample_height": 8, "sample_frames": 8}
_COG |= {"patch_size": 2, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True}


def cog_call(grid, batch, **more):
    call = {
        "hidden_states": video(grid, batch, 4).transpose(1, 2).contiguous(),
        "encoder_hidden_states": text(batch, 16),
        "timestep": torch.full((batch,), 44),
    }
    return call | more


def consisid():
    return diffusers.ConsisIDTransformer3DModel(
        cross_attn_interval=1,
        is_kps=False,
        is_train_face=True,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
        **_COG,
        num_attention_heads=2,
        attention_head_dim=16,
    )


def consisid_call(grid, batch):
    return cog_call(grid, batch) | {
        "id_vit_hidden": [noise(batch, 2, 2)],
        "id_cond": noise(batch, 2),
    }


def allegro():
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=16,
    )


_COSMOS = {"num_attention_heads": 2, "attention_head_dim": 12, "mlp_ratio": 2}
_COSMOS |= {"adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2)}
_COSMOS |= {"rope_scale": (2.0, 1.0, 1.0)}


def cosmos():
    how = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 16}
    return diffusers.CosmosTransformer3DModel(**_COSMOS | how, extra_pos_embed_type="learnable")


def cosmos_call(grid, batch):
    padding = torch.zeros(1, 1, 2 * grid[1], 2 * grid[2])
    return wan_call(grid, batch) | {"fps": 30, "padding_mask": padding}


def cosmos_controlnet():
    return diffusers.CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=24,
        text_embed_dim=24,
        extra_pos_embed_type=None,
        img_context_dim_in=24,
        img_context_dim_out=24,
        use_crossattn_projection=False,
        **_COSMOS,
    )


def cosmos_controlnet_call(grid, batch):
    size = (2 * grid[1], 2 * grid[2])
    return {
        "controls_latents": video(grid, batch, 16),
        "latents": video(grid, batch, 16) * 0.5,
        "timestep": steps(batch),
        "encoder_hidden_states": (text(batch, 24), text(batch, 24, length=4)),
        "condition_mask": torch.zeros(batch, 1, grid[0], *size),
        "conditioning_scale": 1.0,
        "padding_mask": torch.zeros(1, 1, *size),
    }


def cosmos3():
    return diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_act="relu2",
        hidden_size=24,
        intermediate_size=24,
        latent_channel=2,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=2,
        rope_axes_dim=[2, 2, 2],
        vocab_size=32,
    )


def cosmos3_call(grid, batch):
    count = math.prod(grid)
    return {
        "input_ids": torch.arange(1, TEXT + 1),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(TEXT + count).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": TEXT + count,
        "vision_tokens": [video(grid, 1, 2, 1)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + count),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + count),
        "vision_timesteps": torch.full((count,), 0.5),
        "vision_noisy_frame_indexes": [torch.arange(grid[0])],
    }


def easy_animate():
    return diffusers.EasyAnimateTransformer3DModel(
        in_channels=4,
        mmdit_layers=1,
        num_layers=1,
        out_channels=4,
        patch_size=2,
        text_embed_dim=16,
        time_embed_dim=8,
        **_HEADS,
    )


def helios():
    how = {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": True, "guidance_cross_attn": True}
    how |= {"zero_history_timestep": True, "is_amplify_history": False}
    settings = {key: value for key, value in (_WAN | how).items() if key != "rope_max_seq_len"}
    return diffusers.HeliosTransformer3DModel(**settings)


def helios_call(grid, batch):
    def history(frames):
        return noise(batch, 4, frames, 2 * grid[1], 2 * grid[2], seed=frames)

    each = {"indices_hidden_states": torch.arange(grid[0]) + 6.0}
    for name, frames in (("short", 1), ("mid", 1), ("long", 4)):
        each[f"latents_history_{name}"] = history(frames)
        each[f"indices_latents_history_{name}"] = torch.arange(frames) + 0.0
    each = {k: v[None].expand(batch, -1) if "indices" in k else v for k, v in each.items()}
    return wan_call(grid, batch) | each


_HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
_HUNYUAN |= {"attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1}
_HUNYUAN |= {"num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16}
_HUNYUAN |= {"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}


def hunyuan_video():
    return diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN, guidance_embeds=True)


def hunyuan_call(grid, batch):
    return wan_call(grid, batch) | {
        "pooled_projections": noise(batch, 8),
        "encoder_attention_mask": valid(batch),
        "guidance": steps(batch),
    }


def framepack():
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_HUNYUAN,
        guidance_embeds=True,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )


def framepack_call(grid, batch):
    def history(frames):
        return noise(batch, 4, frames, 2 * grid[1], 2 * grid[2], seed=frames)

    def index(count):
        return torch.arange(count) + 0.0

    return hunyuan_call(grid, batch) | {
        "image_embeds": text(batch, 16, seed=9, length=3),
        "indices_latents": index(grid[0]),
        "latents_clean": history(2),
        "indices_latents_clean": index(2),
        "latents_history_2x": history(2),
        "indices_latents_history_2x": index(2),
        "latents_history_4x": history(8),
        "indices_latents_history_4x": index(8),
    }


def hunyuan15():
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 8),
        target_size=16,
        **_HEADS,
    )


def hunyuan15_call(grid, batch):
    return wan_call(grid, batch) | {
        "hidden_states": video(grid, batch, 4, 1),
        "timestep": steps(batch),
        "encoder_attention_mask": valid(batch),
        "encoder_hidden_states_2": noise(batch, 4, 8),
        "encoder_attention_mask_2": valid(batch, 4),
        "image_embeds": noise(batch, 3, 12),
    }


def kandinsky5():
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )


def frames_channels_last(grid, batch):
    return video(grid, batch, 4).permute(0, 2, 3, 4, 1).contiguous()


def kandinsky5_call(grid, batch):
    return wan_call(grid, batch) | {
        "hidden_states": frames_channels_last(grid, batch),
        "timestep": steps(batch),
        "pooled_projections": noise(batch, 8),
        "visual_rope_pos": tuple(torch.arange(n) for n in grid),
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6():
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        visual_cond=False,
    )


def kandinsky6_call(grid, batch):
    return wan_call(grid, batch) | {
        "hidden_states": frames_channels_last(grid, batch),
        "timestep": steps(batch),
        "pooled_projections": noise(batch, 8),
    }


def ltx(kind="LTXVideoTransformer3DModel", **how):
    return getattr(diffusers, kind)(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
        **how,
    )


def ltx2():
    return ltx(
        "LTX2VideoTransformer3DModel",
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        rope_double_precision=False,
    )


def ltx_call(grid, batch):
    t, height, width = grid
    return {
        "hidden_states": tokens(grid, batch, 4),
        "encoder_hidden_states": text(batch, 16),
        "timestep": torch.full((batch,), 44),
        "encoder_attention_mask": valid(batch),
        "num_frames": t,
        "height": height,
        "width": width,
    }


def ltx2_call(grid, batch):
    return ltx_call(grid, batch) | {
        "timestep": steps(batch),
        "audio_hidden_states": noise(batch, 9, 4),
        "audio_encoder_hidden_states": text(batch, 16, seed=8),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def latte():
    return diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
        video_length=2,
        **_HEADS,
    )


def latte_call(grid, batch):
    return wan_call(grid, batch) | {"hidden_states": noise(batch, 4, 2, 2 * grid[1], 2 * grid[2])}


def mochi():
    return diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=TEXT,
    )


def mochi_call(grid, batch):
    return wan_call(grid, batch) | {"encoder_attention_mask": valid(batch)}


def motif():
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_decoder_layers=0,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        norm_type="layer_norm",
        text_embed_dim=16,
        image_embed_dim=4,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=False,
        enable_text_cross_attention_single=False,
    )


def motif_call(grid, batch):
    return wan_call(grid, batch) | {"hidden_states": video(grid, batch, 33, 1)}


_V = {"layout": "BCTHW"} | VIDEO
_PACKED = {"layout": "BNC"}

MODELS: dict[str, Tiny] = {
    "AllegroTransformer3DModel": Tiny(allegro, wan_call, **_V),
    "AnyFlowTransformer3DModel": Tiny(anyflow, anyflow_call, **_V | {"layout": "BTCHW"}),
    "AuraFlowTransformer2DModel": Tiny(aura, text_call),
    "BriaFibo2Transformer2DModel": Tiny(fibo2, fibo2_call),
    "BriaFiboTransformer2DModel": Tiny(
        partial(
            flux_like,
            "BriaFiboTransformer2DModel",
            joint_attention_dim=32,
            text_encoder_dim=16,
            pooled_projection_dim=None,
        ),
        fibo_call,
        **_PACKED,
    ),
    "BriaTransformer2DModel": Tiny(
        partial(flux_like, "BriaTransformer2DModel", pooled_projection_dim=None),
        flux_call,
        **_PACKED,
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
        **_PACKED,
    ),
    "ChronoEditTransformer3DModel": Tiny(
        partial(wan, "ChronoEditTransformer3DModel", rope_temporal_skip_len=8), wan_call, **_V
    ),
    "CogVideoXTransformer3DModel": Tiny(
        lambda: diffusers.CogVideoXTransformer3DModel(**_COG, **_HEADS),
        cog_call,
        **_V | {"layout": "BTCHW"},
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        partial(cogview, "CogView3PlusTransformer2DModel", pos_embed_max_size=16, sample_size=8),
        cogview_call,
    ),
    "CogView4Transformer2DModel": Tiny(
        partial(cogview, "CogView4Transformer2DModel"), cogview_call
    ),
    "ConsisIDTransformer3DModel": Tiny(consisid, consisid_call, **_V | {"layout": "BTCHW"}),
    "ControlNetModel": Tiny(partial(controlnet, "ControlNetModel"), controlnet_call, **UNET),
    "ControlNetUnionModel": Tiny(union, union_call, **UNET, batch=False),
    "Cosmos3OmniTransformer": Tiny(
        cosmos3, cosmos3_call, **_V | {"argument": "vision_tokens"}, batch=False
    ),
    "CosmosControlNetModel": Tiny(
        cosmos_controlnet, cosmos_controlnet_call, **_V | {"argument": "controls_latents"}
    ),
    "CosmosTransformer3DModel": Tiny(cosmos, cosmos_call, **_V),
    "DiTTransformer2DModel": Tiny(dit, dit_call, grid=(1, 4, 4), others=((1, 4, 4),)),
    "DreamLiteUNetModel": Tiny(dreamlite, unet_call, **UNET),
    "EasyAnimateTransformer3DModel": Tiny(easy_animate, wan_call, **_V),
    "ErnieImageTransformer2DModel": Tiny(ernie, ernie_call),
    "Flux2Transformer2DModel": Tiny(
        partial(flux_like, "Flux2Transformer2DModel", axes_dims_rope=(4, 4, 4, 4)),
        flux2_call,
        **_PACKED,
    ),
    "Flux3Transformer2DModel": Tiny(flux3, flux3_call, **_PACKED),
    "FluxControlNetModel": Tiny(
        partial(flux_like, "FluxControlNetModel", pooled_projection_dim=16),
        controlnet_flux_call,
        **_PACKED,
    ),
    "FluxTransformer2DModel": Tiny(
        partial(flux_like, "FluxTransformer2DModel", pooled_projection_dim=16),
        partial(flux_call, pooled=True),
        **_PACKED,
    ),
    "GlmImageTransformer2DModel": Tiny(
        partial(cogview, "GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=64),
        glm_call,
    ),
    "HeliosTransformer3DModel": Tiny(helios, helios_call, **_V),
    "HiDreamImageTransformer2DModel": Tiny(hidream, hidream_call),
    "HunyuanDiT2DControlNetModel": Tiny(hunyuan_dit_controlnet, hunyuan_dit_controlnet_call),
    "HunyuanDiT2DModel": Tiny(
        lambda: diffusers.HunyuanDiT2DModel(**_HUNYUAN_DIT, num_layers=1), hunyuan_dit_call
    ),
    "HunyuanImageTransformer2DModel": Tiny(hunyuan_image, hunyuan_image_call),
    "HunyuanVideo15Transformer3DModel": Tiny(hunyuan15, hunyuan15_call, **_V),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(framepack, framepack_call, **_V),
    "HunyuanVideoTransformer3DModel": Tiny(hunyuan_video, hunyuan_call, **_V),
    "I2VGenXLUNet": Tiny(i2vgen, i2vgen_call, **UNET),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        lambda: diffusers.JoyImageEditPlusTransformer3DModel(**_JOY), joy_plus_call, layout="BN"
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        lambda: diffusers.JoyImageEditTransformer3DModel(**_JOY), joy_call, **_V
    ),
    "Kandinsky3UNet": Tiny(kandinsky3, kandinsky3_call, **UNET),
    "Kandinsky5Transformer3DModel": Tiny(kandinsky5, kandinsky5_call, **_V | {"layout": "BTHWC"}),
    "Kandinsky6Transformer3DModel": Tiny(kandinsky6, kandinsky6_call, **_V | {"layout": "BTHWC"}),
    "Krea2Transformer2DModel": Tiny(krea2, krea2_call, **_PACKED),
    "LTX2VideoTransformer3DModel": Tiny(ltx2, ltx2_call, **VIDEO, **_PACKED),
    "LTXVideoTransformer3DModel": Tiny(ltx, ltx_call, **VIDEO, **_PACKED),
    "LatteTransformer3DModel": Tiny(latte, latte_call, layout="BCTHW"),
    "LongCatImageTransformer2DModel": Tiny(
        partial(flux_like, "LongCatImageTransformer2DModel", pooled_projection_dim=16),
        guided_call,
        **_PACKED,
    ),
    "Lumina2Transformer2DModel": Tiny(lumina2, lumina2_call),
    "LuminaNextDiT2DModel": Tiny(lumina, lumina_call),
    "MochiTransformer3DModel": Tiny(mochi, mochi_call, **_V),
    "MotifVideoTransformer3DModel": Tiny(motif, motif_call, **_V),
    "NucleusMoEImageTransformer2DModel": Tiny(nucleus, nucleus_call, **_PACKED),
    "OmniGenTransformer2DModel": Tiny(omnigen, omnigen_call),
    "OvisImageTransformer2DModel": Tiny(
        partial(flux_like, "OvisImageTransformer2DModel", out_channels=4), flux_call, **_PACKED
    ),
    "PRXTransformer2DModel": Tiny(prx, prx_call),
    "PixArtTransformer2DModel": Tiny(pixart, text_call),
    "QwenImage21Transformer2DModel": Tiny(
        qwen21, qwen21_call, **_PACKED, others=((1, 6, 4), (1, 4, 8), (1, 4, 6))
    ),
    "QwenImageControlNetModel": Tiny(
        lambda: diffusers.QwenImageControlNetModel(**_QWEN), qwen_controlnet_call, **_PACKED
    ),
    "QwenImageTransformer2DModel": Tiny(
        lambda: diffusers.QwenImageTransformer2DModel(**_QWEN), qwen_call, **_PACKED
    ),
    "SD3ControlNetModel": Tiny(lambda: diffusers.SD3ControlNetModel(**_SD3), sd3_controlnet_call),
    "SD3Transformer2DModel": Tiny(lambda: diffusers.SD3Transformer2DModel(**_SD3), sd3_call),
    "SkyReelsV2Transformer3DModel": Tiny(
        partial(wan, "SkyReelsV2Transformer3DModel", freq_dim=256), wan_call, **_V
    ),
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
    "UVit2DModel": Tiny(uvit, uvit_call, layout="", argument="input_ids"),
    "WanAnimateTransformer3DModel": Tiny(
        animate, animate_call, layout="BCTHW", grid=(3, 2, 2), others=((3, 2, 3), (3, 2, 2))
    ),
    "WanTransformer3DModel": Tiny(wan, wan_call, **_V),
    "WanVACETransformer3DModel": Tiny(
        partial(wan, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=12),
        vace_call,
        **_V,
    ),
    "ZImageControlNetModel": Tiny(z_controlnet, z_controlnet_call, layout="BCTHW", argument="x"),
    "ZImageTransformer2DModel": Tiny(z_image, z_image_call, layout="BCTHW", argument="x"),
}
"""By the name of the class."""


@cache
def _pristine(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return spread(MODELS[name].make())


def build(name: str) -> torch.nn.Module:
    return copy.deepcopy(_pristine(name))


def run(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """All outputs of a model in one row, without gradients."""
    with torch.no_grad():
        return torch.cat([x.flatten() for x in outputs(model(**call))])


def outputs(out: Any) -> list[torch.Tensor]:
    """The tensors in what a model returns."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (list, tuple)):
        return [x for one in out for x in outputs(one)]
    return []
