"""diffusers' models: one line each, which layers see a map and what tells where it lies.

Rows are looked up by the name of a class, so a model that the installed diffusers lacks costs
nothing.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from colt5_vision.swap.adapter import Masks, Place
from colt5_vision.swap.site import Site

from . import sites
from .sites import latents

__all__ = ["LEFT_LAYERS", "LEFT_MODELS", "TABLE", "Family"]


def _all_but_cross(block: nn.Module, layer: nn.Module) -> str | None:
    return "cross-attention" if layer.is_cross_attention else None


def _cascade(block: nn.Module, layer: nn.Module) -> str | None:
    return None if block.self_attn else "cross-attention"


def _kandinsky3(block: nn.Module, layer: nn.Module) -> str | None:
    same = layer.to_k.in_features == layer.to_q.in_features
    return None if same else "cross-attention"


class Family(NamedTuple):
    """Models of a class, or blocks of a class in other models.

    Attributes:
        layers: patterns of names in it, and where the other tokens of such a layer stand.
        site: gets the model and the arguments of its forward, and tells the map.
        masks: see :data:`~colt5_vision.swap.adapter.Masks`.
        video: maps may have several frames.
        patch: latent pixels a side of a token, where pipelines pack them; None: as in the config.
        timestep: argument of the forward, for schedules.
        left: gets the model and a layer, and tells why that one is not routed, or None.
        grouped: keys have fewer heads than queries in the call itself.
        inside: for a block, what the user sees around it, for the documentation.
    """

    layers: Mapping[str, Place]
    site: Callable[..., Site | str]
    masks: Masks = "given"
    video: bool = False
    patch: int | None = None
    timestep: str = "timestep"
    left: Callable[[nn.Module, nn.Module], str | None] | None = None
    grouped: bool = False
    inside: str = ""


def _streams(place: Place) -> dict[str, Place]:
    """Double and single blocks of a transformer."""
    return {"transformer_blocks.*.attn": place, "single_transformer_blocks.*.attn": place}


_ATTN1: dict[str, Place] = {"transformer_blocks.*.attn1": "map"}
_ATTN1_BEHIND_TEXT: dict[str, Place] = {"transformer_blocks.*.attn1": "before"}
_BLOCKS: dict[str, Place] = {"blocks.*.attn1": "map"}
_SD3: dict[str, Place] = {
    "transformer_blocks.*.attn": "behind",
    "transformer_blocks.*.attn2": "map",
}
_ROUTED_UNETS = "UNets of Stable Diffusion 1.x, 2.x, XL, Kolors, ControlNets, AnimateDiff, ..."

_image, _video, _video_frames_first = latents("BCHW"), latents("BCTHW"), latents("BTCHW")
_FLUX = Family(_streams("site"), sites.packed, patch=2)
_WAN = Family(_BLOCKS, _video, video=True)

TABLE: Mapping[str, Family] = {
    # blocks in UNets
    "Transformer2DModel": Family(
        _ATTN1 | {"transformer_blocks.*.attn2": "map", "transformer_blocks.*.fuser.attn": "behind"},
        sites.inner_latents,
        left=_all_but_cross,
        inside=_ROUTED_UNETS,
    ),
    "TransformerSpatioTemporalModel": Family(
        _ATTN1, latents("BCHW", patch=1), inside="UNetSpatioTemporalConditionModel (SVD)"
    ),
    "DreamLiteTransformer2DModel": Family(
        _ATTN1, latents("BCHW", patch=1), inside="DreamLiteUNetModel"
    ),
    "SDCascadeAttnBlock": Family(
        {"attention": "behind"},
        latents("BCHW", "x", patch=1),
        left=_cascade,
        inside="StableCascadeUNet",
    ),
    "Kandinsky3AttentionBlock": Family(
        {"attention": "map"}, sites.kandinsky3, left=_kandinsky3, inside="Kandinsky3UNet"
    ),
    "KAttentionBlock": Family(
        {"attn1": "map"}, latents("BCHW", patch=1), inside="UNet2DConditionModel (upscalers)"
    ),
    # images
    "AuraFlowTransformer2DModel": Family(
        {
            "joint_transformer_blocks.*.attn": "before",
            "single_transformer_blocks.*.attn": "before",
        },
        _image,
    ),
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaFibo2Transformer2DModel": Family(
        {"noise_refiner.*.attention": "behind", "layers.*.attention": "site"}, sites.fibo2
    ),
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX._replace(masks="outer"),
    "CogView3PlusTransformer2DModel": Family(_ATTN1_BEHIND_TEXT, _image),
    "CogView4Transformer2DModel": Family(_ATTN1_BEHIND_TEXT, _image),
    "DiTTransformer2DModel": Family(_ATTN1, _image),
    "ErnieImageTransformer2DModel": Family({"layers.*.self_attention": "behind"}, _image),
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": Family(
        {"mode_blocks.image.*.attn": "map", "single_transformer_blocks.*.attn": "site"},
        sites.flux3,
        patch=2,
    ),
    "FluxControlNetModel": _FLUX,
    "FluxTransformer2DModel": _FLUX,
    "GlmImageTransformer2DModel": Family(_ATTN1_BEHIND_TEXT, _image),
    "HiDreamImageTransformer2DModel": Family(
        {
            "double_stream_blocks.*.attn1": "behind",
            "single_stream_blocks.*.attn1": "behind",
        },
        sites.hidream,
        timestep="timesteps",
    ),
    "HunyuanDiT2DControlNetModel": Family(_BLOCKS, _image),
    "HunyuanDiT2DModel": Family(_BLOCKS, _image),
    "HunyuanImageTransformer2DModel": Family(_streams("behind"), _video),
    "JoyImageEditPlusTransformer3DModel": Family(
        {"double_blocks.*.attn": "behind"}, sites.shape_list
    ),
    "JoyImageEditTransformer3DModel": Family(
        {"double_blocks.*.attn": "behind"}, sites.joy_image, video=True
    ),
    "Krea2Transformer2DModel": Family(
        {"transformer_blocks.*.attn": "before"}, sites.packed_after_text, patch=2
    ),
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": Family(
        {"noise_refiner.*.attn": "map", "layers.*.attn": "before"}, sites.lumina2
    ),
    "LuminaNextDiT2DModel": Family({"layers.*.attn1": "map"}, _image),
    "NucleusMoEImageTransformer2DModel": Family(
        {"transformer_blocks.*.attn": "behind"}, sites.shapes_first_alone
    ),
    "OmniGenTransformer2DModel": Family({"layers.*.self_attn": "before"}, _image),
    "OvisImageTransformer2DModel": _FLUX,
    "PRXTransformer2DModel": Family({"blocks.*.attention": "before"}, _image),
    "PixArtTransformer2DModel": Family(_ATTN1, _image),
    "QwenImage21Transformer2DModel": Family(
        {"transformer_blocks.*.attn": "before"}, sites.shapes_last, patch=2
    ),
    "QwenImageControlNetModel": Family(
        {"transformer_blocks.*.attn": "site"}, sites.shapes_first, patch=2
    ),
    "QwenImageTransformer2DModel": Family(
        {"transformer_blocks.*.attn": "site"}, sites.shapes_first, patch=2
    ),
    "SD3ControlNetModel": Family(_SD3, latents("BCHW", "controlnet_cond")),
    "SD3Transformer2DModel": Family(_SD3, _image),
    "UVit2DModel": Family({"transformer_layers.*.attn1": "map"}, sites.uvit),
    "ZImageControlNetModel": Family(
        {
            "noise_refiner.*.attention": "behind",
            "control_noise_refiner.*.attention": "behind",
            "control_layers.*.attention": "behind",
        },
        sites.z_image,
        timestep="t",
    ),
    "ZImageTransformer2DModel": Family(
        {"noise_refiner.*.attention": "behind", "layers.*.attention": "behind"},
        sites.z_image,
        timestep="t",
    ),
    # videos
    "AllegroTransformer3DModel": Family(_ATTN1, _video, video=True),
    "AnyFlowTransformer3DModel": Family(_BLOCKS, _video_frames_first, video=True),
    "ChronoEditTransformer3DModel": _WAN,
    "CogVideoXTransformer3DModel": Family(_ATTN1_BEHIND_TEXT, _video_frames_first, video=True),
    "ConsisIDTransformer3DModel": Family(_ATTN1_BEHIND_TEXT, _video_frames_first, video=True),
    "Cosmos3OmniTransformer": Family(
        {"layers.*.self_attn": "before"},
        sites.cosmos3,
        video=True,
        timestep="vision_timesteps",
        grouped=True,
    ),
    "CosmosControlNetModel": Family(
        {"control_blocks.*.attn1": "map"}, latents("BCTHW", "controls_latents"), video=True
    ),
    "CosmosTransformer3DModel": Family(_ATTN1, _video, video=True),
    "EasyAnimateTransformer3DModel": Family(_ATTN1_BEHIND_TEXT, _video, video=True),
    "HeliosTransformer3DModel": Family({"blocks.*.attn1": "before"}, _video, video=True),
    "HunyuanVideo15Transformer3DModel": Family(
        {"transformer_blocks.*.attn": "behind"}, _video, masks="outer", video=True
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        _streams("site"), sites.framepack, video=True
    ),
    "HunyuanVideoTransformer3DModel": Family(_streams("behind"), _video, video=True),
    "Kandinsky5Transformer3DModel": Family(
        {"visual_transformer_blocks.*.self_attention": "map"}, sites.kandinsky5, video=True
    ),
    "Kandinsky6Transformer3DModel": Family(
        {"visual_transformer_blocks.*.video_dec_block.self_attention": "map"},
        latents("BTHWC"),
        video=True,
    ),
    "LTX2VideoTransformer3DModel": Family(_ATTN1, sites.arguments_thw, video=True),
    "LTXVideoTransformer3DModel": Family(_ATTN1, sites.arguments_thw, video=True),
    "LatteTransformer3DModel": Family(_ATTN1, latents("BC.HW")),
    "MochiTransformer3DModel": Family({"transformer_blocks.*.attn1": "behind"}, _video, video=True),
    "MotifVideoTransformer3DModel": Family(_streams("behind"), _video, video=True),
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanAnimateTransformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": Family(
        _BLOCKS | {"vace_blocks.*.attn1": "map"}, _video, video=True
    ),
}
"""What is routed, by the name of the class; subclasses count as well."""

_LINEAR = "its attention is linear"
_FLEX = "it attends to blocks of its own, through flex_attention"
_DATA = "where its map lies in the sequence is data"
LEFT_MODELS: Mapping[str, str] = {
    "SanaControlNetModel": _LINEAR,
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMTransformer3DModel": _LINEAR + " (and in bfloat16 in every fourth block)",
    "AnyFlowFARTransformer3DModel": _FLEX,
    "LTX2VideoDiffusionDecoderModel": _FLEX,
    "Kandinsky6SRTransformer3DModel": _FLEX,
    "WanAnimate2Transformer3DModel": _FLEX,
    "Ideogram4Transformer2DModel": _DATA,
    "MiniMaxH3Transformer3DModel": _DATA,
    "SanaWMLTX2RefinerTransformer3DModel": "nothing tells the size of its map",
    "TransformerTemporalModel": "it attends over the frames at one place",
}
"""Models whose self-attention cannot be routed, by the name of the class, and why."""

LEFT_LAYERS: Mapping[str, str] = {
    "*motion_modules*": LEFT_MODELS["TransformerTemporalModel"],
    "*temp*": LEFT_MODELS["TransformerTemporalModel"],
    "*transformer_in*": LEFT_MODELS["TransformerTemporalModel"],
    "*audio*": "it attends to sounds",
    "*refiner*": "it attends to a text",
    "*txt*": "it attends to a text",
    "*text_*": "it attends to a text",
    "*attn2": "cross-attention",
    "*cross*": "cross-attention",
    "*attn1": "nothing tells the size of its map",
}
"""Other attention layers, by a pattern of their names: the first that fits tells why."""
