"""Tiny models of videos: EasyAnimate, HunyuanVideo, Kandinsky, LTX, Mochi and others."""

import diffusers
import torch

from tests.support.diffusers_models.tiny import (
    HEADS,
    PACKED,
    TEXT,
    VIDEO,
    VOLUME,
    Tiny,
    noise,
    steps,
    text,
    tokens,
    valid,
    video,
)
from tests.support.diffusers_models.videos import WAN, wan_call


def easy_animate():
    return diffusers.EasyAnimateTransformer3DModel(
        in_channels=4,
        mmdit_layers=1,
        num_layers=1,
        out_channels=4,
        patch_size=2,
        text_embed_dim=16,
        time_embed_dim=8,
        **HEADS,
    )


def helios():
    how = {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": True, "guidance_cross_attn": True}
    how |= {"zero_history_timestep": True, "is_amplify_history": False}
    settings = {key: value for key, value in (WAN | how).items() if key != "rope_max_seq_len"}
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
        **HEADS,
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
        **HEADS,
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


MODELS: dict[str, Tiny] = {
    "EasyAnimateTransformer3DModel": Tiny(easy_animate, wan_call, **VOLUME),
    "HeliosTransformer3DModel": Tiny(helios, helios_call, **VOLUME),
    "HunyuanVideo15Transformer3DModel": Tiny(hunyuan15, hunyuan15_call, **VOLUME),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(framepack, framepack_call, **VOLUME),
    "HunyuanVideoTransformer3DModel": Tiny(hunyuan_video, hunyuan_call, **VOLUME),
    "Kandinsky5Transformer3DModel": Tiny(
        kandinsky5, kandinsky5_call, **VOLUME | {"layout": "BTHWC"}
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        kandinsky6, kandinsky6_call, **VOLUME | {"layout": "BTHWC"}
    ),
    "LTX2VideoTransformer3DModel": Tiny(ltx2, ltx2_call, **VIDEO, **PACKED),
    "LTXVideoTransformer3DModel": Tiny(ltx, ltx_call, **VIDEO, **PACKED),
    "LatteTransformer3DModel": Tiny(latte, latte_call, layout="BCTHW"),
    "MochiTransformer3DModel": Tiny(mochi, mochi_call, **VOLUME),
    "MotifVideoTransformer3DModel": Tiny(motif, motif_call, **VOLUME),
}
"""By the name of the class."""
