"""One verb for one act: route the attention of a model or pipeline, in place, and undo it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .._torch_internals import forget_compiled_graphs, hooks_of, put_hook, remove_hooks
from ..checks import check_pair, token_count
from .adapter import LayerSpec, Part, adapters_of
from .config import MIN_TOKENS, TOO_LITTLE_GAIN, RoutedAttentionConfig
from .cost import Place
from .grouped import GROUPED, GroupedAttention
from .learned import LEARNED
from .report import RoutedAttentionReport, Warned
from .reroute import EnterHook, LeaveHook, RoutedLayer, forget_left_behind
from .sampled import SampledAttention
from .site import ClockHook, EntranceHook, ExitHook, MarkHook, Scope
from .switches import Switches
from .wrappers import clean_name, models_of

__all__ = ["route_attention", "routed_layers", "unroute_attention", "why_not"]

_CLOCK, _ENTRANCE, _EXIT, _MARK, _ENTER, _LEAVE = _KEYS = tuple(
    f"colt5_vision.{name}" for name in ("clock", "entrance", "exit", "mark", "enter", "leave")
)


def route_attention(
    model: Any,
    config: RoutedAttentionConfig | None = None,
    *,
    sample_size: int | tuple[int, int] | None = None,
    **settings,
) -> RoutedAttentionReport:
    """Route the self-attention of a pretrained model or pipeline over its maps, in place.

    Every token attends to its window, the tokens that are not of the map (class, registers, text)
    and the routed keys, in one softmax: ``num_heavy_tokens_kv=1.0`` gives the original outputs. The
    model's modules, parameters and state dict stay what they are; learned routers lie beside it.
    :func:`unroute_attention` undoes it bit for bit.

    Args:
        model: a timm model, a transformers model, or a diffusers model or pipeline (its denoising
            models are routed), or a module that holds one.
        config: None: :class:`RoutedAttentionConfig` as it is by default.
        sample_size: (H, W) to expect, of the image in pixels, or of the latents in diffusers; for
            the report and its check. Default: the model's own. Any other size runs as well.
        settings: arguments of the configuration by name, in place of those of ``config``.

    Returns:
        :class:`RoutedAttentionReport`; print it.

    Raises:
        TypeError, ValueError: for an argument that does not fit, or saying why no layer would be
            routed; nothing is changed then.

    Source: CoLT5 (arXiv 2303.09752).
    """
    config = _config(config, settings)
    if routed_layers(model):
        raise ValueError("model: is routed already, call unroute_attention first")
    return apply(plan(model, config, sample_size=sample_size))


def unroute_attention(model: Any) -> None:
    """Undo :func:`route_attention`, in place: modules, weights and outputs are what they were.

    Raises:
        TypeError, ValueError: if it is no model or pipeline, or nothing in it is routed.
    """
    modules = [m for part in models_of(model).values() for m in part.modules()]
    routed = [m for m in modules if any(key in _KEYS for key, _ in hooks_of(m))]
    if not routed:
        raise ValueError("model: nothing is routed, expected one that went through route_attention")
    for module in routed:
        if (layer := _routed(module)) is not None:
            switches = layer.spec.switches + layer.spec.exchange
            layer.switches.reset(layer.name, module, switches)
        remove_hooks(module, _KEYS)
    forget_left_behind()
    forget_compiled_graphs()


def routed_layers(model: Any) -> dict[str, RoutedLayer]:
    """What is routed of each layer, by its name.

    Raises:
        TypeError: if it is no model or pipeline.
    """
    return {
        clean_name(prefix + name): layer
        for prefix, part in models_of(model).items()
        for name, module in part.named_modules()
        if (layer := _routed(module)) is not None
    }


def why_not(model: Any, *, sample_size: int | tuple[int, int] | None = None) -> dict[str, str]:
    """Why attention layers of a model or pipeline cannot be routed, by name; under ``""``, why the
    whole model cannot. Empty: all can.

    Raises:
        TypeError: if it is no model or pipeline.
    """
    parts = _parts(model, _check_size(sample_size))
    layers, left = _layers(parts), _left(parts)
    if not layers:
        left[""] = _nothing(model, left)
    return left


@dataclass
class Chosen:
    """A layer to route: where it is, and what its adapter says."""

    part: Part
    path: str  # in the part's model
    spec: LayerSpec


@dataclass
class Plan:
    """What routing would change."""

    configs: dict[str, RoutedAttentionConfig]  # of each layer chosen
    chosen: dict[str, Chosen]
    attention: dict[str, SampledAttention | GroupedAttention]
    clocks: dict[nn.Module, ClockHook]
    tokens: dict[str, int | None]  # of the layers that will be routed at the sample size
    exact: dict[str, str]
    expected: dict[str, float | None]  # speed-ups of the layers whose tokens are known
    notes: dict[str, str]  # why layers cannot gain anything


def plan(
    model: Any,
    config: RoutedAttentionConfig,
    *,
    by_layer: Mapping[str, RoutedAttentionConfig] | None = None,
    sample_size: int | tuple[int, int] | None = None,
    must_route: bool = True,
) -> Plan:
    """All that can fail of :func:`route_attention`; changes nothing.

    Args:
        by_layer: configurations of single layers by name, in place of ``config``; its schedule.
        must_route: raise if no layer would be routed at ``sample_size``.
    """
    # which layers, each with its configuration
    parts = _parts(model, _check_size(sample_size))
    layers = _layers(parts)
    exact = _left(parts)
    if not layers:
        raise ValueError(f"model: {_nothing(model, exact)}")
    chosen = _choose(layers, exact, config.layers)
    configs = _configs(chosen, config, by_layer or {})
    exact |= {name: "not among layers" for name in layers if name not in chosen}

    # which of them are routed at the sample size
    tokens, expected, notes = {}, {}, {}
    for name, one in chosen.items():
        # with which settings, or why not
        count, own, channels = one.spec.tokens, configs[name], one.spec.key_channels
        place, every = _place(one), own.least_tokens(channels)
        least = every.get(place, every[None])
        settings = {} if count is None else own.settings(count, least=least)

        # how much faster
        if count is not None:
            held = {} if isinstance(settings, str) else settings
            held = {key: value for key, value in held.items() if value is not None}
            as_held = dataclasses.replace(own, schedule=(), **held)
            expected[name] = as_held.expected_speedup(count, channels, place)
            if note := _note(as_held, count):
                notes[name] = note

        # one that a rule may route at some timesteps counts as routed
        if isinstance(settings, str) and not (own.needs_timestep and count >= least[0]):
            gain = f": {expected[name]:.3g}" if settings == TOO_LITTLE_GAIN else ""
            exact[name] = f"{count} tokens: {settings}{gain}"
        else:
            tokens[name] = count

    # none of them
    if must_route and not tokens:
        reasons = _counted([exact[name] for name in chosen])
        bar = f"min_tokens is {config.min_tokens}"
        if config.min_tokens is None:
            bar = f"min_speedup is {config.min_speedup:g}, and with 0 all are routed; where no "
            bar += f"costs are known, min_tokens is {MIN_TOKENS}"
        raise ValueError(
            f"model: no layer of {type(model).__name__} would be routed: {reasons}; for larger "
            f"inputs tell sample_size=(H, W), {bar}"
        )

    # the routed attention of each, and what tells the timestep
    attention = {name: _attention(name, one, configs[name]) for name, one in chosen.items()}
    clocks = {}
    if config.needs_timestep:
        for one in chosen.values():
            part = one.part
            if part.model not in clocks:
                clocks[part.model] = ClockHook(part.model, config.schedule, part.timestep)
    return Plan(configs, chosen, attention, clocks, tokens, exact, expected, notes)


def apply(planned: Plan) -> RoutedAttentionReport:
    """Carry out a plan; nothing in it fails."""
    # what tells the time must be asked before what tells the size
    for model, clock in planned.clocks.items():
        put_hook(model, _CLOCK, clock)

    # layer by layer
    scopes: dict[nn.Module, Scope] = {}
    switches, routed = Switches(), {}
    for name, one in planned.chosen.items():
        # the entrance tells the site, and the modules around the layer pass it on
        model, entrance = one.part.model, one.spec.entrance
        door = model.get_submodule(entrance)
        if door not in scopes:
            scopes[door] = _open_door(door, one, planned.clocks.get(model))
        scope = scopes[door]
        around = _between(entrance, one.path, one.part.entrances[entrance].leads)
        for path in around:
            _mark(model.get_submodule(path), scope)
        for path in around[:-1]:
            for beside in model.get_submodule(path).children():
                _mark(beside, scope, only_backward=True)

        # the layer itself
        module = model.get_submodule(one.path)
        config, attention = planned.configs[name], planned.attention[name]
        layer = RoutedLayer(name, one.spec, config, attention, scope, switches)
        put_hook(module, _ENTER, EnterHook(layer, module))
        put_hook(module, _LEAVE, LeaveHook(layer), after=True)
        routed[name] = layer

    # graphs made before know nothing of it
    forget_compiled_graphs()
    calls = {name: layer.calls for name, layer in routed.items()}
    warned = Warned(len(calls))
    for one in calls.values():
        one.warned = warned
    found = (planned.tokens, planned.exact, calls, planned.expected, planned.notes)
    return RoutedAttentionReport(*found)


def _open_door(door: nn.Module, one: Chosen, clock: ClockHook | None) -> Scope:
    entrance, scope = one.part.entrances[one.spec.entrance], Scope()
    hook = EntranceHook(door, scope, entrance.site, entrance.leads, clock)
    put_hook(door, _ENTRANCE, hook, after=entrance.leads)
    if not entrance.leads:
        put_hook(door, _EXIT, ExitHook(scope), after=True)
    return scope


def _mark(module: nn.Module, scope: Scope, only_backward: bool = False) -> None:
    """Modules around a layer may be checkpointed: several scopes may share one."""
    hook = module._forward_pre_hooks.get(_MARK)
    if hook is None:
        put_hook(module, _MARK, MarkHook([scope], only_backward))
        return
    hook.only_backward = hook.only_backward and only_backward
    if scope not in hook.scopes:
        hook.scopes.append(scope)


def _between(entrance: str, layer: str, leads: bool) -> list[str]:
    """Paths of the modules inside of an entrance (or beside it, if it leads) down to a layer."""
    if entrance == layer:
        return []
    steps, around = layer.split("."), entrance.split(".") if entrance else []
    common = 0
    if leads:
        while common < min(len(steps), len(around)) and steps[common] == around[common]:
            common += 1
    else:
        common = len(around)
    return [".".join(steps[:i]) for i in range(common + 1, len(steps) + 1)]


def _config(config: Any, settings: Mapping[str, Any]) -> RoutedAttentionConfig:
    config = RoutedAttentionConfig() if config is None else config
    if not isinstance(config, RoutedAttentionConfig):
        raise TypeError(f"config: expected a RoutedAttentionConfig, got {type(config).__name__}")
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(settings) - known):
        raise TypeError(f"{unknown[0]}: expected an argument among {sorted(known)}")
    return dataclasses.replace(config, **settings)


def _check_size(sample_size) -> tuple[int, int] | None:
    return None if sample_size is None else check_pair("sample_size", sample_size)


def _parts(model: Any, sample_size: tuple[int, int] | None) -> list[tuple[str, Part]]:
    """Parts of a model or pipeline by prefix; several adapters may find parts of one model."""
    whole = models_of(model)  # checks the type
    inner = whole.get("", model)
    adapters = adapters_of(inner)
    return [pair for one in adapters for pair in one.parts(inner, sample_size).items()]


def _layers(parts: Sequence[tuple[str, Part]]) -> dict[str, Chosen]:
    return {
        clean_name(prefix + path): Chosen(part, path, spec)
        for prefix, part in parts
        for path, spec in part.layers.items()
    }


def _left(parts: Sequence[tuple[str, Part]]) -> dict[str, str]:
    return {
        clean_name(prefix + path): reason
        for prefix, part in parts
        for path, reason in part.left.items()
    }


def _nothing(model: Any, left: Mapping[str, str]) -> str:
    """Why there is no layer to route."""
    kind = type(model).__name__
    if left:
        return f"{kind} has no attention that can be routed: {_counted(list(left.values()))}"
    return (
        f"{kind} has no attention over a map that is known, expected a model of timm, transformers "
        "or diffusers"
    )


def _choose(
    layers: Mapping[str, Chosen], left: Mapping[str, str], wanted: Sequence[int | str] | None
) -> dict[str, Chosen]:
    """The wanted layers: by index among those that can be routed, or by name or pattern, in a
    pipeline with or without the model's prefix."""
    if wanted is None:
        return dict(layers)
    names, chosen = list(layers), set()
    for one in wanted:
        if isinstance(one, int):
            if not -len(names) <= one < len(names):
                raise ValueError(f"layers: expected indices in [0, {len(names)}), got {one}")
            matches = [names[one]]
        else:
            matches = [
                name
                for name in names
                if fnmatchcase(name, one) or fnmatchcase(clean_name(layers[name].path), one)
            ]
        if not matches:
            why = f": {left[one]}" if one in left else f"; there are {', '.join(names[:3])}, ..."
            raise ValueError(f"layers: {one!r} is no layer that can be routed{why}")
        chosen.update(matches)
    return {name: layer for name, layer in layers.items() if name in chosen}


def _configs(
    chosen: Mapping[str, Chosen],
    config: RoutedAttentionConfig,
    by_layer: Mapping[str, RoutedAttentionConfig],
) -> dict[str, RoutedAttentionConfig]:
    """Of each layer chosen, its own or the common one."""
    for name, own in by_layer.items():
        if name not in chosen:
            raise ValueError(f"by_layer: {name!r} is no layer that is routed")
        if own.schedule != config.schedule:  # one clock tells all layers which rules hold
            raise ValueError(f"by_layer: {name}: expected the schedule that all layers have")
    return {name: by_layer.get(name, config) for name in chosen}


def _place(one: Chosen) -> Place:
    """Where the layer is: it need not stay there."""
    weights = list(one.part.model.get_submodule(one.path).parameters())
    dtype = next((p.dtype for p in weights if p.is_floating_point()), torch.float32)
    return (weights[0].device.type if weights else "cpu", dtype)


def _note(config: RoutedAttentionConfig, tokens: int) -> str | None:
    """Why a layer of so many tokens cannot gain anything on any device."""
    if config.router not in GROUPED and math.prod(config.window_size[-2:]) >= tokens:
        return "no more than a window has: nothing is saved"
    keys = token_count("num_heavy_tokens_kv", config.num_heavy_tokens_kv, tokens)
    if keys == tokens and config.router != "window":
        return "all of them routed keys: nothing is saved"
    return None


def _attention(
    name: str, one: Chosen, config: RoutedAttentionConfig
) -> SampledAttention | GroupedAttention:
    where = {}
    if config.router in LEARNED:
        if one.spec.key_channels is None:
            raise ValueError(
                f"router: the width of the keys of {name} is unknown to {config.router!r}"
            )
        weights = one.part.model.get_submodule(one.path).parameters()
        device = next((p.device for p in weights), None)
        # an offloaded layer lies on no device
        away = device is None or device.type == "meta"
        where = {"dim": one.spec.key_channels, "device": None if away else device}
    return config.attention(**where)


def _routed(module: nn.Module) -> RoutedLayer | None:
    hook = module._forward_pre_hooks.get(_ENTER)
    return None if hook is None else hook.routed


def _counted(reasons: list[str]) -> str:
    """Each reason once, with how often it came."""
    return ", ".join(f"{reason} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons))
