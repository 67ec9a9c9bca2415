"""The one mechanism: while a routed layer's forward runs, calls of torch's
``scaled_dot_product_attention`` go to the routed attention.

The layer stays what it is: its class, its processors, its parameters and its state dict. Two hooks
on it enter and leave a mode that sees torch's functions:

    layer(x):   EnterHook -> forward of the layer -> LeaveHook
                                |
                                +-- scaled_dot_product_attention(q, k, v) -> RoutedLayer.attend

Hooks run whatever stands in ``layer.forward``: offloading, caches and wrappers may replace it.
"""

import sys
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_internals import (
    begins_no_graph,
    function_modes,
    is_compiling,
    pop_function_mode,
    pop_last_function_mode,
    push_function_mode_below,
)
from ..ops.sdpa import scaled_dot_product_attention
from .adapter import LayerSpec, Switch
from .call import Call, arrange, dense_bias, restore, whole_sequence, with_heads
from .config import RoutedAttentionConfig
from .grouped import GroupedAttention
from .heads import all_heads, return_tokens
from .report import Calls
from .sampled import SampledAttention
from .site import Pass, Scope, Site

_SDPA = nn.functional.scaled_dot_product_attention
NOT_CALLED = (
    "no call of torch's scaled_dot_product_attention came through: the layer made none, or another "
    "hook or mode answered it"
)
COMPILED_EXCHANGE = "compiled context parallelism computes gradients of full attention"


class RoutedLayer:
    """What is routed of one layer: shared by its hooks, kept beside the model, no module of it.

    Attributes:
        attention: takes the place of ``scaled_dot_product_attention``, with its learned router.
        config: the settings it was routed with.
        calls: live :class:`~colt5_vision.swap.report.Calls`.
        teacher: of a distillation in progress: called in place of ``attention``.
        least: by type of device and dtype, from how many tokens on it is routed, and why smaller
            maps are not; under None, elsewhere.
    """

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        config: RoutedAttentionConfig,
        attention: SampledAttention | GroupedAttention,
        scope: Scope,
    ):
        self.name, self.spec, self.config = name, spec, config
        self.attention, self.scope = attention, scope
        self.calls = Calls()
        self.teacher = None
        self.least = config.least_tokens(spec.key_channels)
        self.own: dict[str, Any] = {}  # values of the layer's switches when it is not routed

    def attend(self, mode: "RerouteMode", call: Call) -> Tensor:
        """In place of ``scaled_dot_product_attention``."""
        shape = call.query.shape
        call = with_heads(call, self.spec.heads)
        site = mode.now.site
        exchanged = site is not None and site.shards is not None and self.in_its_place()
        if exchanged:
            call, lengths = whole_sequence(call, site)

        out = self.route(mode.layer, mode.now, call)
        reason = out if isinstance(out, str) else None
        if is_compiling():
            self.calls.note_graph()
        else:
            self.calls.count(reason)
            mode.reasons.append(reason)
        if reason is not None:
            out = self.exact(mode.layer, site, call)
        if exchanged:
            out = return_tokens(out, shape[1], lengths, site.group)
        return out if self.spec.heads is None else out.reshape(shape)

    def route(self, layer: nn.Module, now: Pass, call: Call) -> Tensor | str:
        """The routed attention of a call, or why it stays exact."""
        # what cannot be routed, or is not asked for
        site = now.site
        if site is None:
            return now.reason
        if site.more and self.spec.place == "map":  # the layer sees the first one alone
            site = site._replace(more=())
        if call.dropout_p > 0:
            return "dropout of attention weights"
        if call.is_causal:
            return "causal attention"
        where = (call.query.device.type, call.query.dtype)
        least = self.least.get(where, self.least[None])
        settings = self.config.settings(site.tokens, now.rules, least)
        if isinstance(settings, str):
            return settings
        bias = self._own_bias(layer, site, call)
        how = arrange(call, site, self.spec.place, self.spec.masks, bias)
        if isinstance(how, str):
            return how
        if self.attention.router == "grouped":
            if how.pair_bias is not None:
                return "a bias of pairs, which router='grouped' cannot take"
            if site.group is not None:
                return "heads in several processes, which router='grouped' cannot take"

        # attention over the map, in place
        attend = self.attention if self.teacher is None else partial(self.teacher, self)
        out = attend(
            how.q,
            how.k,
            how.v,
            grid_size=site.grid_size,
            num_prefix_tokens=how.num_others,
            features=self._features(how.features, site),
            key_mask=how.key_mask,
            pair_bias=how.pair_bias,
            scale=call.scale,
            group=site.group,
            **settings,
        )
        return restore(out, how)

    def _features(self, features: Tensor, site: Site) -> Tensor | None:
        """What a learned router reads."""
        if self.attention.router != "learned":
            return None
        return all_heads(features, self.spec.key_channels, site.group)

    def exact(self, layer: nn.Module, site: Site | None, call: Call) -> Tensor:
        """Full attention, as the layer does it when it is not routed."""
        bias = self._own_bias(layer, site, call)
        if bias is not None:
            mask = dense_bias(bias, call.query.shape[2], call.key.shape[2], call.query.device)
            given = call.attn_mask
            if given is not None and given.ndim > 0:
                off = torch.zeros_like(mask[..., :1, :1]).masked_fill
                mask = mask + (given if given.dtype != torch.bool else off(~given, -torch.inf))
            call = call._replace(attn_mask=mask.to(call.query.dtype))
        return scaled_dot_product_attention(*call[:6], scale=call.scale, enable_gqa=call.enable_gqa)

    def _own_bias(self, layer: nn.Module, site: Site | None, call: Call):
        make = self.spec.pair_bias
        return None if make is None else make(layer, call.query, site)

    def in_its_place(self) -> bool:
        """Whether parts of the sequence are to be exchanged that the layer itself would exchange:
        its hook has switched that off, which a compiled one does not."""
        own = (self.own.get(switch.path, ...) for switch in self.spec.exchange)
        return any(value not in (None, ...) for value in own)

    def set_switches(self, layer: nn.Module, switches: tuple[Switch, ...]) -> None:
        """Give the layer's switches their values; remember its own."""
        for switch in switches:
            found = _attribute(layer, switch)
            if found is not None and found[2] is not switch.value:
                self.own[switch.path] = found[2]
                setattr(found[0], found[1], switch.value)

    def reset_switches(self, layer: nn.Module, switches: tuple[Switch, ...]) -> None:
        """Give the layer's switches their own values back."""
        for switch in switches:
            found = _attribute(layer, switch)
            if found is None or found[2] is not switch.value or switch.path not in self.own:
                continue
            own = self.own.pop(switch.path)
            delattr(found[0], found[1]) if own is ... else setattr(found[0], found[1], own)


def _attribute(layer: nn.Module, switch: Switch) -> tuple[Any, str, Any] | None:
    """The object that holds a switch, its name there, and its value: ``...`` if it is the class's;
    None: the layer has none."""
    *way, name = switch.path.split(".")
    holder = layer
    for step in way:
        holder = getattr(holder, step, None)
    if holder is None or not hasattr(holder, name):
        return None
    return holder, name, vars(holder).get(name, ...)


class RerouteMode(TorchFunctionMode):
    """While a layer's forward runs: sends calls of ``scaled_dot_product_attention`` to it.

    It lies below the other modes of the thread, which are thus asked first.
    """

    def __init__(self, routed: RoutedLayer, layer: nn.Module, now: Pass):
        super().__init__()
        self.routed, self.layer, self.now = routed, layer, now
        self.reasons: list[str | None] = []
        # of the forward; an interrupted one (KeyboardInterrupt) leaves the mode behind
        self.frame: FrameType | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not _SDPA or self.left_behind():
            return func(*args, **kwargs)
        call = Call(*args, **kwargs)
        if isinstance(call.query, torch.fx.Proxy):
            return _traced(self, call)
        return self.routed.attend(self, call)

    def left_behind(self) -> bool:
        if self.frame is None:
            return False
        frame = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


class EnterHook:
    """A pre-hook of a routed layer."""

    def __init__(self, routed: RoutedLayer):
        self.routed = routed

    @begins_no_graph
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        routed, now = self.routed, self.routed.scope.serve(self.routed)
        shards = None if now.site is None else now.site.shards
        if is_compiling():
            if shards is not None and torch.is_grad_enabled():
                now = Pass(COMPILED_EXCHANGE)
            RerouteMode(routed, layer, now).__enter__()
            return

        # the layer's switches; an interrupted forward may have left some behind
        mode = RerouteMode(routed, layer, now)
        routed.set_switches(layer, routed.spec.switches)
        (routed.reset_switches if shards is None else routed.set_switches)(
            layer, routed.spec.exchange
        )

        # the mode
        for old in function_modes():
            if isinstance(old, RerouteMode) and old.left_behind():
                pop_function_mode(old)
        mode.frame = sys._getframe(1)
        push_function_mode_below(mode)


class LeaveHook:
    """A hook of a routed layer, called also when its forward has failed (without an output)."""

    def __init__(self, routed: RoutedLayer):
        self.routed = routed

    @begins_no_graph
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if is_compiling():
            pop_last_function_mode()
            return
        self.routed.reset_switches(layer, self.routed.spec.exchange)
        for mode in function_modes():
            if isinstance(mode, RerouteMode) and mode.routed is self.routed:
                pop_function_mode(mode)
                mode.frame = None
                if output is not None:
                    self._told(mode)

    def _told(self, mode: RerouteMode) -> None:
        if not mode.reasons and self.routed.calls.compiled:
            return  # the call was in a graph
        if not mode.reasons:
            self.routed.calls.count(NOT_CALLED)
            mode.reasons.append(NOT_CALLED)
        if None not in mode.reasons:
            self.routed.calls.warn_if_never_routed(self.routed.name, mode.reasons)


class TracedCall:
    """A call in a graph of torch.fx: a leaf, as the attention it stands for."""

    def __init__(self, mode: RerouteMode):
        self.routed, self.layer = mode.routed, mode.layer
        self.rules = mode.now.rules
        self.__name__ = self.__qualname__ = "routed_attention"
        self.__module__ = __name__

    def __call__(self, site: tuple, *call) -> Tensor:
        grid, before, behind, more = site
        now = Pass(Site(grid, before, behind, more=more), self.rules)
        return self.routed.attend(RerouteMode(self.routed, self.layer, now), Call(*call))


def _traced(mode: RerouteMode, call: Call):
    mode.reasons.append(None)
    site = mode.now.told
    if site is None:
        raise ValueError(f"torch.fx: the site of the map is unknown: {mode.now.reason}")
    args = (site.sizes, *call)
    return call.query.tracer.create_proxy("call_function", TracedCall(mode), args, {})
