"""Tiny timm models of every family that route_attention takes, with weights that make attention
matter."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.gemma4_vit import Gemma4VitEncoder
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.volo import VOLO

from colt5_vision import route_attention, routed_layers, unroute_attention
from colt5_vision.swap.learned import LEARNED

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
DYNAMIC = SMALL | {"dynamic_img_size": True}


COATNET = {"embed_dim": (16, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16}


class Case(NamedTuple):
    name: str | Callable
    args: dict
    size: tuple[int, int] = (80, 112)  # 5 x 7 tokens of 16


def gated(**args):
    """timm offers the gate to a block's attention, but not to a model."""
    model = timm.create_model("vit_tiny_patch16_224", **args)
    for block in model.blocks:
        block.attn = Attention(64, 2, qkv_bias=True, gated=True)
    return model


def gemma(img_size, num_classes, **args):
    """The encoder alone: it has no classes, and pools to so many soft tokens."""
    extra = {"intermediate_size": 64, "pooling_kernel_size": 1, "position_embedding_size": 64}
    return Gemma4VitEncoder(img_size=img_size, global_pool="avg", **extra, **args)


def sam2(img_size, **args):
    """It takes images of any size, and no ``img_size``."""
    return timm.create_model("sam2_hiera_tiny", **args)


CASES = {
    "vit": Case("vit_tiny_patch16_224", DYNAMIC),
    "vit-qk_norm-scale_norm": Case(
        "vit_tiny_patch16_224", SMALL | {"qk_norm": True, "scale_attn_norm": True}
    ),
    "vit-gated": Case(gated, SMALL),
    "vit-parallel": Case("vit_small_patch16_18x2_224", SMALL),
    "deit3": Case("deit3_small_patch16_224", DYNAMIC),
    "deit-distilled": Case("deit_tiny_distilled_patch16_224", SMALL),
    "dinov2-registers": Case("vit_small_patch14_reg4_dinov2", DYNAMIC, (70, 98)),
    "siglip": Case("vit_base_patch16_siglip_224", SMALL),
    "aimv2": Case("aimv2_large_patch14_224", SMALL, (70, 98)),
    "rope": Case("vit_small_patch16_rope_224", DYNAMIC),
    "pe": Case("vit_pe_core_tiny_patch16_384", DYNAMIC),
    "eva02": Case("eva02_tiny_patch14_224", DYNAMIC, (70, 98)),
    "dinov3": Case("vit_small_patch16_dinov3", DYNAMIC),
    "grouped-query": Case(
        "vit_small_patch16_dinov3",
        DYNAMIC | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
    ),
    "beit": Case("beit_base_patch16_224", SMALL),
    "beit-shared": Case(
        "beit_base_patch16_224",
        SMALL | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    ),
    "beit-both": Case(
        "beit_base_patch16_224", SMALL | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True}
    ),
    "sam": Case(
        "samvit_base_patch16", SMALL | {"depth": 3, "window_size": 3, "global_attn_indexes": (1, 2)}
    ),
    "sam2": Case(
        sam2,
        {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
        (160, 224),  # 10 x 14 tokens in the third stage
    ),
    "hiera": Case(
        "hiera_tiny_224",
        {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 3, 2)},
        (192, 256),  # 12 x 16 tokens in the third stage
    ),
    "naflex": Case("naflexvit_base_patch16_gap", SMALL),
    "naflex-rope": Case("naflexvit_base_patch16_parfac_gap", SMALL | {"rope_type": "axial"}),
    "gemma4": Case(
        gemma,
        {"depth": 2, "embed_dim": 64, "num_heads": 2, "head_dim": 32, "num_kv_heads": 1},
    ),
    "relpos": Case("vit_relpos_small_patch16_224", SMALL),
    "relpos-class": Case("vit_relpos_base_patch16_clsgap_224", SMALL),
    "relpos-table": Case("vit_relpos_base_patch16_cls_224", SMALL | {"rel_pos_type": "bias"}),
    "relpos-shared": Case("vit_srelpos_small_patch16_224", SMALL),
    "parallel-scaling": Case("vit_tiny_patch16_224", DYNAMIC | {"block_fn": ParallelScalingBlock}),
    "coatnet": Case("coatnet_rmlp_nano_rw_224", COATNET, (160, 224)),
    "coatnet-table": Case("coatnet_nano_rw_224", COATNET, (160, 224)),
    "coatnet-tf": Case(
        "coatnet_nano_rw_224",
        COATNET | {"transformer_rel_pos_type": "bias_tf", "transformer_head_first": False},
        (160, 224),
    ),
    "volo": Case(
        VOLO, {"layers": (1, 1, 1, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (2, 2, 2, 2)}
    ),
}
every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def some(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def spread(model, seed=1):
    """Random weights at which attention is peaked and every part, LayerScale and position tables
    too, is visible."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        last = name.rpartition(".")[2]
        if "rel_pos" in name or "relative_position" in name or "embed" in name or "token" in name:
            value = value * 0.5
        elif last.startswith("gamma") or (parameter.ndim == 1 and last == "weight"):
            value = 1 + 0.2 * value
        elif parameter.ndim > 1:
            value = value * 1.2 * (parameter.numel() / parameter.shape[0]) ** -0.5
        else:
            value = value * 0.2
        parameter.data.copy_(value)
    return model


def build(case, dtype=torch.float64, **extra):
    torch.manual_seed(0)
    args = {"num_classes": 5, "img_size": case.size, **case.args, **extra}
    make = case.name if callable(case.name) else partial(timm.create_model, case.name)
    return spread(make(**args)).eval().to(dtype)


def image(case, batch=2, size=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *(size or case.size), generator=generator, dtype=torch.float64).to(
        dtype
    )


def trace(model):
    """All that a swap could leave behind: classes, attributes, hooks and tensors, by identity."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else [(None, value)]
            found |= {(name, key, inner): id(x) for inner, x in items}
        found[name, "class", None] = type(module)
    return found


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def routed(model, share=0.25, **how):
    """The model, routed whatever the size of its maps."""
    how = {"window_size": 3, "num_heavy_tokens_kv": share, "min_tokens": 0, **how}
    route_attention(model, **how)
    return model


def unrouted(model):
    unroute_attention(model)
    return model


def routed_case(case=CASES["vit"], share=0.25, dtype=torch.float32, trained=True, **how):
    """A routed model; a learned router's correction is random unless it is not ``trained``."""
    model = routed(build(case, dtype), share, **{"router": "learned", **how})
    for layer in routed_layers(model).values():
        if layer.attention.router in LEARNED and trained:
            torch.nn.init.normal_(layer.attention.correction[2].weight, std=3)
    return model


def picture(case=CASES["vit"], **how):
    return image(case, dtype=torch.float32, **how)


SIZES = ((5, 8), (8, 5))  # of maps, in tokens


def at(size, **how):
    """An image of the plain ViT whose map has this size."""
    return image(CASES["vit"], size=(16 * size[0], 16 * size[1]), **how)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
