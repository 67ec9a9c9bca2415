"""What to route, and when."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colt5_vision.checks import TokenCount, check_int, check_pair, check_token_count
from colt5_vision.pretrained import ROUTERS

__all__ = ["RoutedAttentionConfig", "ScheduleRule"]


def _check_settings(window_size, num_heavy_tokens_kv, num_heavy_tokens_q) -> dict[str, Any]:
    """The three settings a schedule may change, checked, those that are None left out."""
    settings = {}
    if window_size is not None:
        settings["window_size"] = check_pair("window_size", window_size)
    for name, value in (("num_heavy_tokens_kv", num_heavy_tokens_kv), ("num_heavy_tokens_q", num_heavy_tokens_q)):
        if value is not None:
            settings[name] = check_token_count(name, value)
    return settings


@dataclass(frozen=True)
class ScheduleRule:
    """Other settings for maps of some sizes, or at some timesteps.

    Args:
        min_tokens, max_tokens: the rule holds for maps of so many tokens, bounds included.
        min_timestep, max_timestep: it holds at these timesteps, in the units of the model's ``timestep`` (0 to 999 in
            most pipelines, 0 to 1 in Flux), bounds included.
        full: full attention, as without routing.
        window_size, num_heavy_tokens_kv, num_heavy_tokens_q: in place of those of the configuration; None: the same.

    Raises:
        TypeError, ValueError: naming the argument; a rule that changes nothing.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    min_timestep: float | None = None
    max_timestep: float | None = None
    full: bool = False
    window_size: int | tuple[int, int] | None = None
    num_heavy_tokens_kv: TokenCount | None = None
    num_heavy_tokens_q: TokenCount | None = None

    def __post_init__(self):
        for name in ("min_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                check_int(f"schedule: {name}", getattr(self, name), minimum=0)
        for name in ("min_timestep", "max_timestep"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
                raise TypeError(f"schedule: {name}: expected a number, got {value!r} ({type(value).__name__})")
            if value is not None and math.isnan(value):
                raise ValueError(f"schedule: {name}: expected a number, got {value}")
        for unit in ("tokens", "timestep"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"schedule: min_{unit}: expected at most max_{unit} = {high}, got {low}")
        if not isinstance(self.full, bool):
            raise TypeError(f"schedule: full: expected a bool, got {self.full!r}")
        settings = _check_settings(self.window_size, self.num_heavy_tokens_kv, self.num_heavy_tokens_q)
        if self.full == bool(settings):
            what = "full=True and other settings" if self.full else "no setting"
            raise ValueError(f"schedule: expected a rule with full=True or with settings to change, got {what}")
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @property
    def needs_timestep(self) -> bool:
        return self.min_timestep is not None or self.max_timestep is not None

    def holds(self, tokens: int, timestep: float | None) -> bool:
        """Whether the rule holds; with a timestep unknown (None), only if it does not ask for it."""
        if self.min_tokens is not None and tokens < self.min_tokens:
            return False
        if self.max_tokens is not None and tokens > self.max_tokens:
            return False
        if not self.needs_timestep:
            return True
        if timestep is None:
            return False
        if self.min_timestep is not None and timestep < self.min_timestep:
            return False
        return self.max_timestep is None or timestep <= self.max_timestep


@dataclass(frozen=True)
class RoutedAttentionConfig:
    """How self-attention over latents is routed.

    Args:
        window_size: side of the windows in tokens, or (height, width).
        num_heavy_tokens_kv: routed keys that every token sees besides its window, an int >= 1 (that many) or a float in
            (0, 1] (that share of the map).
        num_heavy_tokens_q: tokens that see the routed keys, likewise; None: all.
        router: see :class:`~colt5_vision.pretrained.PretrainedRoutedAttention`; ``"learned"`` starts as
            ``"mean_query"`` and is trained by :func:`distill_routers`.
        min_tokens: maps of fewer tokens get full attention, which is as fast there.
        layers: which self-attention layers: names, patterns (``"up_blocks.*"``, see :mod:`fnmatch`) or indices;
            None: all.
        schedule: :class:`ScheduleRule`, or dicts of their arguments; the first that holds applies. Full attention in
            the first steps: ``[{"min_timestep": 800, "full": True}]``. Fewer keys on large maps:
            ``[{"min_tokens": 16384, "num_heavy_tokens_kv": 1 / 32}]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    window_size: int | tuple[int, int] = 16
    num_heavy_tokens_kv: TokenCount = 1 / 16
    num_heavy_tokens_q: TokenCount | None = None
    router: str = "mean_query"
    min_tokens: int = 1024
    layers: Sequence[int | str] | None = None
    schedule: Sequence[ScheduleRule | Mapping[str, Any]] = ()

    def __post_init__(self):
        for name in ("window_size", "num_heavy_tokens_kv"):
            if getattr(self, name) is None:
                raise TypeError(f"{name}: expected a value, got None")
        settings = _check_settings(self.window_size, self.num_heavy_tokens_kv, self.num_heavy_tokens_q)
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        if self.router not in ROUTERS:
            raise ValueError(f"router: expected one of {ROUTERS}, got {self.router!r}")
        check_int("min_tokens", self.min_tokens, minimum=0)
        object.__setattr__(self, "layers", check_layers(self.layers))
        object.__setattr__(self, "schedule", _check_schedule(self.schedule))

    @property
    def needs_timestep(self) -> bool:
        return any(rule.needs_timestep for rule in self.schedule)

    def settings(self, tokens: int, timestep: float | None = None) -> dict[str, Any] | None:
        """What the schedule changes for a map of ``tokens`` at a timestep; None for full attention."""
        if tokens < self.min_tokens:
            return None
        for rule in self.schedule:
            if rule.holds(tokens, timestep):
                named = {name: getattr(rule, name) for name in ("window_size", "num_heavy_tokens_kv")}
                return None if rule.full else named | {"num_heavy_tokens_q": rule.num_heavy_tokens_q}
        return {}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RoutedAttentionConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: for values that are not of a configuration.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: expected arguments among {sorted(known)}, got {unknown}")
        return cls(**values)


def check_layers(layers) -> tuple[int | str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected names, patterns or indices of layers, or None, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"layers: expected names, patterns or indices of layers, got {layer!r} among them")
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    return tuple(layers)


def _check_schedule(schedule) -> tuple[ScheduleRule, ...]:
    if isinstance(schedule, (str, Mapping, ScheduleRule)) or not isinstance(schedule, Sequence):
        raise TypeError(f"schedule: expected a sequence of rules, got {schedule!r}")
    rules, known = [], {field.name for field in dataclasses.fields(ScheduleRule)}
    for rule in schedule:
        if isinstance(rule, Mapping):
            if unknown := sorted(set(rule) - known):
                raise ValueError(f"schedule: expected arguments among {sorted(known)}, got {unknown}")
            rule = ScheduleRule(**rule)
        if not isinstance(rule, ScheduleRule):
            raise TypeError(f"schedule: expected a ScheduleRule or a dict of its arguments, got {rule!r}")
        rules.append(rule)
    return tuple(rules)
