"""Which tokens are routed: ``route_topk`` beside ``torch.topk``."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from benchmarks.gpu.measure import PASSES, forward
from colt5_vision.ops import route_topk

from .cases import SPEED, Case


@dataclass(frozen=True)
class Selection(Case):
    """The k largest of n normal scores in each row; on one thread, without gradients, as in
    inference."""

    rows: int = 8
    n: int = 65536
    k: int = 1152

    group: ClassVar[str] = "selection"
    threads: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"{self.rows} x {self.n}, k = {self.k}"

    def tiny(self) -> "Selection":
        return replace(self, rows=1, n=256, k=16)

    def makers(self):
        def make(select):
            scores = torch.randn(self.rows, self.n, generator=torch.Generator().manual_seed(0))
            return {PASSES[0]: forward(lambda s: select(s, self.k), [scores])}

        return {"route_topk": lambda: make(route_topk), "torch.topk": lambda: make(torch.topk)}

    def ratios(self):
        return [(SPEED, "route_topk", "torch.topk")]
