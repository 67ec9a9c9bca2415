"""Routed attention in a diffusers pipeline or model, and back: one call each."""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from colt5_vision.checks import check_pair
from colt5_vision.reroute import BlockMarker, remove_hooks

from .config import RoutedAttentionConfig
from .layers import Layer, attention_layers, choose, counted, exact_of, models_of
from .processor import RoutedAttnProcessor, routed_in_place_of
from .sizes import MapSizeHook, Timestep, TimestepHook, entrance, patch_size

__all__ = [
    "RoutedAttentionReport",
    "disable_routed_attention",
    "enable_routed_attention",
    "routed_layers",
]

_HOOKS = (MapSizeHook, TimestepHook, BlockMarker)


class RoutedAttentionReport(dict):
    """Names of the routed layers and the tokens they see at ``sample_size`` (None: unknown before a run).

    Attributes:
        exact: names of the other attention layers, and why each keeps full attention.
    """

    def __init__(self, routed: dict[str, int | None], exact: dict[str, str]):
        super().__init__(routed)
        self.exact = exact

    def __str__(self) -> str:
        lines = [f"{len(self)} layers routed, {len(self.exact)} as they were"]
        lines += [f"  {name}: {'?' if tokens is None else f'{tokens:,}'} tokens" for name, tokens in self.items()]
        lines += [f"  {name}: full attention, {reason}" for name, reason in self.exact.items()]
        return "\n".join(lines)


def _sample_size(model: nn.Module, pipe, given: tuple[int, int] | None) -> tuple[int, int] | None:
    """(H, W) of the latents to expect."""
    if given is not None:
        return given
    size = getattr(getattr(model, "config", None), "sample_size", None)
    size = getattr(pipe, "default_sample_size", None) if size is None else size
    return None if size is None else check_pair("sample_size", size)


def enable_routed_attention(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: RoutedAttentionConfig | None = None,
    *,
    sample_size: int | tuple[int, int] | None = None,
) -> RoutedAttentionReport:
    """Route the self-attention of a diffusers pipeline or model, in place, with its pretrained weights.

    For UNets (Stable Diffusion 1.5, 2.1, XL, DDPM, with their ControlNets), DiT, PixArt, SD3 and Flux. Do it after
    loading IP-Adapters and fusing projections (both replace processors), and before offloading and compiling. Call
    :func:`disable_routed_attention` to undo it.

    Args:
        pipe_or_model: a pipeline, whose denoising models are routed, not its autoencoder; or a model.
        config: None: :class:`RoutedAttentionConfig` as it is by default.
        sample_size: (H, W) of the latents to expect, for the report and its check; default: the model's own. Any other
            size runs as well, but for a Flux model that is compiled as a whole: it needs to be told and runs at that.

    Returns:
        :class:`RoutedAttentionReport`; print it.

    Raises:
        TypeError, ValueError: naming the argument, or saying why no layer would be routed; nothing is changed then.

    Source: CoLT5 (arXiv 2303.09752); DESIGN sections 2.2 and 2.3.
    """
    if routed_layers(pipe_or_model):
        raise ValueError("pipe_or_model: is routed already, call disable_routed_attention first")
    return apply(plan(pipe_or_model, config, sample_size=sample_size))


@dataclass
class Plan:
    """What routing would change."""

    config: RoutedAttentionConfig
    models: list[nn.Module]
    told: tuple[int, int] | None
    clocks: dict[nn.Module, TimestepHook]
    layers: dict[str, Layer]
    processors: dict[str, RoutedAttnProcessor]
    report: RoutedAttentionReport


def plan(
    pipe_or_model: DiffusionPipeline | nn.Module,
    config: RoutedAttentionConfig | None = None,
    *,
    sample_size: int | tuple[int, int] | None = None,
    must_route: bool = True,
) -> Plan:
    """All that can fail of :func:`enable_routed_attention`; changes nothing.

    Args:
        must_route: raise if no layer would be routed at ``sample_size``.
    """
    config = RoutedAttentionConfig() if config is None else config
    if not isinstance(config, RoutedAttentionConfig):
        raise TypeError(f"config: expected a RoutedAttentionConfig, got {type(config).__name__}")
    sample_size = None if sample_size is None else check_pair("sample_size", sample_size)
    models = models_of(pipe_or_model)
    pipe = pipe_or_model if isinstance(pipe_or_model, DiffusionPipeline) else None
    layers = {prefix + layer.name: layer for prefix, model in models.items() for layer in attention_layers(model)}
    sizes = {model: _sample_size(model, pipe, sample_size) for model in models.values()}
    usual = next((size for size in sizes.values() if size is not None), None)  # a ControlNet does not say its own
    chosen = choose(layers, config.layers)
    exact = {name: layer.reason or "not among layers" for name, layer in layers.items() if name not in chosen}
    routed = {}
    for name, layer in chosen.items():
        tokens = layer.tokens(sizes[layer.model] or usual)
        if tokens is not None and tokens < config.min_tokens:
            exact[name] = f"{tokens} tokens, fewer than min_tokens = {config.min_tokens}"
        elif tokens is not None and not config.needs_timestep and config.settings(tokens) is None:
            exact[name] = f"the schedule says so for {tokens} tokens"
        else:
            routed[name] = tokens
    if not routed and (must_route or not chosen):
        what = f"{type(pipe_or_model).__name__} with latents of {usual}"
        reasons = counted(list(exact.values())) or "it has no attention processors"
        hint = ". For larger latents tell sample_size=(H, W)" if chosen else ""
        raise ValueError(f"pipe_or_model: no layer of {what} would be routed: {reasons}{hint}")
    processors = {name: _processor(config, layer) for name, layer in chosen.items()}
    timed = {layer.model for layer in chosen.values()} if config.needs_timestep else ()
    clocks = {model: TimestepHook(model, Timestep()) for model in timed}
    report = RoutedAttentionReport(routed, exact)
    return Plan(config, list(models.values()), sample_size, clocks, chosen, processors, report)


def apply(planned: Plan) -> RoutedAttentionReport:
    """Carry out a plan; nothing in it fails."""
    for model in planned.models:
        _clean(model)
    for model, clock in planned.clocks.items():  # the hooks of sizes read them
        model.register_forward_pre_hook(clock, with_kwargs=True)
    hooks: dict[nn.Module, MapSizeHook] = {}
    for name, layer in planned.layers.items():
        parent, processor = layer.parent, planned.processors[name]
        timestep = planned.clocks[layer.model].timestep if planned.clocks else None
        if parent is None:
            processor.timestep = timestep
        else:
            if parent not in hooks:
                hooks[parent] = _hook_size(parent, planned.told, timestep)
            processor.map_size = hooks[parent].map_size
            _mark(layer, hooks[parent])
        layer.attn.set_processor(processor)
    return planned.report


def _processor(config: RoutedAttentionConfig, layer: Layer) -> RoutedAttnProcessor:
    attn, where = layer.attn, {}
    if config.router == "learned":
        weight = attn.to_q.weight
        plain = weight.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        # a float8 weight is cast for storage; an offloaded one lies on no device
        where = {"dtype": weight.dtype if plain else torch.float32, "dim": attn.to_k.out_features}
        where["device"] = "cpu" if weight.device.type == "meta" else weight.device
    return routed_in_place_of(exact_of(attn), config, **where).train(attn.training)


def _hook_size(parent: nn.Module, sample_size: tuple[int, int] | None, timestep: Timestep | None) -> MapSizeHook:
    told = None if sample_size is None else (sample_size[0] // patch_size(parent), sample_size[1] // patch_size(parent))
    hook = MapSizeHook(parent, told, timestep)
    entrance(parent).register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def _mark(layer: Layer, hook: MapSizeHook) -> None:
    """Mark what runs again in backward when checkpointed: an element of a list of blocks of the parent."""
    local = layer.name[len(layer.parent_name) :].lstrip(".")
    block = layer.parent.get_submodule(".".join(local.split(".")[:2]))
    if not any(isinstance(present, BlockMarker) for present in block._forward_pre_hooks.values()):
        block.register_forward_pre_hook(BlockMarker(hook.map_size), with_kwargs=True)


def _clean(model: nn.Module) -> bool:
    """Put the processors back that were there before, take the hooks off; whether there was anything."""
    routed = [m for m in model.modules() if isinstance(getattr(m, "processor", None), RoutedAttnProcessor)]
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, _HOOKS)]
    for attn in routed:
        attn.set_processor(exact_of(attn))
    for hook in hooks:
        if isinstance(hook, MapSizeHook):  # diffusers may hold processors that it puts back when it unfuses
            hook.map_size.begin(None)
    remove_hooks(model, _HOOKS)
    return bool(routed or hooks)


def disable_routed_attention(pipe_or_model: DiffusionPipeline | nn.Module) -> None:
    """Undo :func:`enable_routed_attention`, in place: processors, weights and outputs are what they were.

    Processors that diffusers has put in place of the routed ones since then stay.

    Raises:
        TypeError, ValueError: if it is no pipeline or model, or was never routed.
    """
    cleaned = [_clean(model) for model in models_of(pipe_or_model).values()]
    if not any(cleaned):
        raise ValueError("pipe_or_model: nothing is routed, expected one that went through enable_routed_attention")


def routed_layers(pipe_or_model: DiffusionPipeline | nn.Module) -> dict[str, RoutedAttnProcessor]:
    """Names of the layers that are routed now, and their processors.

    diffusers replaces processors without a word in ``set_attn_processor``, ``set_default_attn_processor`` (which UNets
    with conditions refuse while routed), ``enable_attention_slicing``, ``enable_xformers_memory_efficient_attention``,
    ``fuse_qkv_projections`` (but for Flux), ``load_ip_adapter`` and ``unload_ip_adapter``: what they replaced is missing
    here.

    Raises:
        TypeError: if it is no pipeline or model.
    """
    found = {}
    for prefix, model in models_of(pipe_or_model).items():
        for layer in attention_layers(model):
            processor = layer.attn.processor
            # unload_ip_adapter makes every processor anew, without what tells the size
            alone = layer.parent is not None and getattr(processor, "map_size", None) is None
            if isinstance(processor, RoutedAttnProcessor) and not alone:
                found[prefix + layer.name] = processor
    return found
