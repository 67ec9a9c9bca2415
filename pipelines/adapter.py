"""diffusers' attention layers as the swap's core takes them: the table, applied to a model."""

import math
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from diffusers import ModelMixin
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention
from torch import nn

from colt5_vision.swap.adapter import Entrance, LayerSpec, Part, Place, Switch
from colt5_vision.swap.heads import Shards
from colt5_vision.swap.site import Site
from colt5_vision.swap.wrappers import models_of

from . import sites
from .table import LEFT_LAYERS, LEFT_MODELS, TABLE, Family

__all__ = ["family_of", "layer_spec", "parts"]

_RING = "ring attention gives every process a part of the keys"
# the backend that calls scaled_dot_product_attention
_NATIVE = (Switch("processor._attention_backend", AttentionBackendName.NATIVE),)
_EXCHANGE = (Switch("processor._parallel_config", None),)


def parts(model: Any, sample_size: tuple[int, int] | None) -> dict[str, Part]:
    """The models of a pipeline that denoise, or a model, whatever it is for.

    Args:
        sample_size: (H, W) of the latents; None: what the model's config says.
    """
    if isinstance(model, nn.Module):
        return {"": _part(model, sample_size or _own_size(model))}
    found = {
        prefix: one
        for prefix, one in models_of(model).items()
        if isinstance(one, ModelMixin) and not _is_autoencoder(one)
    }
    # a model that does not say its size is given what the others are
    sizes = [_own_size(one) for one in found.values()]
    sizes.append(_pair(getattr(model, "default_sample_size", None)))
    common = next((size for size in sizes if size is not None), None)
    _hint_at_pixels(model, sample_size, common)
    return {
        prefix: part
        for prefix, one in found.items()
        if (part := _part(one, sample_size or _own_size(one) or common)).layers or part.left
    }


def _hint_at_pixels(pipe: Any, size: tuple[int, int] | None, own: tuple[int, int] | None) -> None:
    """Warn of latents as large as the pictures of a pipeline."""
    scale = getattr(pipe, "vae_scale_factor", None)
    if size is None or own is None or not isinstance(scale, int) or scale < 2:
        return
    if min(size) >= scale * min(own):
        warnings.warn(
            f"sample_size: expected (H, W) of the latents, {own} by default in this pipeline, got "
            f"{size}. Pixels? A latent is {scale} pixels wide",
            stacklevel=3,
        )


def _own_size(model: nn.Module) -> tuple[int, int] | None:
    return _pair(getattr(getattr(model, "config", None), "sample_size", None))


def _pair(size: Any) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def family_of(module: nn.Module) -> Family | None:
    """The row of a module's class, or of one it was made from."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((TABLE[name] for name in names if name in TABLE), None)


def _part(model: nn.Module, sample_size: tuple[int, int] | None) -> Part:
    modules = dict(model.named_modules())
    family = family_of(model)
    part = Part(model, {}, {}, {}, timestep="timestep" if family is None else family.timestep)
    names = {name for name, module in modules.items() if _attends(module)}

    # what the table knows, then layers that are given the map itself
    for around, module in modules.items():
        if (family := family_of(module)) is not None:
            _add_family(part, modules, names, around, family, sample_size)
    for name in names - set(part.layers) - set(part.left):
        if (place := _place_of_own_map(modules[name])) is not None:
            part.entrances[name] = Entrance(sites.own_map)
            tokens = _tokens(model, name, (1, 1, 1), sample_size)
            part.layers[name] = layer_spec(modules[name], name, place, tokens)

    # in the order of the model, and the others
    part.layers = {name: part.layers[name] for name in modules if name in part.layers}
    for name in modules:
        if name in names and name not in part.layers:
            part.left.setdefault(name, _why_left(modules, name))
    return part


def _add_family(
    part: Part,
    modules: Mapping[str, nn.Module],
    names: set[str],
    around: str,
    family: Family,
    size: tuple[int, int] | None,
) -> None:
    """The layers of a module that is a row of the table."""
    module, prefix = modules[around], f"{around}." if around else ""
    alone = all(place == "map" for place in family.layers.values())
    context = _parallel(module, "context")
    ring = context is not None and context.ring_degree > 1
    part.entrances[around] = Entrance(partial(_told, family.site, alone))
    for name in names:
        if not name.startswith(prefix) or name in part.layers:
            continue
        place = _place(family, name[len(prefix) :])
        if place is None:
            continue
        reason = None if family.left is None else family.left(module, modules[name])
        reason = _RING if ring else reason
        if reason is not None:
            part.left[name] = reason
            continue
        tokens = None if family.video else _tokens(part.model, around, _patch(module, family), size)
        part.layers[name] = layer_spec(modules[name], around, place, tokens, family)


def layer_spec(
    layer: nn.Module,
    entrance: str,
    place: Place,
    tokens: int | None = None,
    family: Family | None = None,
) -> LayerSpec:
    """A layer that can be routed."""
    return LayerSpec(
        entrance=entrance,
        place=place,
        tokens=tokens,
        key_channels=_key_channels(layer, family is not None and family.grouped),
        masks="given" if family is None else family.masks,
        switches=_NATIVE,
        exchange=_EXCHANGE,
    )


def _told(read, alone: bool, module: nn.Module, given: Mapping[str, Any]) -> Site | str:
    """The site of a forward, and how processes share it.

    Args:
        read: tells the site.
        alone: no layer has other tokens than those of the map.

    Raises:
        ValueError: for ring attention; the switches of a routed layer do not fit it.
    """
    context, tensor = (_parallel(module, kind) for kind in ("context", "tensor"))
    if context is not None and context.ring_degree > 1:
        raise ValueError(f"{_RING}; expected ulysses_degree, or unroute_attention before")
    site = read(module, given)
    if isinstance(site, str) or (context is None and tensor is None):
        return site
    if context is None:
        return site._replace(group=tensor._mesh.get_group())

    # parts of the sequence, cut as the model's plan says
    if tensor is not None:
        return "context and tensor parallelism together"
    if not alone and not getattr(module, "_cp_plan", None):
        return "context parallelism by a plan that diffusers has not made for this model"
    apart = not alone and "encoder_hidden_states" in _split_arguments(module)
    shards = Shards(apart, uneven=context.ulysses_anything)
    return site._replace(group=context._ulysses_mesh.get_group(), shards=shards)


def _split_arguments(module: nn.Module) -> set[str | int]:
    """Names of the arguments that context parallelism cuts, in a model and its modules."""
    found: set[str | int] = set()
    for one in module.modules():
        registry = getattr(one, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            if isinstance(hook, ContextParallelSplitHook):
                found.update(hook.metadata)
    return found


def _parallel(module: nn.Module, kind: str) -> Any:
    """How a model is spread over processes, by ``"context"`` or ``"tensor"``; None: it is not."""
    return getattr(getattr(module, "_parallel_config", None), f"{kind}_parallel_config", None)


def _place(family: Family, name: str) -> Place | None:
    return next((p for pattern, p in family.layers.items() if fnmatchcase(name, pattern)), None)


def _attends(module: nn.Module) -> bool:
    kind = type(module)
    named = kind.__name__.endswith("Attention") and kind.__module__.startswith("diffusers.")
    return named or hasattr(module, "processor")


def _place_of_own_map(layer: nn.Module) -> Place | None:
    """Of an attention layer that is given (B, C, H, W), and perhaps a text to its keys."""
    if not isinstance(layer, Attention) or getattr(layer, "group_norm", None) is None:
        return None
    if getattr(layer, "add_k_proj", None) is None:
        return None if layer.is_cross_attention else "map"
    return None if layer.only_cross_attention else "before"


def _key_channels(layer: nn.Module, grouped: bool) -> int | None:
    """Heads times head_dim of the keys in the call: those of the queries, for processors repeat
    keys of fewer heads beforehand."""
    heads = getattr(layer, "num_key_value_heads", None) if grouped else None
    if heads is not None:
        return heads * layer.head_dim
    for name in ("to_q", "to_query", "img_attn_q"):
        width = getattr(getattr(layer, name, None), "out_features", None)
        if width is not None:
            return width
    inner = getattr(layer, "inner_dim", None)
    heads = getattr(layer, "heads", None) or getattr(layer, "num_heads", None)
    dim = getattr(layer, "head_dim", None) or getattr(layer, "dim_head", None)
    if inner is None and heads is not None and dim is not None:
        inner = heads * dim
    return inner


def _why_left(modules: Mapping[str, nn.Module], name: str) -> str:
    reason = next((r for pattern, r in LEFT_LAYERS.items() if fnmatchcase(name, pattern)), None)
    if reason is not None and reason != "nothing tells the size of its map":
        return reason
    around = name
    while around:
        around = around.rpartition(".")[0]
        names = (kind.__name__ for kind in type(modules[around]).__mro__)
        found = next((LEFT_MODELS[one] for one in names if one in LEFT_MODELS), None)
        if found is not None:
            return found
    return reason or f"no line of the table names this {type(modules[name]).__name__}"


def _is_autoencoder(model: nn.Module) -> bool:
    return any(".autoencoders." in kind.__module__ for kind in type(model).__mro__)


def _patch(module: nn.Module, family: Family) -> tuple[int, int, int]:
    if family.patch is not None:
        return (1, family.patch, family.patch)
    whole = hasattr(module, "config") and not family.inside
    if whole or getattr(module, "is_input_patches", False):
        return sites.patch_sizes(module)
    return (1, 1, 1)


def _tokens(
    model: nn.Module, name: str, patch: tuple[int, int, int], size: tuple[int, int] | None
) -> int | None:
    """Of the map that a module of a model sees, when the model is given latents of ``size``; None:
    unknown."""
    if size is None or _is_autoencoder(model):
        return None
    halvings = _halvings(model, name)
    if halvings is None:
        return None
    for _ in range(halvings):
        size = tuple((side + 1) // 2 for side in size)
    return math.prod(side // step for side, step in zip(size, patch[1:]))


def _halvings(model: nn.Module, name: str) -> int | None:
    """How often a UNet has halved its map before a module in it; 0 for a model without blocks that
    do; None if that is unknown."""
    steps = name.split(".") if name else []
    for i in reversed(range(len(steps) + 1)):
        around = model.get_submodule(".".join(steps[:i]))
        if hasattr(around, "down_blocks"):
            break
    else:
        return None if steps else 0
    part, place, *_ = *steps[i:], "", ""
    down = [_changes(block, "downsamplers") for block in around.down_blocks]
    up = [_changes(block, "upsamplers") for block in getattr(around, "up_blocks", ())]
    if None in down + up:
        return None
    if part == "down_blocks":
        return sum(down[: int(place)])
    return sum(down) - (sum(up[: int(place)]) if part == "up_blocks" else 0)


def _changes(block: nn.Module, name: str) -> bool | None:
    """Whether a block of a UNet changes the size of its map; None if that is unknown."""
    for kind in (name, f"base_{name}"):
        if hasattr(block, kind):
            return getattr(block, kind) is not None
    return None
