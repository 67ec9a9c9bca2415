"""Soft top-k gates beside the predecessor's coordinate descent, Sinkhorn and sorting."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from colt5_attention.coor_descent import coor_descent
from torch import Tensor

from benchmarks.gpu.measure import both
from colt5_vision.ops import coordinate_descent, soft_topk

from .cases import SPEED, Case
from .peers import sinkhorn, sorted_projection

ITERATIONS = (20, 50)
# 20 iterations are the default of the predecessor's router, and only with its eps scaling; 50 are
# CoLT5's, without
SCALING = {20: {"eps_init": 4.0, "eps_decay": 0.7}, 50: {}}


@dataclass(frozen=True)
class Gates(Case):
    """Rows of n normal scores, of which k are taken; on one thread, as the rows of a batch are."""

    rows: int = 8
    n: int = 65536
    k: int = 1152
    eps: float = 1.0

    group: ClassVar[str] = "gates"
    threads: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"{self.rows} x {self.n}, k = {self.k}, eps {self.eps:g}"

    def tiny(self) -> "Gates":
        return replace(self, rows=1, n=256, k=16)

    def makers(self):
        k, eps = self.k, self.eps
        functions = {"soft_topk": lambda s: soft_topk(s, k, eps=eps)}
        for n in ITERATIONS:
            how = {"n_iters": n, "eps": eps, **SCALING[n]}
            functions[f"coordinate_descent, {n} iterations"] = lambda s, how=how: (
                coordinate_descent(s, k, **how)
            )
            functions[f"colt5_attention, {n} iterations"] = lambda s, how=how: coor_descent(
                s, k=k, **how
            )
        for n in ITERATIONS:
            functions[f"Sinkhorn, {n} iterations"] = lambda s, n=n: sinkhorn(
                s, k, n_iters=n, eps=eps
            )
        functions["projection by sorting"] = lambda s: sorted_projection(s, k, eps=eps)
        return {name: lambda f=f: both(f, *self._inputs()) for name, f in functions.items()}

    def _inputs(self) -> tuple[list[Tensor], Tensor]:
        scores, grad = torch.randn(2, self.rows, self.n, generator=torch.Generator().manual_seed(0))
        return [scores], grad

    def ratios(self):
        peers = [name for name in self.makers() if name != "soft_topk"]
        same = [
            tuple(f"{who}, {n} iterations" for who in ("coordinate_descent", "colt5_attention"))
            for n in ITERATIONS
        ]
        return [(SPEED, "soft_topk", peer) for peer in peers] + [(SPEED, *pair) for pair in same]

    def error(self, call) -> float:
        """Largest |sum of gates - k| / k of a row: a peer that has not converged is fast at
        something else."""
        return float((call().double().sum(-1) - self.k).abs().max() / self.k)


@dataclass(frozen=True)
class Sharp(Gates):
    """``soft_topk`` of scores with a deviation of 8, the sharper the harder."""

    deviation: float = 8.0

    def __str__(self) -> str:
        return f"{self.rows} x {self.n}, k = {self.k}, deviation {self.deviation:g}"

    def makers(self):
        scores, grad = self._inputs()
        scores = [self.deviation * x for x in scores]
        return {
            f"soft_topk, eps {eps:g}": lambda eps=eps: both(
                lambda s: soft_topk(s, self.k, eps=eps), scores, grad
            )
            for eps in (1.0, 0.1, 0.03)
        }

    def ratios(self):
        first, *sharper = self.makers()
        return [(SPEED, name, first) for name in sharper]
