"""Window ∪ routed attention, the operator alone, beside full attention."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.attention import inputs
from benchmarks.gpu.measure import Map, both
from colt5_vision.ops import routed_window_attention

from .cases import CPU, SPEED, Case


@dataclass(frozen=True)
class Attention(Case):
    size: Map

    group: ClassVar[str] = "attention"

    def __str__(self) -> str:
        return str(self.size)

    def tiny(self) -> "Attention":
        return replace(self, size=replace(self.size, side=2 * self.size.window))

    def makers(self):
        def make(full: bool):
            x, grad, routed = inputs(self.size, CPU, torch.float32)
            side, window = self.size.side, self.size.window
            call = {"grid_size": (side, side), "window_size": window, "routed_indices": routed}
            call["log_weights"] = torch.zeros(routed.shape)  # as a router gives them
            return both(
                scaled_dot_product_attention
                if full
                else lambda *x: routed_window_attention(*x, **call),
                x,
                grad,
            )

        return {"routed_window_attention": lambda: make(False), "full SDPA": lambda: make(True)}

    def ratios(self):
        return [(SPEED, "routed_window_attention", "full SDPA")]
