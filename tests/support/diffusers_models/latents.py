"""Tiny models of images that are given latents."""

import math
from functools import partial

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from tests.support.diffusers_models.tiny import (
    HEADS,
    TEXT,
    VOLUME,
    Tiny,
    image,
    noise,
    places,
    steps,
    text,
    tokens,
    valid,
    video,
)


def dit():
    return diffusers.DiTTransformer2DModel(
        num_layers=1, in_channels=4, out_channels=4, sample_size=8, num_embeds_ada_norm=8, **HEADS
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
        **HEADS,
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
_SD3 |= {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "pos_embed_max_size": 16} | HEADS


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
        **HEADS,
    )


def cogview(kind, **how):
    return getattr(diffusers, kind)(
        in_channels=4,
        num_layers=1,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        **HEADS | how,
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


def hidream_patches_call(grid, batch):
    """Patches that are filled up to the model's number of them, and how many rows and columns."""
    patches, ids = torch.zeros(batch, 64, 16), torch.zeros(batch, 64, 3)
    count = math.prod(grid)
    patches[:, :count], ids[:, :count] = tokens(grid, batch, 16), places(grid)
    return hidream_call(grid, batch) | {
        "hidden_states": patches,
        "hidden_states_masks": (torch.arange(64) < count).float().expand(batch, -1),
        "img_ids": ids,
        "img_sizes": [grid[1:]] * batch,
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
        **HEADS,
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


MODELS: dict[str, Tiny] = {
    "AuraFlowTransformer2DModel": Tiny(aura, text_call),
    "CogView3PlusTransformer2DModel": Tiny(
        partial(cogview, "CogView3PlusTransformer2DModel", pos_embed_max_size=16, sample_size=8),
        cogview_call,
    ),
    "CogView4Transformer2DModel": Tiny(
        partial(cogview, "CogView4Transformer2DModel"), cogview_call
    ),
    "DiTTransformer2DModel": Tiny(dit, dit_call, grid=(1, 4, 4), others=((1, 4, 4),)),
    "ErnieImageTransformer2DModel": Tiny(ernie, ernie_call),
    "GlmImageTransformer2DModel": Tiny(
        partial(cogview, "GlmImageTransformer2DModel", prior_vq_quantizer_codebook_size=64),
        glm_call,
    ),
    "HiDreamImageTransformer2DModel": Tiny(hidream, hidream_call),
    "HiDreamImageTransformer2DModel-patches": Tiny(hidream, hidream_patches_call, layout="BN"),
    "HunyuanDiT2DControlNetModel": Tiny(hunyuan_dit_controlnet, hunyuan_dit_controlnet_call),
    "HunyuanDiT2DModel": Tiny(
        lambda: diffusers.HunyuanDiT2DModel(**_HUNYUAN_DIT, num_layers=1), hunyuan_dit_call
    ),
    "HunyuanImageTransformer2DModel": Tiny(hunyuan_image, hunyuan_image_call),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        lambda: diffusers.JoyImageEditPlusTransformer3DModel(**_JOY), joy_plus_call, layout="BN"
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        lambda: diffusers.JoyImageEditTransformer3DModel(**_JOY), joy_call, **VOLUME
    ),
    "OmniGenTransformer2DModel": Tiny(omnigen, omnigen_call),
    "PRXTransformer2DModel": Tiny(prx, prx_call),
    "PixArtTransformer2DModel": Tiny(pixart, text_call),
    "SD3ControlNetModel": Tiny(lambda: diffusers.SD3ControlNetModel(**_SD3), sd3_controlnet_call),
    "SD3Transformer2DModel": Tiny(lambda: diffusers.SD3Transformer2DModel(**_SD3), sd3_call),
    "UVit2DModel": Tiny(uvit, uvit_call, layout="", argument="input_ids"),
}
"""By the name of the class."""
