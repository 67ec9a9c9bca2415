"""What to route, and when."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import ROUTERS, TokenCount, check_int, check_router, check_token_count
from .cost import Costs, Place, known_costs
from .grouped import GROUPED, GroupedAttention
from .sampled import SampledAttention
from .window import check_window

__all__ = ["RoutedAttentionConfig", "ScheduleRule"]

TOO_SMALL = "fewer tokens than min_tokens"
TOO_LITTLE_GAIN = "so few tokens that the expected speed-up is under min_speedup"
BY_SCHEDULE = "the schedule says so"
BESIDE_OTHERS = (
    "so few tokens beside a text or other images that the expected speed-up is under min_speedup"
)
MIN_TOKENS = 1024  # where nothing tells what a layer is expected to gain


@dataclass(frozen=True)
class ScheduleRule:
    """Other settings for maps of some sizes, or at some timesteps of a diffusion model.

    Args:
        min_tokens, max_tokens: the rule holds for maps of so many tokens, bounds included.
        min_timestep, max_timestep: it holds at these timesteps, in the units of the model's
            ``timestep`` (0 to 999 in most pipelines, 0 to 1 in Flux), bounds included.
        full: full attention, as without routing.
        window_size, num_heavy_tokens_kv, num_heavy_tokens_q: in place of those of the
            configuration; None: the same.

    Raises:
        TypeError, ValueError: for an argument that does not fit; a rule that changes nothing.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    min_timestep: float | None = None
    max_timestep: float | None = None
    full: bool = False
    window_size: int | tuple[int, ...] | None = None
    num_heavy_tokens_kv: TokenCount | None = None
    num_heavy_tokens_q: TokenCount | None = None

    def __post_init__(self):
        # when it holds: at which sizes
        for name in ("min_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                count = check_int(f"schedule: {name}", getattr(self, name), minimum=0)
                object.__setattr__(self, name, count)

        # at which timesteps
        for name in ("min_timestep", "max_timestep"):
            if getattr(self, name) is not None:
                number = _check_number(f"schedule: {name}", getattr(self, name))
                object.__setattr__(self, name, number)

        # from low to high
        for unit in ("tokens", "timestep"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(
                    f"schedule: min_{unit}: expected at most max_{unit} = {high}, got {low}"
                )

        # what it changes
        if not isinstance(self.full, bool):
            raise TypeError(f"schedule: full: expected a bool, got {self.full!r}")
        settings = _check_settings(self)
        if self.full == bool(settings):
            what = "full=True and other settings" if self.full else "no setting"
            raise ValueError(
                f"schedule: expected a rule with full=True or with settings to change, got {what}"
            )
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @property
    def needs_timestep(self) -> bool:
        return self.min_timestep is not None or self.max_timestep is not None

    def holds_at(self, timestep: float | None) -> bool:
        """Whether its timesteps hold; with a timestep unknown (None), only if it asks for none."""
        if not self.needs_timestep:
            return True
        if timestep is None:
            return False
        late_enough = self.min_timestep is None or timestep >= self.min_timestep
        return late_enough and (self.max_timestep is None or timestep <= self.max_timestep)

    def holds_for(self, tokens: int) -> bool:
        """Whether it holds for a map of so many tokens."""
        if self.min_tokens is not None and tokens < self.min_tokens:
            return False
        return self.max_tokens is None or tokens <= self.max_tokens


@dataclass(frozen=True)
class RoutedAttentionConfig:
    """How self-attention over maps is routed, in any model.

    Args:
        window_size: side of the windows in tokens, (height, width), or (frames, height, width). In
            a video, one or two numbers are windows of single frames.
        num_heavy_tokens_kv: routed keys that every token sees besides its window, an int >= 1 (that
            many) or a float in (0, 1] (that share of the map).
        num_heavy_tokens_q: tokens that see the routed keys, likewise; None: all.
        router: see :class:`~colt5_vision.swap.sampled.SampledAttention`; ``"learned"`` starts as
            ``"sampled"`` and is trained by :func:`~colt5_vision.distill_routers`. ``"grouped"``
            draws keys for each tile of the map, ``window_size`` its least side, see
            :class:`~colt5_vision.swap.grouped.GroupedAttention`; all tokens query.
            ``"learned_grouped"`` starts as that, and is trained likewise.
        min_tokens: maps of fewer tokens get full attention, and ``min_speedup`` does not matter.
            None: as many as a layer needs for an expected speed-up of ``min_speedup``; 1024 where
            no costs are known: on a GPU, with ``num_heavy_tokens_q``, for a layer of unknown width,
            in a ``RoutedAttnProcessor``. ``min_speedup`` does not count there.
        min_speedup: layers with a smaller expected speed-up keep full attention, see
            :mod:`~colt5_vision.swap.cost`, by the settings without a schedule's; 0: none does.
        layers: which self-attention layers: names, patterns (``"up_blocks.*"``, see :mod:`fnmatch`)
            or indices among those that can be routed; None: all.
        schedule: :class:`ScheduleRule`, or dicts of their arguments; the first that holds applies.
            Full attention in the first steps: ``[{"min_timestep": 800, "full": True}]``. Fewer keys
            on large maps: ``[{"min_tokens": 16384, "num_heavy_tokens_kv": 1 / 32}]``.

    Raises:
        TypeError, ValueError: for an argument that does not fit.
    """

    window_size: int | tuple[int, ...] = 16
    num_heavy_tokens_kv: TokenCount = 1 / 16
    num_heavy_tokens_q: TokenCount | None = None
    router: str = "sampled"
    min_tokens: int | None = None
    min_speedup: float = 1.1
    layers: Sequence[int | str] | None = None
    schedule: Sequence[ScheduleRule | Mapping[str, Any]] = ()

    def __post_init__(self):
        for name in ("window_size", "num_heavy_tokens_kv"):
            if getattr(self, name) is None:
                raise TypeError(f"{name}: expected a value, got None")
        for name, value in _check_settings(self).items():
            object.__setattr__(self, name, value)
        check_router(self.router, ROUTERS)
        if self.min_tokens is not None:
            least = check_int("min_tokens", self.min_tokens, minimum=0)
            object.__setattr__(self, "min_tokens", least)
        bar = _check_number("min_speedup", self.min_speedup)
        if not 0 <= bar < math.inf:
            raise ValueError(f"min_speedup: expected a number >= 0, got {bar}")
        object.__setattr__(self, "min_speedup", bar)
        object.__setattr__(self, "layers", _check_layers(self.layers))
        object.__setattr__(self, "schedule", _check_schedule(self.schedule))
        if self.router in (*GROUPED, "window"):
            for given in (self, *self.schedule):
                if given.num_heavy_tokens_q is not None:
                    raise ValueError(
                        f"num_heavy_tokens_q: expected None with router={self.router!r}, got "
                        f"{given.num_heavy_tokens_q}"
                    )

    def attention(self, **where) -> SampledAttention | GroupedAttention:
        """What takes the place of ``scaled_dot_product_attention`` in a layer.

        Args:
            where: ``dim`` and ``device`` of a learned router.
        """
        how = {"window_size": self.window_size, "num_heavy_tokens_kv": self.num_heavy_tokens_kv}
        how |= {"router": self.router, **where}
        if self.router in GROUPED:
            return GroupedAttention(**how)
        return SampledAttention(num_heavy_tokens_q=self.num_heavy_tokens_q, **how)

    @property
    def needs_timestep(self) -> bool:
        return any(rule.needs_timestep for rule in self.schedule)

    def least_tokens(
        self, channels: int | None, others: int = 0
    ) -> dict[Place | None, tuple[int, str]]:
        """From how many tokens on a layer is routed, and why smaller maps are not.

        Args:
            channels: heads times head_dim of the layer; None: unknown.
            others: tokens beside the map in its sequence.

        Returns:
            By type of device and dtype, where costs are known; under None, elsewhere.
        """
        if self.min_tokens is not None or self.min_speedup == 0:
            return {None: (self.min_tokens or 0, TOO_SMALL)}
        found = {None: (MIN_TOKENS, TOO_SMALL)}
        for place, costs in self._costs(channels).items():
            least = costs.least_tokens(self.min_speedup, channels, others=others, **self._how())
            found[place] = (least, BESIDE_OTHERS if others else TOO_LITTLE_GAIN)
        return found

    def expected_speedup(
        self, tokens: int, channels: int | None, place: Place, others: int = 0
    ) -> float | None:
        """How many times as fast as full attention a layer is expected to be.

        Args:
            tokens: of its map.
            channels: as of :meth:`least_tokens`.
            place: type of device, and dtype. None is returned where no costs are known.
            others: tokens beside the map in its sequence.
        """
        costs = self._costs(channels).get(place)
        return (
            None if costs is None else costs.speedup(tokens, channels, others=others, **self._how())
        )

    def _costs(self, channels: int | None) -> dict[Place, Costs]:
        """What is known: nothing of routed queries."""
        known = channels is not None and self.num_heavy_tokens_q is None
        return known_costs() if known else {}

    def _how(self) -> dict[str, Any]:
        names = ("router", "window_size", "num_heavy_tokens_kv")
        return {name: getattr(self, name) for name in names}

    def settings(
        self,
        tokens: int,
        rules: tuple[bool, ...] = (),
        least: tuple[int, str] = (0, TOO_SMALL),
    ) -> dict[str, Any] | str:
        """What the schedule changes for a map of ``tokens``; for full attention, the reason.

        Args:
            rules: for each rule, whether its timesteps hold; default: those hold that ask for none.
            least: of :meth:`least_tokens`.
        """
        if tokens < least[0]:
            return least[1]
        held = rules or tuple(not rule.needs_timestep for rule in self.schedule)
        for rule, holds in zip(self.schedule, held):
            if holds and rule.holds_for(tokens):
                if rule.full:
                    return BY_SCHEDULE
                return {name: getattr(rule, name) for name in _SETTINGS}
        return {}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, whole: bool = True) -> "RoutedAttentionConfig":
        """The inverse of :meth:`to_dict`.

        Args:
            values: arguments by name; rules of the schedule likewise.
            whole: every argument must be there: the default in place of a lost one would be another
                routing. False: as with the constructor.

        Raises:
            TypeError, ValueError: for values that are not of a configuration.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(values).__name__}")
        _check_names("config", values, cls, whole=whole)
        config = cls(**values)
        for rule in values.get("schedule", ()) if whole else ():
            if isinstance(rule, Mapping):
                _check_names("schedule", rule, ScheduleRule, whole=True)
        return config


def _check_names(name: str, values: Mapping[str, Any], kind: type, *, whole: bool) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{name}: expected arguments among {sorted(known)}, got {unknown}")
    if whole and (missing := sorted(known - set(values))):
        raise ValueError(f"{name}: expected all of {sorted(known)}, got none for {missing}")


_SETTINGS = ("window_size", "num_heavy_tokens_kv", "num_heavy_tokens_q")


def _check_settings(given) -> dict[str, Any]:
    """The settings a schedule may change, checked, those that are None left out."""
    settings = {}
    for name in _SETTINGS:
        value = getattr(given, name)
        if value is not None:
            check = check_window if name == "window_size" else check_token_count
            settings[name] = check(name, value)
    return settings


def _check_number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got {value}")
    return value if type(value) in (int, float) else float(value)


def _check_layers(layers) -> tuple[int | str, ...] | None:
    if layers is None:
        return None
    expected = "layers: expected a list of names, patterns or indices of layers"
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"{expected}, or None, got {layers!r}")
    layers = tuple(layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"{expected}, got {layer!r} among them")
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    return layers


def _check_schedule(schedule) -> tuple[ScheduleRule, ...]:
    if isinstance(schedule, (str, Mapping, ScheduleRule)) or not isinstance(schedule, Sequence):
        raise TypeError(f"schedule: expected a sequence of rules, got {schedule!r}")
    rules = []
    for rule in schedule:
        if isinstance(rule, Mapping):
            _check_names("schedule", rule, ScheduleRule, whole=False)
            rule = ScheduleRule(**rule)
        if not isinstance(rule, ScheduleRule):
            raise TypeError(
                f"schedule: expected a ScheduleRule or a dict of its arguments, got {rule!r}"
            )
        rules.append(rule)
    return tuple(rules)
