"""transformers' vision towers: which attention layers see a whole map, and what tells its size.

A tower is known by the class of its embeddings. It is given the pixels, so its own call tells the
map; the embeddings' parameters tell how many tokens stand around it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from colt5_vision._torch_internals import is_compiling
from colt5_vision.ops.routed_window_attention.gathered import PairBias
from colt5_vision.swap.adapter import Entrance, LayerSpec, Part, Switch
from colt5_vision.swap.site import Site, image_site

from .biases import decomposed_bias

__all__ = ["MAPS", "TOWERS", "MapLayer", "Tower", "parts"]


class Tower(NamedTuple):
    """Attention layers between the embeddings of a class and the end of the module that holds
    them.

    Attributes:
        models: what transformers builds of them, for the documentation.
        attention: class of the attention modules.
        before, behind: the embeddings' parameters that become tokens in front of the map and
            behind it, in their order.
        read: gets these numbers, then what :class:`Entrance` gives; None: pixels through a
            convolution.
        leads: the embeddings' output tells the map, not the tower's arguments.
        masks: see :class:`LayerSpec`.
    """

    models: str
    attention: str
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    read: Callable[..., Site | str] | None = None
    leads: bool = False
    masks: str = "given"


class MapLayer(NamedTuple):
    """Attention modules of a class whose own input is a map (B, H, W, C).

    Attributes:
        models: as of :class:`Tower`.
        windowed: gets the module and the one around it; why it cannot be routed, or None.
        switches, pair_bias: see :class:`LayerSpec`.
    """

    models: str
    windowed: Callable[[nn.Module, nn.Module], str | None]
    switches: tuple[Switch, ...] = ()
    pair_bias: Callable | None = None


_CLASS = ("cls_token",)
_WINDOWS = "it attends in windows of its own"


def _by_places(before: int, behind: int, tower: nn.Module, given: Mapping) -> Site | str:
    """SigLIP 2: patches with the size of each image; patches that only fill up stand behind."""
    mask = given.get("pixel_attention_mask")
    if mask is not None and mask.ndim != 2:  # it reaches the layers as it is
        return "the mask is not one of patches"
    shapes = given["spatial_shapes"]
    if is_compiling():
        return "a compiled graph cannot look at spatial_shapes"
    if bool((shapes != shapes[0]).any()):
        return "images of the batch have different sizes"
    height, width = (int(n) for n in shapes[0])
    return image_site(height, width, 0, given["pixel_values"].shape[1] - height * width)


def _shuffled(before: int, behind: int, embed: nn.Module, given: Mapping, output) -> Site | str:
    """ViT-MAE: it shuffles the tokens and leaves some out."""
    tokens, _, restore = output
    if tokens.shape[1] != restore.shape[1] + before:
        return "tokens are masked: there is no whole map"
    height, width = _convolved(embed, given["pixel_values"].shape[-2:])
    return Site((1, height, width), before, behind, restore)


TOWERS: Mapping[str, Tower] = {
    "Aimv2VisionEmbeddings": Tower("AIMv2", "Aimv2Attention"),
    "AltCLIPVisionEmbeddings": Tower("AltCLIP", "AltCLIPAttention", ("class_embedding",)),
    "BeitEmbeddings": Tower("BEiT", "BeitAttention", _CLASS),
    "CLIPSegVisionEmbeddings": Tower("CLIPSeg", "CLIPSegAttention", ("class_embedding",)),
    "CLIPVisionEmbeddings": Tower("CLIP", "CLIPAttention", ("class_embedding",)),
    "ChineseCLIPVisionEmbeddings": Tower(
        "Chinese-CLIP", "ChineseCLIPVisionAttention", ("class_embedding",)
    ),
    "DINOv3ViTEmbeddings": Tower("DINOv3", "DINOv3ViTAttention", ("cls_token", "register_tokens")),
    "DPTViTEmbeddings": Tower("DPT", "DPTSelfAttention", _CLASS),
    "Data2VecVisionEmbeddings": Tower("data2vec", "Data2VecVisionSdpaSelfAttention", _CLASS),
    "DeiTEmbeddings": Tower("DeiT", "DeiTAttention", ("cls_token", "distillation_token")),
    "Dinov2Embeddings": Tower("DINOv2, Depth Anything", "Dinov2Attention", _CLASS),
    "Dinov2WithRegistersEmbeddings": Tower(
        "DINOv2 with registers", "Dinov2WithRegistersAttention", ("cls_token", "register_tokens")
    ),
    "IJepaEmbeddings": Tower("I-JEPA", "IJepaAttention"),
    "InternVLVisionEmbeddings": Tower("InternVL", "InternVLVisionAttention", _CLASS),
    "MLCDVisionEmbeddings": Tower("MLCD", "MLCDAttention", ("class_embedding",)),
    "MetaClip2VisionEmbeddings": Tower("MetaCLIP 2", "MetaClip2Attention", ("class_embedding",)),
    "OwlViTVisionEmbeddings": Tower("OWL-ViT", "OwlViTAttention", ("class_embedding",)),
    "Owlv2VisionEmbeddings": Tower("OWLv2", "Owlv2Attention", ("class_embedding",)),
    "Siglip2VisionEmbeddings": Tower(
        "SigLIP 2 (NaFlex)", "Siglip2Attention", read=_by_places, masks="keys"
    ),
    "SiglipVisionEmbeddings": Tower("SigLIP, SigLIP 2, PaliGemma", "SiglipAttention"),
    "VJEPA2Embeddings": Tower("V-JEPA 2, encoder (volumes)", "VJEPA2RopeAttention"),
    "ViTEmbeddings": Tower("ViT", "ViTAttention", _CLASS),
    "ViTMAEEmbeddings": Tower(
        "ViT-MAE, encoder without masking", "ViTMAEAttention", _CLASS, read=_shuffled, leads=True
    ),
    "ViTMSNEmbeddings": Tower("ViT-MSN", "ViTMSNAttention", _CLASS),
    "VideoMAEEmbeddings": Tower("VideoMAE (volumes)", "VideoMAESelfAttention"),
    "VivitEmbeddings": Tower("ViViT (volumes)", "VivitAttention", _CLASS),
    "YolosEmbeddings": Tower("YOLOS", "YolosSelfAttention", _CLASS, ("detection_tokens",)),
}
"""Vision towers of transformers that can be routed, by the class of their embeddings."""


def _sam_window(module: nn.Module, block: nn.Module) -> str | None:
    return _WINDOWS if getattr(block, "window_size", 0) > 0 else None


def _sam2_window(module: nn.Module, block: nn.Module) -> str | None:
    if getattr(module, "query_stride", None):
        return "its queries are pooled"
    return _sam_window(module, block)


def _sam_bias(layer: nn.Module, q: Tensor, site: Site | None) -> PairBias | None:
    """SAM's relative positions, for the pairs of a query and its keys only."""
    if not hasattr(layer, "rel_pos_h"):
        return None
    _, height, width = site.grid
    rows = layer.get_rel_pos(height, height, layer.rel_pos_h)
    columns = layer.get_rel_pos(width, width, layer.rel_pos_w)
    return decomposed_bias(q, rows, columns, site)


MAPS: Mapping[str, MapLayer] = {
    "SamVisionSdpaAttention": MapLayer(
        "SAM, global blocks", _sam_window, (Switch("use_rel_pos", False),), _sam_bias
    ),
    "SamHQVisionSdpaAttention": MapLayer(
        "SAM-HQ, global blocks", _sam_window, (Switch("use_rel_pos", False),), _sam_bias
    ),
    "Sam2MultiScaleAttention": MapLayer("SAM 2 (Hiera), global blocks", _sam2_window),
    "Sam3ViTRoPEAttention": MapLayer("SAM 3, global blocks", _sam_window),
}
"""Attention modules of transformers that get a map themselves, by their class."""


def parts(model: nn.Module, sample_size: tuple[int, int] | None) -> dict[str, Part]:
    """transformers' vision attention layers in a model.

    Args:
        sample_size: (H, W) of the image in pixels; None: the configuration's.
    """
    found = Part(model, entrances={}, layers={}, left={})
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if (kind := _name_in(module, TOWERS)) is not None:
            _add_tower(found, modules, name, TOWERS[kind], sample_size)
        elif (kind := _name_in(module, MAPS)) is not None:
            _add_map(found, modules, name, MAPS[kind])
    for name, module in modules.items():
        seen = name in found.layers or name in found.left
        if not seen and (reason := _why_left(module)):
            found.left[name] = reason
    return {"": found} if found.layers or found.left else {}


def _name_in(module: nn.Module, table: Mapping) -> str | None:
    """The name of a module's class in a table, or of one it was made from."""
    names = [kind.__name__ for kind in type(module).__mro__ if _of_transformers(kind)]
    return next((name for name in names if name in table), None)


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _add_tower(
    found: Part,
    modules: Mapping[str, nn.Module],
    name: str,
    tower: Tower,
    sample_size: tuple[int, int] | None,
) -> None:
    """The attention layers of the module around some embeddings."""
    embed, around = modules[name], name.rpartition(".")[0]
    before, behind = (
        sum(_tokens_of(embed, attribute) for attribute in side)
        for side in (tower.before, tower.behind)
    )
    read = tower.read or partial(_by_pixels, _geometry(embed))
    entrance = name if tower.leads else around
    found.entrances[entrance] = Entrance(partial(read, before, behind), leads=tower.leads)
    tokens = _sample_tokens(embed, modules[around], sample_size)
    prefix = f"{around}." if around else ""
    for path, module in modules.items():
        if not path.startswith(prefix) or tower.attention not in _names(module):
            continue
        if _held_by_another(path, around, modules):
            continue
        if reason := _not_sdpa(module):
            found.left[path] = reason
            continue
        found.layers[path] = LayerSpec(
            entrance=entrance, tokens=tokens, key_channels=_channels(module), masks=tower.masks
        )


def _held_by_another(path: str, tower: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a decoder or predictor of the same layers stands between a tower and a layer."""
    steps = path[len(tower) :].strip(".").split(".")[:-1]
    names = [
        type(modules[f"{tower}.{'.'.join(steps[: i + 1])}".strip(".")]).__name__
        for i in range(len(steps))
    ]
    return any("Decoder" in kind or "Predictor" in kind for kind in names)


def _add_map(found: Part, modules: Mapping[str, nn.Module], name: str, kind: MapLayer) -> None:
    module = modules[name]
    reason = kind.windowed(module, modules[name.rpartition(".")[0]]) or _not_sdpa(module)
    if reason is not None:
        found.left[name] = reason
        return
    found.entrances[name] = Entrance(_own_map)
    found.layers[name] = LayerSpec(
        entrance=name,
        key_channels=_channels(module),
        switches=kind.switches,
        pair_bias=kind.pair_bias,
    )


def _names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _not_sdpa(module: nn.Module) -> str | None:
    """Why an attention module does not call ``scaled_dot_product_attention``, or None."""
    how = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if how == "sdpa":
        return None
    return f"its attention is {how!r}: call model.set_attn_implementation('sdpa') before"


def _why_left(module: nn.Module) -> str | None:
    """Why an attention module of no tower is left as it is; None: it is none."""
    kind = type(module)
    if not _of_transformers(kind) or not kind.__name__.endswith(("Attention", "Attn")):
        return None
    if "cu_seqlens" in inspect.signature(kind.forward).parameters:
        return f"{kind.__name__}: its images are packed into one sequence (cu_seqlens)"
    return f"{kind.__name__}: it sees no map that is known"


def _channels(module: nn.Module) -> int:
    """Channels of the keys."""
    for name in ("k_proj", "key"):
        if hasattr(module, name):
            return getattr(module, name).out_features
    return module.proj.in_features


def _tokens_of(embed: nn.Module, name: str) -> int:
    """How many tokens a parameter of the embeddings becomes."""
    value = getattr(embed, name, None)
    if value is None:
        return 0
    return 1 if value.ndim == 1 else value.shape[-2]


Geometry = tuple[tuple[int, int, int], ...]  # kernel, stride and padding, in frames, rows, columns


def _geometry(embed: nn.Module) -> Geometry:
    """Of the convolution that makes patches."""
    kinds = (nn.Conv2d, nn.Conv3d)
    conv = next(module for module in embed.modules() if isinstance(module, kinds))
    padding = (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    sides = (tuple(conv.kernel_size), tuple(conv.stride), tuple(padding))
    fill = (1, 1, 0)
    return tuple(side if len(side) == 3 else (n, *side) for n, side in zip(fill, sides))


def _map_of(geometry: Geometry, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Grid that a convolution makes of so many frames, rows and columns."""
    kernel, stride, padding = geometry
    grid = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    return max(grid[0], 1), grid[1], grid[2]


def _convolved(embed: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    return _map_of(_geometry(embed), (1, *size))[1:]


def _by_pixels(
    geometry: Geometry, before: int, behind: int, tower: nn.Module, given: Mapping
) -> Site | str:
    """Pixels (B, C, H, W), or of videos (B, T, C, H, W)."""
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))
    if pixels is None:
        return "the tower was given no pixels"
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    return Site(_map_of(geometry, (frames, *pixels.shape[-2:])), before, behind)


def _own_map(layer: nn.Module, given: Mapping) -> Site:
    """A layer that gets (B, H, W, C)."""
    x = given["hidden_states"]
    return image_site(x.shape[1], x.shape[2])


def _sample_tokens(
    embed: nn.Module, tower: nn.Module, sample_size: tuple[int, int] | None
) -> int | None:
    """Tokens of the map of an image of this size; None: unknown, as of videos."""
    size = sample_size
    if size is None:
        size = getattr(getattr(tower, "config", None), "image_size", None)
        size = (size, size) if isinstance(size, int) else size
    convs = [module for module in embed.modules() if isinstance(module, nn.Conv2d)]
    if size is None or not convs:
        return None
    height, width = _convolved(embed, tuple(size))
    return height * width
