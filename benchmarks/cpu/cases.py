"""A case: calls that do the same job, to be measured side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.gpu.measure import PASSES

CPU = torch.device("cpu")
SPEED, SHARE = "speed", "share"


@dataclass(frozen=True)
class Case:
    """One job at one size; subclasses say which. Frozen and of plain values: it travels to another
    process.

    Attributes:
        seconds: time of each pass, whose names are those of ``PASSES``; a run stretches or shortens
            all alike.
        group: the table that the case stands in.
        threads: None: as many as torch has.
        probed: whether memory is measured too.
    """

    seconds: tuple[float, ...]

    group: ClassVar[str]
    threads: ClassVar[int | None] = None
    probed: ClassVar[bool] = True

    @property
    def passes(self) -> dict[str, float]:
        """Nominal seconds of each pass."""
        return dict(zip(PASSES, self.seconds, strict=False))

    def makers(self) -> dict[str, Callable[[], dict[str, Callable]]]:
        """By name of the variant, what makes its calls, one for each pass: only those that are
        measured are made."""
        raise NotImplementedError

    def ratios(self) -> list[tuple[str, str, str]]:
        """(kind, variant, other variant): ``SPEED`` how many times as long the other takes,
        ``SHARE`` which part the variant is of the other."""
        raise NotImplementedError

    def tiny(self) -> "Case":
        """The same variants at a size that costs nothing: what a first call loads is not what a
        call needs."""
        raise NotImplementedError

    def unfit(self, variant: str, what: str) -> str | None:
        """Why a variant is not tried in this pass, if so."""

    def predicted(self, variant: str, what: str, threads: int) -> float | None:
        """Seconds that the library's cost model expects, where it knows the variant."""

    def error(self, call: Callable) -> float | None:
        """How far off the result of a forward is, where that is asked."""
