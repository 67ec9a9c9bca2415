"""Small networks that lie beside a model and correct what its routers say, once they are
trained."""

import torch
from torch import Tensor, nn

from .._torch_internals import is_compiling

LEARNED = ("learned", "learned_grouped")
"""Kinds of routing that have such a network."""


class _Linear(nn.Linear):
    """Takes any dtype and device: the router lies beside the model, which may be moved."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.device != x.device and not is_compiling():
            self.to(x.device)
        return super().forward(x.to(self.weight.dtype))


def check_features(features, batch: int, tokens: int, network: nn.Sequential, router: str) -> None:
    """``features`` are (B, N, dim), what ``network`` reads."""
    expected = (batch, tokens, network[0].in_features)
    got = tuple(features.shape) if isinstance(features, Tensor) else repr(features)
    if got != expected:
        raise ValueError(f"features: expected {expected} for router={router!r}, got {got}")


def corrector(dim: int, hidden: int, device) -> nn.Sequential:
    """(..., dim) -> (..., 1), which is 0 until it is trained."""
    where = {"device": device, "dtype": torch.float32}
    last = _Linear(hidden, 1, **where)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(_Linear(dim, hidden, **where), nn.GELU(), last)
