"""Tiny models with refiners: Z-Image, Lumina, Bria Fibo 2."""

import diffusers
import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel

from tests.support.diffusers_models.tiny import TEXT, Tiny, image, noise, steps, text, valid, video

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


MODELS: dict[str, Tiny] = {
    "BriaFibo2Transformer2DModel": Tiny(fibo2, fibo2_call),
    "Lumina2Transformer2DModel": Tiny(lumina2, lumina2_call),
    "LuminaNextDiT2DModel": Tiny(lumina, lumina_call),
    "ZImageControlNetModel": Tiny(z_controlnet, z_controlnet_call, layout="BCTHW", argument="x"),
    "ZImageTransformer2DModel": Tiny(z_image, z_image_call, layout="BCTHW", argument="x"),
}
"""By the name of the class."""
