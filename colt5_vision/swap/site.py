"""Where the map lies in the forward in progress: told by what the model was given, in this thread.

A model has one or more *entrances*, modules that are given the map before the attention layers see
its tokens: the model itself, or its patch embedding. A hook of an entrance opens a :class:`Pass`;
layers read it. Each thread has its own, so a model may serve several.

    entrance(latents) -> Pass(site) --+--> layer 1 --> layer 2 --> ...
                                      |      in backward, a checkpointed block runs again on
                                      +----> the very tensor it got first, marked with its pass
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._torch_internals import (
    WeakTensorKeyDictionary,
    begins_no_graph,
    in_backward,
    is_compiling,
)
from .heads import Group, Shards


class Site(NamedTuple):
    """A map, or a volume, among the tokens of a layer; others may follow it, as images to edit do.

    Attributes:
        grid: (T, H, W) in tokens, in raster order; T = 1 for an image.
        before: number of other tokens in front of it (class, registers, text).
        behind: number of other tokens behind all maps.
        order: (B or 1, N) int64, for each token of the raster, which of the map's tokens in the
            sequence it is; None: they are in raster order.
        group: of processes that have the other heads of the layers; None: all heads are here.
        shards: each process of the group is given a part of the sequence; None: all of it.
        more: grids of the maps that follow the first one without a gap.
    """

    grid: tuple[int, int, int]
    before: int = 0
    behind: int = 0
    order: Tensor | None = None
    group: Group = None
    shards: Shards | None = None
    more: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Of all maps together."""
        return sum(frames * height * width for frames, height, width in (self.grid, *self.more))

    @property
    def grid_size(self) -> tuple:
        """As the routed attention takes it."""
        if self.more:
            return (self.grid, *self.more)
        return self.grid if self.grid[0] > 1 else self.grid[1:]

    @property
    def sizes(self) -> tuple:
        """All its numbers."""
        return (self.grid, self.before, self.behind, self.more)


def image_site(height: int, width: int, before: int = 0, behind: int = 0) -> Site:
    """The site of an image of ``height`` x ``width`` tokens."""
    return Site((1, height, width), before, behind)


class Pass:
    """One forward over a map.

    Args:
        site: where the map is, or a text: why that is not known.
        rules: for each rule of the schedule, whether its timesteps hold.
        once: each layer is served once, since nothing tells when the forward is over.
    """

    def __init__(self, site: Site | str, rules: tuple[bool, ...] = (), once: bool = False):
        self.told = site if isinstance(site, Site) else None
        self.reason = "" if isinstance(site, Site) else site
        self.rules = rules
        self.once = once
        self.over = False
        self.served: set[object] = set()  # layers
        # torch.compile makes a constant of an int it finds on an object, but not of a shape
        self.shapes: tuple[Tensor, ...] = ()
        if self.told is not None and not _symbolic(self.told):
            grid, before, behind, more = self.told.sizes
            sizes = ((*grid, before, behind), *more)
            self.shapes = tuple(torch.empty(1, device="cpu").expand(one) for one in sizes)

    @property
    def site(self) -> Site | None:
        if not is_compiling() or not self.shapes:
            return self.told
        first, *more = (tuple(x.shape) for x in self.shapes)
        return Site(first[:3], *first[3:], *self.told[3:6], tuple(more))

    def alike(self, other: "Pass") -> bool:
        """Whether layers see the same in both."""
        if self.told is None or other.told is None:
            return self.told is other.told
        same_order = self.told.order is other.told.order
        return same_order and (self.told.sizes, self.rules) == (other.told.sizes, other.rules)


def _confused(first: Site | None, second: Site | None) -> bool:
    """Whether tokens of one site may be taken for those of another."""
    if None in (first, second) or _symbolic(first) or _symbolic(second):
        return False
    return first.sizes != second.sizes and first.tokens == second.tokens


def _symbolic(site: Site) -> bool:
    """torch.fx traces with proxies in place of numbers."""
    return any(isinstance(n, torch.fx.Proxy) for n in (*site.grid, *site[1:3]))


_SEVERAL = "forwards of several threads over maps of other sizes, of one compiled model"
_SHARING = threading.Lock()


class _Forward:
    """What is in progress in one thread."""

    now: Pass | None = None
    rules: tuple[bool, ...] = ()


class _Local(threading.local):
    """Each thread's own; torch.compile tracks attributes of what it holds, not of its own."""

    def __init__(self):
        self.forward = _Forward()


class Scope:
    """The forward in progress of one entrance, in each thread.

    Copies and pickles of a model have scopes of their own, in which nothing is in progress.
    """

    def __init__(self):
        self.local = _Local()
        self.marks = WeakTensorKeyDictionary()
        # what a compiled layer reads, whose entrance is outside of its graph: torch.compile cannot
        # read what belongs to a thread
        self.shared: Pass | None = None
        self.threads: WeakKeyDictionary[threading.Thread, Pass] = WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    @property
    def now(self) -> Pass | None:
        return self.local.forward.now

    def open(self, new: Pass) -> None:
        """Begin a forward. Of two that began and were not used, neither knows its tokens."""
        old = self.local.forward.now
        if not is_compiling() and new.once and not in_backward():
            unused = old is not None and old.once and not old.served
            if unused and _confused(old.told, new.told):
                new = Pass("two maps of as many tokens were embedded in a row", once=True)
        self.local.forward.now = new
        if not is_compiling():
            self._share(new)

    def close(self) -> None:
        if not is_compiling() and self.local.forward.now is not None:
            self.local.forward.now.over = True
        self.local.forward.now = None
        if not is_compiling():
            self._share(None)

    def _share(self, new: Pass | None) -> None:
        """Tell compiled layers the pass of this thread, if no other thread has another one."""
        with _SHARING:
            if new is None:
                self.threads.pop(threading.current_thread(), None)
            else:
                self.threads[threading.current_thread()] = new
            first, *others = list(self.threads.values()) or [None]
            alone = all(first.alike(other) for other in others)
            self.shared = first if alone else Pass(_SEVERAL)

    def serve(self, layer: object) -> Pass:
        """The pass that reached a layer.

        Raises:
            ValueError: where a wrong answer could not be told from a right one: in a compiled graph
                outside of its entrance, or when a checkpointed block runs again on other tensors.
        """
        now = self.local.forward.now
        if is_compiling():
            now = self.shared if now is None else now
            if now is not None and now.told is None and now.reason == _SEVERAL:
                raise ValueError(f"torch.compile: {_SEVERAL}; expected one after the other")
            if now is None:
                raise ValueError(
                    "torch.compile: a routed layer was compiled apart from what tells the size of "
                    "its map; expected a call of the whole model around it"
                )
            return now
        if in_backward():
            if now is None:
                raise ValueError(
                    "checkpointing: the size of the map behind a recomputed block is unknown; "
                    "expected use_reentrant=False, around whole blocks"
                )
            return now
        if now is None or now.over:  # a recomputation leaves what it has found
            return Pass("the layer ran outside of a call of the model")
        if now.once:
            if layer in now.served:
                return Pass("the layer ran a second time, or outside of a call of the model")
            now.served.add(layer)
        return now

    def mark(self, x: Tensor) -> None:
        """Before a block runs: remember, or find again, the pass its input belongs to."""
        if not in_backward():
            now = self.now
            if now is not None and not now.over and torch.is_grad_enabled():
                known = self.marks.get(x, now)
                self.marks[x] = now if known is not None and known.alike(now) else None
        elif x in self.marks:
            self.local.forward.now = self.marks[x]
        elif x.grad_fn is None and x.requires_grad:
            self.local.forward.now = None  # a detached copy starts here, not the output of a block


class MarkHook:
    """A pre-hook of modules around layers, which may be checkpointed.

    Args:
        scopes: of the layers.
        only_backward: of modules beside: what they get is marked where it comes from, and they may
            be the first to get it again (transformers checkpoints what is inside of a block).
    """

    def __init__(self, scopes: list[Scope], only_backward: bool = False):
        self.scopes, self.only_backward = scopes, only_backward

    @begins_no_graph
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_compiling() or (self.only_backward and not in_backward()):
            return
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        x = next(tensors, None)
        if x is not None:
            for scope in self.scopes:
                scope.mark(x)


class EntranceHook:
    """Opens a pass: a pre-hook of an entrance, or a hook of one that leads to it (``once``).

    Args:
        entrance: the module it is set on.
        scope: that it opens.
        read: gets the entrance and its arguments by name (and its output, with ``once``), and
            returns a :class:`Site`, or a text why there is none.
        clock: a :class:`ClockHook`, or None.
    """

    def __init__(
        self,
        entrance: nn.Module,
        scope: Scope,
        read: Callable[..., Site | str],
        once: bool = False,
        clock: "ClockHook | None" = None,
    ):
        self.names = argument_names(entrance)
        self.scope, self.read, self.once, self.clock = scope, read, once, clock

    @begins_no_graph
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, *output) -> None:
        if self.once and output[0] is None:  # the entrance has failed
            return
        named = dict(zip(self.names, args)) | kwargs
        site = self.read(module, named, *output)
        rules = () if self.clock is None else self.clock.rules
        self.scope.open(Pass(site, rules, self.once))


class ExitHook:
    """Closes what :class:`EntranceHook` opened, when the forward is over."""

    def __init__(self, scope: Scope):
        self.scope = scope

    @begins_no_graph
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.scope.close()


class ClockHook:
    """A pre-hook of a diffusion model: which rules of a schedule hold at its timestep.

    Args:
        model: the module it is set on.
        schedule: the rules.
        argument: name of the timestep in the model's forward.

    Raises:
        ValueError: for a model whose forward has no such argument; of a forward, for timesteps that
            differ within a batch, or in a compiled graph.
    """

    def __init__(self, model: nn.Module, schedule: tuple, argument: str):
        self.names = argument_names(model)
        if argument not in self.names:
            raise ValueError(
                f"schedule: expected a model that takes {argument}, got {type(model).__name__}"
            )
        self.schedule, self.argument = schedule, argument
        self.local = _Local()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "local"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, local=_Local())

    @property
    def rules(self) -> tuple[bool, ...]:
        return self.local.forward.rules

    @begins_no_graph
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        value = (dict(zip(self.names, args)) | kwargs).get(self.argument)
        if isinstance(value, Tensor):
            if is_compiling():
                raise ValueError(
                    "schedule: a compiled graph cannot look at its timestep; compile the blocks "
                    "(compile_repeated_blocks), or leave timesteps out of the schedule"
                )
            low, high = (float(x) for x in value.aminmax())
            if low != high:
                raise ValueError(
                    f"timestep: the schedule needs one for the whole batch, got {low} to {high}"
                )
            value = low
        value = None if value is None else float(value)
        self.local.forward.rules = tuple(rule.holds_at(value) for rule in self.schedule)


def argument_names(module: nn.Module) -> list[str]:
    """Of a module's forward, without ``self``; of its class: offloading sets another one on it."""
    code = inspect.unwrap(type(module).forward)
    return list(inspect.signature(code).parameters)[1:]
