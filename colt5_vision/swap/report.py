"""What is routed, what is not and why, and what has happened since."""

import re
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .config import BESIDE_OTHERS, BY_SCHEDULE, TOO_LITTLE_GAIN, TOO_SMALL

NEVER_ROUTED = "is to be routed, and no call of it has been so far"
_COUNTING = threading.Lock()
_ASKED_FOR = (TOO_SMALL, TOO_LITTLE_GAIN, BESIDE_OTHERS, BY_SCHEDULE)


class Warned:
    """Of layers that were routed together: whether one of them has warned.

    Args:
        layers: how many they are.
    """

    def __init__(self, layers: int = 1):
        self.layers, self.already = layers, False


class Calls:
    """How often one layer attended, since it was routed or the counters were reset.

    Calls in a compiled graph are not counted, nor those in a copy of the model.

    Attributes:
        routed: calls that were routed.
        exact: calls with full attention, by the reason.
        compiled: a compiler has made a graph of the layer, whose calls are not among them. Layers
            may share a graph, and then one of them knows.
    """

    def __init__(self):
        self.routed = 0
        self.exact: Counter[str] = Counter()
        self.compiled = False
        self.warned = Warned()

    def count(self, reason: str | None) -> None:
        """A call: routed (None), or exact for a reason."""
        with _COUNTING:
            if reason is None:
                self.routed += 1
            else:
                self.exact[reason] += 1

    @torch.compiler.assume_constant_result  # called when a graph is made, not when it runs
    def note_graph(self) -> bool:
        """The call becomes part of a graph."""
        self.compiled = True
        return True

    def reset(self) -> None:
        with _COUNTING:
            self.routed = 0
            self.exact.clear()

    def warn_if_never_routed(self, name: str, reasons: list[str]) -> None:
        """Say that a layer's forward did not route, if none of its forwards did, nobody asked for
        that, and no layer routed with it has said so before."""
        unwanted = [reason for reason in reasons if reason not in _ASKED_FOR]
        if self.routed or not unwanted:
            return
        with _COUNTING:
            if self.warned.already:
                return
            self.warned.already = True
        warnings.warn(
            f"{name} {NEVER_ROUTED}: {unwanted[0]}; it is the first of {self.warned.layers} layers "
            "to say so, the report's calls tell how often each was",
            RuntimeWarning,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        more = ", compiled=True" if self.compiled else ""
        return f"Calls(routed={self.routed}, exact={dict(self.exact)}{more})"


class RoutedAttentionReport(dict):
    """Names of the routed layers and the tokens they see at ``sample_size`` (None: unknown before a
    run).

    Attributes:
        exact: names of the other attention layers, and why each keeps full attention.
        layer_calls: by name of each layer that may be routed, its live :class:`Calls`. A layer too
            small for routing at ``sample_size`` is among them.
        expected: by name of the layers whose tokens are known, how many times as fast as full
            attention each is expected to be without a text or other images beside its map, see
            :mod:`~colt5_vision.swap.cost`; None: no costs are known of its device.
        notes: by name of layers that cannot gain anything on any device, why.
        calibration: by name, what :func:`~colt5_vision.calibrate_routing` found for a layer; empty
            without it.

    Printed, layers with the same to say share a line if their names differ in numbers of blocks
    only: ``blocks.*.attn (12)``.
    """

    def __init__(
        self,
        routed: Mapping[str, int | None],
        exact: Mapping[str, str],
        layer_calls: Mapping[str, Calls],
        expected: Mapping[str, float | None] | None = None,
        notes: Mapping[str, str] | None = None,
    ):
        super().__init__(routed)
        self.exact = dict(exact)
        self.layer_calls = dict(layer_calls)
        self.expected = dict(expected or {})
        self.notes = dict(notes or {})
        self.calibration: dict[str, Any] = {}

    @property
    def calls(self) -> Calls:
        """The counters of all layers together, as they are now."""
        total = Calls()
        for calls in self.layer_calls.values():
            total.routed += calls.routed
            total.exact.update(calls.exact)
            total.compiled |= calls.compiled
        return total

    def not_called(self) -> list[str]:
        """Layers that may be routed whose calls never came through, as they are now: not even as
        exact ones. A compiled layer may be among them."""
        return [name for name, one in self.layer_calls.items() if not (one.routed or one.exact)]

    def reset_calls(self) -> None:
        """Set the counters to 0."""
        for calls in self.layer_calls.values():
            calls.reset()

    def __str__(self) -> str:
        lines = [f"{len(self)} layers routed, {len(self.exact)} as they were"]
        lines += _lines({name: self._how(name) for name in self})
        if any("expected to be" in line for line in lines):
            lines.append("  expected without a text or other images, which leave less to gain")
        if None in self.expected.values():
            lines.append(
                "  no costs are known of some layers (device, dtype, width or routed queries): "
                "no speed-up is foretold, and min_speedup does not count"
            )
        lines += _lines({n: f"full attention, {reason}" for n, reason in self.exact.items()})
        calls = self.calls
        if calls.routed or calls.exact:
            lines.append(f"calls since: {calls.routed} routed, {calls.exact.total()} exact")
            lines += [f"  {count} exact: {reason}" for reason, count in calls.exact.most_common()]
            if not calls.compiled:
                lines += _lines(dict.fromkeys(self.not_called(), "not called"))
        if calls.compiled:
            lines.append("calls in compiled graphs are not counted")
        return "\n".join(lines)

    def _how(self, name: str) -> str:
        """What there is to say of a routed layer."""
        told = [f"{'?' if self[name] is None else f'{self[name]:,}'} tokens"]
        if name in self.notes:
            told.append(self.notes[name])
        if name in self.calibration:
            told.append(str(self.calibration[name]))
        elif self.expected.get(name) is not None:
            told.append(f"expected to be {self.expected[name]:.1f} times as fast")
        return ", ".join(told)


def _lines(told: Mapping[str, str]) -> list[str]:
    """A line for each pattern of names, such as ``blocks.*.attn``, and what is told of it."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, what in told.items():
        alike.setdefault((re.sub(r"\b\d+\b", "*", name), what), []).append(name)
    return [
        f"  {names[0]}: {what}" if len(names) == 1 else f"  {pattern} ({len(names)}): {what}"
        for (pattern, what), names in alike.items()
    ]
