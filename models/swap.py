"""Routed attention in place of the global self-attention of a pretrained timm model, and back.

The swap changes the class of an attention module to a subclass, in place. Its forward is timm's own, run with
``scaled_dot_product_attention`` rerouted, so projections, norms, rotary positions, gates and dropouts stay what they are.
"""

from collections.abc import Iterable

from timm.layers import HybridEmbed, PatchEmbed
from timm.models import vision_transformer_sam
from torch import nn

from colt5_vision.checks import TokenCount
from colt5_vision.pretrained import PretrainedRoutedAttention
from colt5_vision.reroute import BlockMarker, MapSize, remove_hooks

from .routed_attention import (
    FAMILIES,
    ORIGINALS,
    RoutedMap,
    RoutedSelfAttention,
    RoutedTokens,
    original_type,
    routed_layers,
)

__all__ = ["route_attention", "unroute_attention"]

# modules with "attention" in their name that are no self-attention of a whole map: the swap leaves them alone
_LEFT_ALONE = {
    "AttentionPool2d",
    "AttentionPoolLatent",
    "ClassAttention",
    "ClassAttentionBlock",
    "ClassAttn",
    "OutlookAttention",
    "RotAttentionPool2d",
}
# blocks that hold a self-attention without a module for it
_FUSED_BLOCKS = {"ParallelScalingBlock", "DiffParallelScalingBlock"}


class _PatchEmbedHook:
    """A forward hook of a patch embedding, which begins a pass."""

    def __init__(self, map_size: MapSize):
        self.map_size = map_size

    def __call__(self, patch_embed: nn.Module, args, output) -> None:
        if isinstance(output, tuple):  # timm's ...WithSize return the size as well
            size = output[1]
        elif output.ndim == 4:
            nchw = str(getattr(patch_embed, "output_fmt", "NCHW")).endswith("NCHW")
            size = output.shape[2:] if nchw else output.shape[1:3]
        else:
            size = patch_embed.dynamic_feat_size(args[0].shape[-2:])
        self.map_size.begin((size[0], size[1]))


def _windowed(name: str, model: nn.Module) -> bool:
    """SAM's blocks with their own windows hold the same attention module as its global ones."""
    block = model.get_submodule(name.rpartition(".")[0])
    return isinstance(block, vision_transformer_sam.Block) and block.window_size > 0


def _routable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Global self-attention modules by name: those of a supported family, and others."""
    known, other = {}, {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if original_type(module) in FAMILIES:
            if not _windowed(name, model):
                known[name] = module
        elif kind in _FUSED_BLOCKS or (("Attention" in kind or "Attn" in kind) and kind not in _LEFT_ALONE):
            other[name] = module
    return known, other


def _named(modules: dict[str, nn.Module]) -> str:
    first = [f"{name} ({type(m).__module__}.{type(m).__name__})" for name, m in list(modules.items())[:3]]
    return ", ".join(first) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")


def _choose(model: nn.Module, layers: Iterable[int | str] | None) -> dict[str, nn.Module]:
    known, other = _routable(model)
    if layers is None:
        if other:
            raise ValueError(f"model: no routed form of {_named(other)}; name the others with layers to leave it as is")
        if not known:
            raise ValueError(f"model: {type(model).__name__} has no global self-attention that can be routed")
        return known
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected indices or names of attention modules, got {layers!r}")
    names, chosen = list(known), {}
    for layer in layers:
        if isinstance(layer, int) and not isinstance(layer, bool):
            if not -len(names) <= layer < len(names):
                raise ValueError(f"layers: expected indices in [0, {len(names)}), got {layer}")
            chosen[names[layer]] = known[names[layer]]
        elif not isinstance(layer, str):
            raise TypeError(f"layers: expected indices or names of attention modules, got {layer!r} among them")
        elif layer in known:
            chosen[layer] = known[layer]
        elif layer in other:
            raise ValueError(f"layers: no routed form of {_named({layer: other[layer]})}")
        else:
            raise ValueError(f"layers: expected indices or names among {names}, got {layer!r}")
    if not chosen:
        raise ValueError("layers: expected at least one layer, got none")
    return chosen


def check_routable(
    model: nn.Module, layers: Iterable[int | str] | None
) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The attention modules to route, by name, and the patch embedding if the map's size must come from it.

    Raises:
        TypeError, ValueError: where a routed forward could not be right.
    """
    chosen = _choose(model, layers)
    if type(getattr(_token_model(model), "patch_drop", None)) not in (nn.Identity, type(None)):
        raise ValueError("model: patch_drop_rate > 0 leaves no full map to route over, expected patch_drop_rate=0")
    for name, module in chosen.items():
        if module.attn_drop.p > 0:
            raise ValueError(
                f"model: {name}.attn_drop is {module.attn_drop.p}, routed attention needs attn_drop_rate=0"
            )
    if all(issubclass(FAMILIES[original_type(m)], RoutedMap) for m in chosen.values()):
        return chosen, None
    owner = _token_model(model)
    embed = getattr(owner, "patch_embed", None)
    if not isinstance(embed, (PatchEmbed, HybridEmbed)) or not hasattr(owner, "num_prefix_tokens"):
        raise ValueError(
            f"model: {type(owner).__name__} has {type(embed).__name__} as patch_embed, expected timm.layers.PatchEmbed "
            "or HybridEmbed (and num_prefix_tokens), which tell the size of the map"
        )
    return chosen, embed


def _token_model(model: nn.Module) -> nn.Module:
    """The model with the patch embedding: timm's ``features_only`` wraps it as ``model``."""
    return model if hasattr(model, "patch_embed") else getattr(model, "model", model)


def _block_of(name: str, model: nn.Module) -> nn.Module:
    """The block around an attention module: the outermost element of a list of modules on the way to it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), (nn.Sequential, nn.ModuleList)):
            return model.get_submodule(".".join(parts[: i + 1]))
    return model.get_submodule(name.rpartition(".")[0])


def route_attention(
    model: nn.Module,
    *,
    window_size: int | tuple[int, int],
    num_heavy_tokens_kv: TokenCount,
    num_heavy_tokens_q: TokenCount | None = None,
    router: str = "mean_query",
    layers: Iterable[int | str] | None = None,
) -> nn.Module:
    """Replace global self-attention by routed attention, in place, reusing the pretrained weights.

    Every token attends to its window, the prefix tokens (class, registers) and the routed keys, in one softmax:
    ``num_heavy_tokens_kv=1.0`` gives the original outputs. The state dict stays the original's (with
    ``router="learned"`` plus ``*.routing.*``). Works on what uses ``timm.layers.Attention`` (ViT, DeiT-3, DINOv2,
    SigLIP, AIMv2), ``AttentionRope`` and EVA's attention (EVA-02, DINOv3), BEiT, SAM's global blocks, and VOLO.

    Args:
        model: a timm model with a patch embedding; at sizes other than its own it needs what timm needs
            (``dynamic_img_size=True``).
        window_size: side of the windows in tokens, or (height, width).
        num_heavy_tokens_kv: routed keys, an int >= 1 (that many) or a float in (0, 1] (that share of the map).
        num_heavy_tokens_q: tokens that attend to the routed keys, likewise; None: all.
        router: see :class:`~colt5_vision.pretrained.PretrainedRoutedAttention`; ``"learned"`` starts as
            ``"mean_query"`` and is trained by :func:`distill_routers`.
        layers: indices (among the model's global self-attentions) or names of the attention modules; None: all.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: naming the argument or module; the model is then untouched.

    Source: CoLT5 (arXiv 2303.09752); DESIGN sections 2.2 and 2.3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if routed_layers(model):
        raise ValueError("model: is routed already, call unroute_attention first")
    chosen, embed = check_routable(model, layers)
    routing = {}
    for name, module in chosen.items():
        weight = module.proj.weight
        routing[name] = PretrainedRoutedAttention(
            window_size=window_size,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            num_heavy_tokens_q=num_heavy_tokens_q,
            router=router,
            dim=(module.qkv or module.q_proj).in_features if router == "learned" else None,
            device=weight.device,
            dtype=weight.dtype,
        ).train(module.training)
    # nothing can fail from here on
    if embed is not None:
        map_size = MapSize()
        embed.register_forward_hook(_PatchEmbedHook(map_size))
        marker = BlockMarker(map_size)
        for block in {
            _block_of(name, model) for name, m in chosen.items() if issubclass(FAMILIES[type(m)], RoutedTokens)
        }:
            block.register_forward_pre_hook(marker, with_kwargs=True)
    for name, module in chosen.items():
        module.__class__ = FAMILIES[type(module)]
        module.routing = routing[name]
        if isinstance(module, RoutedTokens):
            module.map_size, module.prefix = map_size, _token_model(model).num_prefix_tokens
    return model


def unroute_attention(model: nn.Module) -> nn.Module:
    """Undo :func:`route_attention`, in place: modules, weights and outputs are what they were.

    Raises:
        ValueError: if nothing in ``model`` is routed.
    """
    if not routed_layers(model):
        raise ValueError("model: nothing is routed, expected a model that went through route_attention")
    for module in model.modules():
        if isinstance(module, RoutedSelfAttention):
            module.__class__ = ORIGINALS[type(module)]
            del module.routing
            for name in ("map_size", "prefix", "teacher", "served_pass"):
                module.__dict__.pop(name, None)
    remove_hooks(model, (_PatchEmbedHook, BlockMarker))
    return model
