"""timm's attention layers: which see a whole map, and what tells its size."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import Attention, AttentionRope, HybridEmbed, PatchEmbed
from timm.models import (
    beit,
    eva,
    gemma4_vit,
    hiera,
    hieradet_sam2,
    maxxvit,
    naflexvit,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
from torch import Tensor, nn

from colt5_vision.swap.adapter import Entrance, LayerSpec, Part, Switch
from colt5_vision.swap.site import Site, image_site
from colt5_vision.swap.sites import raster_grid

from .biases import no_bias
from .timm_biases import beit_bias, rel_pos_bias, sam_bias

__all__ = ["FAMILIES", "LEFT", "Family", "parts"]

_FUSED = Switch("fused_attn", True)  # the branch with scaled_dot_product_attention


class Family(NamedTuple):
    """Attention modules of a class.

    Attributes:
        models: what timm builds of them, for the documentation.
        key_channels: of a module's keys.
        reads_map: the module's own input is a map: its layout, or ``"units"``, tokens in the order
            of Hiera's mask units; None: it gets tokens.
        windowed: gets the module and the one around it; whether it attends in windows of its own.
        switches: besides ``fused_attn``.
        pair_bias, masks, heads_in_batch: see :class:`LayerSpec`.
    """

    models: str
    key_channels: Callable[[nn.Module], int]
    reads_map: str | None = None
    windowed: Callable[[nn.Module, nn.Module], bool] | None = None
    switches: tuple[Switch, ...] = ()
    pair_bias: Callable | None = None
    masks: str = "given"
    heads_in_batch: bool = False


def _heads(module: nn.Module) -> int:
    return module.num_heads * module.head_dim


def _projected(module: nn.Module) -> int:
    return module.proj.in_features


FAMILIES: Mapping[type, Family] = {
    Attention: Family("ViT, DeiT, DINOv2, SigLIP, AIMv2, CLIP, ViTamin, hybrids", _heads),
    AttentionRope: Family("RoPE-ViT, PE, Qwen3 and DeepSeek encoders, NaFlexViT", _heads),
    eva.EvaAttention: Family("EVA, EVA-02, DINOv3", _heads),
    beit.Attention: Family(
        "BEiT, BEiTv2",
        _projected,
        switches=(Switch("_get_rel_pos_bias", no_bias),),
        pair_bias=beit_bias,
    ),
    vision_transformer_relpos.RelPosAttention: Family(
        "ViT with relative positions",
        _heads,
        switches=(Switch("rel_pos.get_bias", no_bias),),
        pair_bias=rel_pos_bias,
    ),
    vision_transformer.ParallelScalingBlock: Family("ViT with parallel blocks (ViT-22B)", _heads),
    gemma4_vit.Gemma4Attention: Family("Gemma 4 encoders", _heads),
    vision_transformer_sam.Attention: Family(
        "SAM, global blocks",
        _heads,
        reads_map="NHWC",
        windowed=lambda module, block: getattr(block, "window_size", 0) > 0,
        switches=(Switch("use_rel_pos", False),),
        pair_bias=sam_bias,
        heads_in_batch=True,
    ),
    hieradet_sam2.MultiScaleAttention: Family(
        "SAM 2 (Hiera), global blocks",
        _projected,
        reads_map="NHWC",
        windowed=lambda module, block: getattr(block, "is_windowed", False),
    ),
    hiera.MaskUnitAttention: Family(
        "Hiera, global blocks",
        _projected,
        reads_map="units",
        windowed=lambda module, block: module.use_mask_unit_attn,
    ),
    volo.Attention: Family("VOLO", _projected, reads_map="NHWC"),
    maxxvit.Attention2d: Family(
        "CoAtNet",
        lambda module: module.num_heads * module.dim_head,
        reads_map="NCHW",
        windowed=lambda module, block: not isinstance(block, maxxvit.TransformerBlock2d),
        switches=(Switch("rel_pos.get_bias", no_bias),),
        pair_bias=rel_pos_bias,
    ),
}
"""Attention modules of timm that see a whole map, by class; their subclasses count as well."""

# modules with "attention" in their name that are no self-attention over a map: left unsaid
_NO_SELF_ATTENTION = {
    "AttentionPool2d",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "BatNonLocalAttn",
    "ClassAttention",
    "ClassAttentionBlock",
    "ClassAttn",
    "OutlookAttention",
    "RotAttentionPool2d",
    "SelectiveKernelAttn",
    "SplitAttn",
}
_WINDOWS = "it attends in windows of its own"
LEFT: Mapping[str, str] = {
    "TalkingHeadAttn": "it mixes heads around the softmax",
    "GPSA": "it mixes two softmaxes by a gate",
    "DiffAttention": "it subtracts two softmaxes",
    "DiffParallelScalingBlock": "it subtracts two softmaxes",
    "WindowAttention": _WINDOWS,
    "WindowMultiHeadAttention": _WINDOWS,
    "WindowAttentionGlobal": _WINDOWS,
    "PartitionAttentionCl": _WINDOWS,
    "PartitionAttention2d": _WINDOWS,
    "LocalWindowAttention": _WINDOWS,
    "LocallyGroupedAttn": _WINDOWS,
    "LinearSelfAttention": "its attention is linear",
    "EfficientAdditiveAttention": "its attention is linear",
    "FactorAttnConvRelPosEnc": "its attention is linear",
    "ChannelAttention": "it attends over channels",
    "ChannelAttentionV2": "it attends over channels",
    "CrossCovarianceAttn": "it attends over channels",
    "XCA": "it attends over channels",
    "GlobalSubSampleAttn": "its keys are pooled",
    "MobileAttention": "its keys are pooled",
    "MultiScaleAttentionPoolFirst": "its keys are pooled",
    "SHSA": "it does not call scaled_dot_product_attention",
    "MHSA": "it does not call scaled_dot_product_attention",
}
"""Attention modules of timm that cannot be routed, by the name of their class, and why."""


def parts(model: nn.Module, sample_size: tuple[int, int] | None) -> dict[str, Part]:
    """timm's attention layers in a model, which may hold a timm model anywhere.

    Args:
        sample_size: (H, W) of the image in pixels; None: the model's own.
    """
    found = Part(model, entrances={}, layers={}, left={})
    modules = dict(model.named_modules())
    for name, module in modules.items():
        family = family_of(module)
        if family is None:
            if reason := _why_left(module):
                found.left[name] = reason
            continue
        around = modules[name.rpartition(".")[0]]
        if family.windowed is not None and family.windowed(module, around):
            found.left[name] = _WINDOWS
        elif getattr(module, "q_pool", None) is not None or getattr(module, "q_stride", 1) > 1:
            found.left[name] = "its queries are pooled"
        else:
            _add(found, modules, name, family, sample_size)
    return {"": found} if found.layers or found.left else {}


def family_of(module: nn.Module) -> Family | None:
    """The family of an attention module, by its class or the one it was made from."""
    return next((FAMILIES[kind] for kind in type(module).__mro__ if kind in FAMILIES), None)


def _why_left(module: nn.Module) -> str | None:
    """Why an attention module of no family is left as it is; None: it is no self-attention."""
    kind = type(module)
    if kind.__name__ in _NO_SELF_ATTENTION or not kind.__module__.startswith("timm."):
        return None
    if kind.__name__ in LEFT:
        return f"{kind.__name__}: {LEFT[kind.__name__]}"
    if "Attention" in kind.__name__ or kind.__name__.endswith("Attn"):
        return f"no routed form of {kind.__module__}.{kind.__name__}"
    return None


def _add(
    found: Part,
    modules: Mapping[str, nn.Module],
    name: str,
    family: Family,
    sample_size: tuple[int, int] | None,
) -> None:
    """A layer of a family, with what tells its map; or among those left, if nothing does."""
    module, tokens = modules[name], None

    # who is told the map: the layer itself, or the model around it
    if family.reads_map == "units":
        entrance, (grid, strides) = name, _units(modules, name)
        found.entrances[name] = Entrance(partial(_unrolled, grid, strides))
        tokens = grid[0] * grid[1]
    elif family.reads_map is not None:
        entrance = name
        found.entrances[name] = Entrance(partial(_own_map, family.reads_map))
    else:
        owner = _owner(modules, name)
        if owner is None:
            found.left[name] = "no patch embedding around it tells the size of its map"
            return
        entrance, embed, prefix = owner
        read = next(read for kind, read in _EMBEDDINGS.items() if isinstance(embed, kind))
        found.entrances[entrance] = Entrance(partial(read, prefix), leads=True)
        tokens = _tokens(embed, sample_size)

    # the layer
    found.layers[name] = LayerSpec(
        entrance=entrance,
        tokens=tokens,
        key_channels=family.key_channels(module),
        masks="outer" if "embeds" in entrance else family.masks,
        heads=module.num_heads if family.heads_in_batch else None,
        switches=(_FUSED, *family.switches),
        pair_bias=family.pair_bias,
    )


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[str, nn.Module, int] | None:
    """The patch embedding of the innermost model around a layer: its name, itself, and the number
    of prefix tokens."""
    while name:
        name = name.rpartition(".")[0]
        model = modules[name]
        if not hasattr(model, "num_prefix_tokens"):
            continue
        for attribute in ("patch_embed", "embeds"):
            embed = getattr(model, attribute, None)
            if isinstance(embed, tuple(_EMBEDDINGS)):
                return f"{name}.{attribute}".lstrip("."), embed, model.num_prefix_tokens
    return None


def _tokens(embed: nn.Module, sample_size: tuple[int, int] | None) -> int | None:
    """Of the map that an embedding makes of an image of this size, or of its own size."""
    if sample_size is not None and hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(sample_size)
        return height * width
    size = getattr(embed, "grid_size", None) or getattr(embed, "pos_embed_grid_size", None)
    return None if size is None else size[0] * size[1]


def _own_map(layout: str, module: nn.Module, given: Mapping) -> Site:
    """A layer that gets (B, H, W, C) or (B, C, H, W)."""
    x = given["x"]
    height, width = x.shape[1:3] if layout == "NHWC" else x.shape[2:4]
    return image_site(height, width)


def _units(modules: Mapping[str, nn.Module], name: str) -> tuple[tuple[int, int], tuple]:
    """Of a block of Hiera: its map, and the strides its tokens are still laid out for."""
    owner, _, number = name.removesuffix(".attn").rpartition(".blocks.")
    if not owner and name.startswith("blocks."):
        number = name.split(".")[1]
    model = modules[owner]
    done = sum(end < int(number) for end in model.stage_ends[: model.q_pool])
    size = list(model.unroll.size)
    for stride in model.unroll.schedule[:done]:
        size = [n // s for n, s in zip(size, stride)]
    return (size[0], size[1]), tuple(tuple(s) for s in model.unroll.schedule[done:])


def _unrolled(grid: tuple[int, int], strides: tuple, module: nn.Module, given: Mapping) -> Site:
    """A block of Hiera: tokens of a map of known size, in the order of mask units."""
    order = None
    if strides:
        unroll = hiera.Unroll(list(grid), (1, 1), list(strides))
        token = torch.arange(grid[0] * grid[1], device=given["x"].device).view(1, -1, 1)
        order = unroll(token).view(1, -1).argsort(-1)
    return Site((1, *grid), order=order)


def _embedded(prefix: int, embed: nn.Module, given: Mapping, output) -> Site:
    """After ``PatchEmbed`` or ``HybridEmbed``."""
    if isinstance(output, torch.fx.Proxy):  # its dimensions are unknown
        size = embed.dynamic_feat_size((given["x"].shape[-2], given["x"].shape[-1]))
    elif isinstance(output, tuple):  # timm's ...WithSize return the size as well
        size = output[1]
    elif output.ndim == 4:
        channels_first = str(getattr(embed, "output_fmt", "NCHW")).endswith("NCHW")
        size = output.shape[2:] if channels_first else output.shape[1:3]
    else:
        size = embed.dynamic_feat_size(given["x"].shape[-2:])
    return image_site(size[0], size[1], prefix)


def _embedded_flexible(prefix: int, embed: nn.Module, given: Mapping, output) -> Site | str:
    """After NaFlexViT's embedding: of images, or of patches with their places."""
    size = output[1]
    if size is not None:
        return image_site(size[0], size[1], prefix)
    return _placed(given["patch_coord"], given.get("patch_valid"), prefix)


def _embedded_gemma(prefix: int, embed: nn.Module, given: Mapping, output) -> Site | str:
    """After Gemma 4's embedding: of images, or of patches with their places."""
    x, coord, valid = given["x"], given.get("patch_coord"), given.get("patch_valid")
    if isinstance(x, dict):
        coord, valid = x.get("patch_coord", coord), x.get("patch_valid", valid)
        x = x["patches"]
    if coord is not None:
        return _placed(coord, valid, prefix)
    height, width = embed.patch_size
    return image_site(x.shape[-2] // height, x.shape[-1] // width, prefix)


def _placed(coord: Tensor, valid: Tensor | None, prefix: int) -> Site | str:
    """Patches (B, N) with their rows and columns; those that are not valid stand behind."""
    grid = raster_grid(coord, valid)
    if isinstance(grid, str):
        return grid
    return image_site(*grid, before=prefix, behind=coord.shape[1] - grid[0] * grid[1])


_EMBEDDINGS: Mapping[type, Callable[..., Site | str]] = {
    PatchEmbed: _embedded,
    HybridEmbed: _embedded,
    naflexvit.NaFlexEmbeds: _embedded_flexible,
    gemma4_vit.Gemma4PatchEmbed: _embedded_gemma,
}
