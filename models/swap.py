"""Routed attention in place of the global self-attention of a pretrained timm model, and back.

The swap changes the class of an attention module to a subclass, in place. Its forward is timm's own, run with
``scaled_dot_product_attention`` rerouted, so projections, norms, rotary positions, gates and dropouts stay what they are.
"""

from collections.abc import Iterable
from functools import partial

import torch
from timm.layers import Attention, AttentionRope, HybridEmbed, PatchEmbed
from timm.models import beit, eva, vision_transformer_sam, volo
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor, nn

from colt5_vision.checks import TokenCount
from colt5_vision.pretrained import PretrainedRoutedAttention
from colt5_vision.reroute import (
    BlockMarker,
    MapSize,
    RerouteAttention,
    autocast_like,
    read_mask,
)

__all__ = ["route_attention", "routed_layers", "unroute_attention"]

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


class _RoutedSelfAttention:
    """The part common to all families, in front of a timm attention in the order of resolution.

    The swap sets ``routing``, a :class:`~colt5_vision.pretrained.PretrainedRoutedAttention`, and what ``_layout`` needs.
    """

    fused_attn = property(lambda self: True)  # the branch with scaled_dot_product_attention
    teacher = None  # distillation: called in place of the routed attention

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        with RerouteAttention(partial(self._attend, x)):
            return super().forward(x, *args, **kwargs)

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        """Map size and number of prefix tokens of an input."""
        raise NotImplementedError

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        """The module's own relative position bias, as a function of query and key, or None."""

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if dropout_p > 0:
            raise ValueError(f"attn_drop: routed attention has no dropout of its weights, got {dropout_p}")
        if is_causal:
            raise ValueError("is_causal: expected False, routed attention over a map is not causal")
        grid_size, prefix = self._layout(x)
        shape = query.shape
        q, k, v = (t.reshape(x.shape[0], -1, *t.shape[-2:]) for t in (query, key, value))
        q, k, v = autocast_like(q, k, v)
        if attn_mask is not None and attn_mask.ndim == 0:  # BEiT's own bias, see there
            attn_mask = None
        key_mask, given = read_mask(attn_mask, q)
        own = self._pair_bias(q, grid_size)
        pair_bias = given if own is None else own if given is None else lambda i, j: own(i, j) + given(i, j)
        call = {
            "grid_size": grid_size,
            "num_prefix_tokens": prefix,
            "features": x.flatten(1, -2)[:, prefix:],
            "key_mask": key_mask,
            "pair_bias": pair_bias,
            "scale": scale,
        }
        if self.teacher is not None:
            return self.teacher(self, q, k, v, **call).reshape(shape)
        return self.routing(q, k, v, **call).reshape(shape)


class _Tokens(_RoutedSelfAttention):
    """Attention over (B, P + N, C): the map's size comes from the model's patch embedding."""

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        tokens = x.shape[1] - self.prefix
        size = self.map_size.for_tokens(self, tokens)
        if size is None:
            raise ValueError(
                f"x: the size of the map behind these {tokens} tokens is unknown; a routed block runs once for each "
                f"pass through the model's patch embedding (the last one made {self.map_size.size}), not on its own, "
                "and is checkpointed with use_reentrant=False"
            )
        return size, self.prefix


class _Map(_RoutedSelfAttention):
    """Attention over (B, H, W, C)."""

    def _layout(self, x: Tensor) -> tuple[tuple[int, int], int]:
        return (x.shape[1], x.shape[2]), 0


class RoutedAttention(_Tokens, Attention):
    """``timm.layers.Attention``: ViT, DeiT-3, DINOv2, SigLIP, AIMv2."""


class RoutedAttentionRope(_Tokens, AttentionRope):
    """``timm.layers.AttentionRope``; keys are routed after rotation."""


class RoutedEvaAttention(_Tokens, eva.EvaAttention):
    """EVA, EVA-02, DINOv3; keys are routed after rotation."""


class RoutedBeitAttention(_Tokens, beit.Attention):
    """BEiT: the relative position table is read for the pairs of a query and its keys only."""

    def _get_rel_pos_bias(self) -> Tensor:
        return self.relative_position_bias_table.new_zeros(())  # never the whole matrix

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        table = self.relative_position_bias_table
        if table is None:
            return None
        height, width = self.window_size
        if tuple(grid_size) != (height, width):
            raise ValueError(
                f"x: expected the {height} x {width} tokens of the relative position table, got "
                f"{grid_size[0]} x {grid_size[1]}; call model.set_input_size first"
            )
        heads = torch.arange(table.shape[1], device=q.device).view(1, -1, 1, 1, 1)
        from_class, to_class, own_class = (self.num_relative_distance - n for n in (3, 2, 1))

        def bias(i: Tensor, j: Tensor) -> Tensor:
            y = torch.div(i - 1, width, rounding_mode="floor") - torch.div(j - 1, width, rounding_mode="floor")
            x = (i - 1) % width - (j - 1) % width
            entry = (y + height - 1) * (2 * width - 1) + x + width - 1
            entry = torch.where(j == 0, to_class, torch.where(i == 0, from_class, entry))
            entry = torch.where((i == 0) & (j == 0), own_class, entry)
            return table.t()[heads, entry]

        return bias


class RoutedSamAttention(_Map, vision_transformer_sam.Attention):
    """SAM's global attention: decomposed relative positions are added for the pairs of a query and its keys only."""

    use_rel_pos = property(lambda self: False)  # the whole matrix is never made

    def _pair_bias(self, q: Tensor, grid_size: tuple[int, int]):
        if not self.__dict__["use_rel_pos"]:
            return None
        height, width = grid_size
        rows = get_rel_pos(height, height, self.rel_pos_h)
        columns = get_rel_pos(width, width, self.rel_pos_w)
        query = q.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", query, rows.to(q.dtype)).flatten(2, 3)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", query, columns.to(q.dtype)).flatten(2, 3)
        b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1, 1)
        h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1, 1)

        def bias(i: Tensor, j: Tensor) -> Tensor:
            return by_row[b, h, i, torch.div(j, width, rounding_mode="floor")] + by_column[b, h, i, j % width]

        return bias


class RoutedVoloAttention(_Map, volo.Attention):
    """VOLO's self-attention over (B, H, W, C)."""


_FAMILIES = {
    Attention: RoutedAttention,
    AttentionRope: RoutedAttentionRope,
    eva.EvaAttention: RoutedEvaAttention,
    beit.Attention: RoutedBeitAttention,
    vision_transformer_sam.Attention: RoutedSamAttention,
    volo.Attention: RoutedVoloAttention,
}
_ORIGINALS = {routed: family for family, routed in _FAMILIES.items()}


def original_type(module: nn.Module) -> type:
    """timm's class of a module, routed or not."""
    return _ORIGINALS.get(type(module), type(module))


def routed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The routed attention modules of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _RoutedSelfAttention)}


def routed_layers(model: nn.Module) -> dict[str, PretrainedRoutedAttention]:
    """Names of the routed attention modules of a model, and what routes them."""
    return {name: m.routing for name, m in routed_modules(model).items()}


def _windowed(name: str, model: nn.Module) -> bool:
    """SAM's blocks with their own windows hold the same attention module as its global ones."""
    block = model.get_submodule(name.rpartition(".")[0])
    return isinstance(block, vision_transformer_sam.Block) and block.window_size > 0


def _routable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Global self-attention modules by name: those of a supported family, and others."""
    known, other = {}, {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if original_type(module) in _FAMILIES:
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
    if all(issubclass(_FAMILIES[original_type(m)], _Map) for m in chosen.values()):
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
        for block in {_block_of(name, model) for name, m in chosen.items() if issubclass(_FAMILIES[type(m)], _Tokens)}:
            block.register_forward_pre_hook(marker)
    for name, module in chosen.items():
        module.__class__ = _FAMILIES[type(module)]
        module.routing = routing[name]
        if isinstance(module, _Tokens):
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
        if isinstance(module, _RoutedSelfAttention):
            module.__class__ = _ORIGINALS[type(module)]
            del module.routing
            for name in ("map_size", "prefix", "teacher", "served_pass"):
                module.__dict__.pop(name, None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (_PatchEmbedHook, BlockMarker))]:
                del hooks[key]
    return model
