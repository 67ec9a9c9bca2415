"""Tiny models of videos without a text in the sequence, or in front: Wan, CogVideoX, Cosmos."""

import math
from functools import partial

import diffusers
import torch

from tests.support.diffusers_models.tiny import HEADS, TEXT, VOLUME, Tiny, noise, steps, text, video

WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
WAN |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
WAN |= {"num_layers": 1, "cross_attn_norm": True, "rope_max_seq_len": 32}


def wan(kind="WanTransformer3DModel", **how):
    return getattr(diffusers, kind)(**WAN | how)


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


MODELS: dict[str, Tiny] = {
    "AllegroTransformer3DModel": Tiny(allegro, wan_call, **VOLUME),
    "AnyFlowTransformer3DModel": Tiny(anyflow, anyflow_call, **VOLUME | {"layout": "BTCHW"}),
    "ChronoEditTransformer3DModel": Tiny(
        partial(wan, "ChronoEditTransformer3DModel", rope_temporal_skip_len=8), wan_call, **VOLUME
    ),
    "CogVideoXTransformer3DModel": Tiny(
        lambda: diffusers.CogVideoXTransformer3DModel(**_COG, **HEADS),
        cog_call,
        **VOLUME | {"layout": "BTCHW"},
    ),
    "ConsisIDTransformer3DModel": Tiny(consisid, consisid_call, **VOLUME | {"layout": "BTCHW"}),
    "Cosmos3OmniTransformer": Tiny(
        cosmos3, cosmos3_call, **VOLUME | {"argument": "vision_tokens"}, batch=False
    ),
    "CosmosControlNetModel": Tiny(
        cosmos_controlnet, cosmos_controlnet_call, **VOLUME | {"argument": "controls_latents"}
    ),
    "CosmosTransformer3DModel": Tiny(cosmos, cosmos_call, **VOLUME),
    "SkyReelsV2Transformer3DModel": Tiny(
        partial(wan, "SkyReelsV2Transformer3DModel", freq_dim=256), wan_call, **VOLUME
    ),
    "WanAnimateTransformer3DModel": Tiny(
        animate, animate_call, layout="BCTHW", grid=(3, 2, 2), others=((3, 2, 3), (3, 2, 2))
    ),
    "WanTransformer3DModel": Tiny(wan, wan_call, **VOLUME),
    "WanVACETransformer3DModel": Tiny(
        partial(wan, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=12),
        vace_call,
        **VOLUME,
    ),
}
"""By the name of the class."""
