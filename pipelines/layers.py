"""The attention layers of diffusers models: which can be routed, and why the others cannot."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from .processor import (
    ATTENTIONS,
    PROCESSORS,
    RoutedAttnProcessor,
    adds_keys,
    default_processor,
)
from .sizes import PARENTS, map_of_layer


class Layer:
    """An attention module of a model: whether it can be routed, and what tells the size of its map."""

    def __init__(self, model: nn.Module, name: str, attn: nn.Module):
        self.model, self.name, self.attn = model, name, attn
        self.parent_name, self.parent = _parent(model, name)
        self.reason = self._obstacle()

    def _obstacle(self) -> str | None:
        attn = self.attn
        if not isinstance(attn, ATTENTIONS):
            return f"no routed form of {type(attn).__name__}"
        if getattr(attn, "is_cross_attention", False):
            return "cross-attention"
        if adds_keys(attn):
            return "keys and values have projections added"
        if ".fuser." in f".{self.name}.":
            return "attends to more than the map"
        maps = isinstance(attn, Attention) and attn.group_norm is not None  # (B, C, H, W) to itself
        if (self.parent is None and not maps) or getattr(self.parent, "pos_embed", self) is None:
            return "nothing tells the size of its map"
        processor = exact_of(attn)
        if type(processor) not in PROCESSORS:
            return f"no routed form of the processor {type(processor).__name__}"
        return None

    def tokens(self, sample_size: tuple[int, int] | None) -> int | None:
        """Of the map that the layer sees when the model gets latents of ``sample_size`` (H, W); None: unknown."""
        if sample_size is None:
            return None
        size = map_of_layer(self.model, self.name, self.parent, sample_size)
        return None if size is None else size[0] * size[1]


def _parent(model: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        around = model.get_submodule(".".join(parts[:i]))
        if isinstance(around, PARENTS):
            return ".".join(parts[:i]), around
    return "", None


def attention_layers(model: nn.Module) -> list[Layer]:
    """All attention modules of a model that have processors, those that cannot be routed among them."""
    found = [(name, m) for name, m in model.named_modules() if hasattr(m, "set_processor") and hasattr(m, "processor")]
    return [Layer(model, name, m) for name, m in found]


def models_of(pipe_or_model) -> dict[str, nn.Module]:
    """The models to route, by the prefix of their layers' names: what denoises, not the autoencoder."""
    if isinstance(pipe_or_model, DiffusionPipeline):
        found = {}
        for name, part in pipe_or_model.components.items():
            part = getattr(part, "_orig_mod", part)
            autoencoder = any(".autoencoders." in kind.__module__ for kind in type(part).__mro__)
            if isinstance(part, nn.Module) and not autoencoder and attention_layers(part):
                found[f"{name}."] = part
        return found
    if isinstance(pipe_or_model, nn.Module):
        return {"": getattr(pipe_or_model, "_orig_mod", pipe_or_model)}
    raise TypeError(f"pipe_or_model: expected a diffusers pipeline or model, got {type(pipe_or_model).__name__}")


def choose(layers: dict[str, Layer], wanted: Sequence[int | str] | None) -> dict[str, Layer]:
    """The layers that can be routed and are wanted: by index among them, or name or pattern, in a pipeline with or
    without the model's prefix."""
    able = {name: layer for name, layer in layers.items() if layer.reason is None}
    if wanted is None:
        return able
    names, chosen = list(able), set()
    for one in wanted:
        if isinstance(one, int):
            if not -len(names) <= one < len(names):
                raise ValueError(f"layers: expected indices in [0, {len(names)}), got {one}")
            matches = [names[one]]
        else:
            matches = [name for name in names if fnmatchcase(name, one) or fnmatchcase(able[name].name, one)]
        if not matches:
            why = f": {layers[one].reason}" if one in layers else f"; there are {', '.join(names[:3])}, ..."
            raise ValueError(f"layers: {one!r} is no layer that can be routed{why}")
        chosen.update(matches)
    return {name: layer for name, layer in able.items() if name in chosen}


def exact_of(attn: nn.Module) -> Any:
    """The processor of a layer that computes full attention."""
    processor = attn.processor
    if not isinstance(processor, RoutedAttnProcessor):
        return processor
    return default_processor(attn) if processor.exact is None else processor.exact


def counted(reasons: list[str]) -> str:
    """Each reason once, with how often it came."""
    return ", ".join(f"{reason} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons))
