"""Attributes of layers that have other values while calls are routed, and their own otherwise."""

import threading
from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapter import Switch

__all__ = ["Held", "Switches"]

_SWITCHING = threading.Lock()


class Held:
    """An attribute that calls in progress have given another value.

    Attributes:
        own: its own value; ``...``: that of the class.
        calls: how many they are.
    """

    def __init__(self, holder: Any, name: str, own: Any, value: Any):
        self.holder, self.name, self.own, self.value = holder, name, own, value
        self.calls = 0

    def give_back(self) -> None:
        if vars(self.holder).get(self.name, ...) is self.value:
            _put(self.holder, self.name, self.own)


class Switches:
    """Of the layers that were routed together.

    Threads may share a layer, and layers what holds an attribute: it gets its own value back when
    the last call leaves. Copies and pickles of a model hold nothing, but keep what is kept.
    """

    def __init__(self):
        self.held: dict[tuple[int, str], Held] = {}  # by the id of what holds it, and its name
        self.kept: dict[tuple[str, str], Any] = {}  # own values, by name of the layer and path

    def __getstate__(self) -> dict:
        return {"kept": dict(self.kept)}

    def __setstate__(self, state: dict) -> None:
        self.held, self.kept = {}, state["kept"]

    def hold(self, layer: nn.Module, switches: Iterable[Switch]) -> list[Held]:
        """Give a layer's switches their values, for a call."""
        mine = []
        with _SWITCHING:
            for switch in switches:
                found = _attribute(layer, switch)
                if found is None:
                    continue
                holder, name, now = found
                held = self.held.get((id(holder), name))
                if now is not switch.value:
                    # somebody may have set it while others hold it
                    if held is None:
                        held = self.held[id(holder), name] = Held(holder, name, now, switch.value)
                    held.own = now
                    setattr(holder, name, switch.value)
                if held is not None:
                    held.calls += 1
                    mine.append(held)
        return mine

    def release(self, mine: list[Held]) -> None:
        """A call that held these is over."""
        with _SWITCHING:
            for held in mine:
                held.calls -= 1
                key = id(held.holder), held.name
                if held.calls == 0 and self.held.get(key) is held:
                    self.held.pop(key).give_back()

    def keep(self, of: str, layer: nn.Module, switches: Iterable[Switch]) -> None:
        """Give a layer's switches their values until :meth:`reset`: a compiled graph is being made,
        which holds for as long as they stay.

        Args:
            of: name of the layer.
        """
        with _SWITCHING:
            for switch in switches:
                found = _attribute(layer, switch)
                if found is None:
                    continue
                holder, name, now = found
                held = self.held.pop((id(holder), name), None)
                if now is not switch.value:
                    setattr(holder, name, switch.value)
                elif held is not None:
                    now = held.own
                else:
                    continue
                self.kept[of, switch.path] = now

    def reset(self, of: str, layer: nn.Module, switches: Iterable[Switch]) -> None:
        """Give a layer's switches their own values back, also after an interrupted forward."""
        with _SWITCHING:
            for switch in switches:
                found = _attribute(layer, switch)
                if found is None:
                    continue
                holder, name, now = found
                if (held := self.held.pop((id(holder), name), None)) is not None:
                    held.give_back()
                elif (of, switch.path) in self.kept:
                    own = self.kept.pop((of, switch.path))
                    if now is switch.value:
                        _put(holder, name, own)


def _put(holder: Any, name: str, own: Any) -> None:
    delattr(holder, name) if own is ... else setattr(holder, name, own)


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
