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
from .grouped import GROUPED, GroupedAttention
from .heads import all_heads, return_tokens
from .learned import LEARNED
from .report import Calls
from .sampled import SampledAttention
from .site import Pass, Scope, Site
from .switches import Held, Switches

_SDPA = nn.functional.scaled_dot_product_attention
NOT_CALLED = (
    "no call of torch's scaled_dot_product_attention came through: the layer made none, or another "
    "hook or mode answered it"
)
_OTHERS = (0, *(32 << i for i in range(12)))  # tokens of a text or other images: 32 to 65,536
COMPILED_EXCHANGE = "compiled context parallelism computes gradients of full attention"


class RoutedLayer:
    """What is routed of one layer: shared by its hooks, kept beside the model, no module of it.

    Attributes:
        attention: takes the place of ``scaled_dot_product_attention``, with its learned router.
        config: the settings it was routed with.
        calls: live :class:`~colt5_vision.swap.report.Calls`.
        teacher: of a distillation in progress: called in place of ``attention``.
        least: for sequences with so many tokens or more that are not of the map: by type of device
            and dtype, from how many tokens on it is routed, and why smaller maps are not; under
            None, elsewhere.
    """

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        config: RoutedAttentionConfig,
        attention: SampledAttention | GroupedAttention,
        scope: Scope,
        switches: Switches,
    ):
        self.name, self.spec, self.config = name, spec, config
        self.attention, self.scope, self.switches = attention, scope, switches
        self.calls = Calls()
        self.teacher = None
        # known beforehand: a compiled graph then compares a few numbers only
        self.least = [(n, config.least_tokens(spec.key_channels, n)) for n in _OTHERS]

    def attend(self, mode: "RerouteMode", call: Call) -> Tensor:
        """In place of ``scaled_dot_product_attention``."""
        shape = call.query.shape
        call = with_heads(call, self.spec.heads)
        site = mode.now.site
        exchanged = site is not None and site.shards is not None and mode.exchanges
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
        # what cannot be routed
        site = now.site
        if site is None:
            return now.reason
        if site.more and self.spec.place == "map":  # the layer sees the first one alone
            site = site._replace(more=())
        if call.dropout_p > 0:
            return "dropout of attention weights"
        if call.is_causal:
            return "causal attention"

        # what is not asked for
        settings = self.config.settings(site.tokens, now.rules, self._least(call, site))
        if isinstance(settings, str):
            return settings

        # what this router cannot take
        bias = self._own_bias(layer, site, call)
        how = arrange(call, site, self.spec.place, self.spec.masks, bias)
        if isinstance(how, str):
            return how
        if self.attention.router in GROUPED:
            if how.pair_bias is not None:
                return f"a bias of pairs, which router={self.attention.router!r} cannot take"
            if site.group is not None:
                router = self.attention.router
                return f"heads in several processes, which router={router!r} cannot take"

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

    def _least(self, call: Call, site: Site) -> tuple[int, str]:
        """From how many tokens on maps are routed beside what else is in this call, and the reason
        of smaller ones."""
        others, every = call.key.shape[-2] - site.tokens, self.least[0][1]
        for number, found in self.least[1:]:
            if others < number:
                break
            every = found
        return every.get((call.query.device.type, call.query.dtype), every[None])

    def _features(self, features: Tensor, site: Site) -> Tensor | None:
        """What a learned router reads."""
        if self.attention.router not in LEARNED:
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


class RerouteMode(TorchFunctionMode):
    """While a layer's forward runs: sends calls of ``scaled_dot_product_attention`` to it.

    It lies below the other modes of the thread, which are thus asked first.
    """

    def __init__(self, routed: RoutedLayer, layer: nn.Module, now: Pass):
        super().__init__()
        self.routed, self.layer, self.now = routed, layer, now
        self.reasons: list[str | None] = []
        self.held: list[Held] = []  # the layer's switches
        # whether the layer itself would exchange parts of the sequence, and is kept from it
        self.exchanges = False
        self.frame: FrameType | None = None  # of the forward

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not _SDPA or self.left_behind():
            return func(*args, **kwargs)
        call = Call(*args, **kwargs)
        if isinstance(call.query, torch.fx.Proxy):
            return _traced(self, call)
        return self.routed.attend(self, call)

    def hold(self, switches: tuple[Switch, ...]) -> bool:
        """Set switches of the layer; whether one had a value that is not None."""
        held = self.routed.switches.hold(self.layer, switches)
        self.held += held
        return any(one.own not in (None, ...) for one in held)

    def release(self) -> None:
        """Set them back."""
        self.routed.switches.release(self.held)
        self.held = []

    def left_behind(self) -> bool:
        """Whether its forward is over without the hook that leaves: interrupted, or exported and
        failed."""
        if self.frame is None:
            return False
        if torch.compiler.is_dynamo_compiling() and self.seen_left_behind():
            return True
        frame = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None

    @torch.compiler.assume_constant_result
    def seen_left_behind(self) -> bool:
        """The same, asked by a graph of somebody else's, which can hold no frames."""
        return self.left_behind()


def forget_left_behind() -> None:
    """Leave the modes of this thread whose forwards are over."""
    for mode in function_modes():
        if isinstance(mode, RerouteMode) and mode.left_behind():
            pop_function_mode(mode)
            mode.release()


class EnterHook:
    """A pre-hook of a routed layer."""

    def __init__(self, routed: RoutedLayer, layer: nn.Module):
        self.routed, self.layer = routed, layer

    # called when a graph is made, not when it runs; torch 2.11 takes no module as its argument
    @torch.compiler.assume_constant_result
    def keep_switches(self) -> bool:
        """The layer becomes part of a graph, in which its switches are as they are now."""
        self.routed.switches.keep(self.routed.name, self.layer, self.routed.spec.switches)
        return True

    @begins_no_graph
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        routed, now = self.routed, self.routed.scope.serve(self.routed)
        shards = None if now.site is None else now.site.shards
        if is_compiling():
            if shards is not None and torch.is_grad_enabled():
                now = Pass(COMPILED_EXCHANGE)
            mode = RerouteMode(routed, layer, now)
            if torch.compiler.is_dynamo_compiling():
                self.keep_switches()
                mode.__enter__()
            else:  # an export that fails does not call the hook that leaves
                forget_left_behind()
                mode.hold(routed.spec.switches)
                mode.frame = sys._getframe(1)
                push_function_mode_below(mode)
            return

        # the layer's switches, and the mode
        forget_left_behind()
        mode = RerouteMode(routed, layer, now)
        mode.hold(routed.spec.switches)
        if shards is not None:
            mode.exchanges = mode.hold(routed.spec.exchange)
        mode.frame = sys._getframe(1)
        push_function_mode_below(mode)


class LeaveHook:
    """A hook of a routed layer, called also when its forward has failed (without an output)."""

    def __init__(self, routed: RoutedLayer):
        self.routed = routed

    @begins_no_graph
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            pop_last_function_mode()
            return
        for mode in function_modes():
            if isinstance(mode, RerouteMode) and mode.routed is self.routed:
                pop_function_mode(mode)
                mode.frame = None
                mode.release()
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
