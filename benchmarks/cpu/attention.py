"""Window ∪ routed attention, the operator alone and with its routing, beside full attention."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from benchmarks.gpu.measure import Map
from colt5_vision.swap.cost import known_costs

from .cases import SPEED, Case
from .fit import calls_of, work_of

FULL = "full SDPA"
# variants, by the kinds of attention of the cost model
KINDS = {
    "routed_window_attention": "operator",
    "swap, sampled": "sampled",
    "swap, grouped": "grouped",
    FULL: "full",
}


@dataclass(frozen=True)
class Attention(Case):
    size: Map

    group: ClassVar[str] = "attention"

    def __str__(self) -> str:
        return str(self.size)

    def tiny(self) -> "Attention":
        return replace(self, size=replace(self.size, side=2 * self.size.window))

    def makers(self):
        return {name: lambda kind=kind: calls_of(self.size)[kind] for name, kind in KINDS.items()}

    def ratios(self):
        return [(SPEED, name, FULL) for name in KINDS if name != FULL]

    def predicted(self, variant, what, threads):
        costs = known_costs().get(("cpu", torch.float32))
        return costs and costs.seconds(KINDS[variant], work_of(self.size), what, threads)
