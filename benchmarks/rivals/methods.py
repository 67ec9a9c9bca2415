"""The methods that are compared, by name. Each is a function of a layer and a density."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .blocks import nearest_tiles, pisa, sol, sparge, sub_block
from .clusters import svg_ear
from .layer import Result
from .tokens import PROBES, grouped, oracle, sampled, todo, tome, window_only


class Method(NamedTuple):
    call: Callable[..., Result]
    draws: bool = False  # takes ``draw``, the number of a draw
    timed: bool = False  # seconds are those of code made to be fast, not of a model of a kernel
    least: int = 1  # exact keys that a query has at least, whatever the density

    def fits(self, tokens: int, density: float) -> bool:
        """Whether the density is enough, on a map of so many tokens."""
        return int(density * tokens) >= self.least


METHODS = {
    "window only": Method(window_only, timed=True),
    "nearest tiles (STA)": Method(nearest_tiles),
    "ToDo": Method(todo, timed=True),
    "ToMe-style": Method(tome, timed=True),
    "SpargeAttn": Method(sparge),
    "SubBlock": Method(sub_block),
    "PISA 0": Method(partial(pisa, order=0)),
    "PISA 1": Method(partial(pisa, order=1)),
    "Sol": Method(sol),
    "SVG-EAR": Method(svg_ear, draws=True),
    "SVG-EAR, 2 iterations": Method(partial(svg_ear, iterations=2), draws=True),
    "SVG-EAR, 2x clusters": Method(partial(svg_ear, cells=2), draws=True),
    "SVG-EAR, 2x clusters, 2 iterations": Method(
        partial(svg_ear, cells=2, iterations=2), draws=True
    ),
    "oracle per query": Method(oracle),
    "ours, sampled, window 8": Method(
        partial(sampled, window=8), draws=True, timed=True, least=8 * 8 + PROBES + 1
    ),
    "ours, sampled, window 14": Method(
        partial(sampled, window=14), draws=True, timed=True, least=14 * 14 + PROBES + 1
    ),
    "ours, grouped": Method(grouped, draws=True, timed=True),
}
