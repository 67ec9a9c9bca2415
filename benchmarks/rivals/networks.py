"""The two real networks: their attentions one by one, and a method in place of all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from support import dinov2, terrain

from .layer import Layer

Attend = Callable[[int, Layer], Tensor]
"""Gets the number of the layer; returns (heads, N, D) for the map's queries."""


@dataclass
class Network:
    """A network at one size.

    Attributes:
        tokens: of its largest maps, whose attentions are compared.
        prefix: tokens in front of them.
        open: gives an input by its name.
        run: (input) -> output, of batch 1.
    """

    name: str
    tokens: int
    prefix: int
    open: Callable[[str], Tensor]
    run: Callable[[Tensor], Tensor]

    def outputs(self, name: str, attend: Attend | None = None) -> Tensor:
        """The network's output on an input, with ``attend`` in its large attentions."""
        with torch.inference_mode(), _Reroute(self, attend):
            return self.run(self.open(name))

    def compare(self, out: Tensor, full: Tensor) -> dict[str, float]:
        """Of the whole network: relative error, PSNR over the range of the full output, and of
        patch tokens the mean cosine and its lowest hundredth."""
        error = (out - full).square().mean()
        found = {
            "relative": (error.sqrt() / full.std()).item(),
            "psnr": (10 * torch.log10((full.max() - full.min()).square() / error)).item(),
        }
        if self.prefix:
            cosine = cosine_similarity(out, full, dim=-1).flatten()
            found |= {"cosine": cosine.mean().item(), "cosine_1": cosine.quantile(0.01).item()}
            found["relative"] = ((out - full).norm() / full.norm()).item()
        return found


class _Reroute(TorchFunctionMode):
    """Within it, ``attend`` computes the attentions over the network's largest maps."""

    def __init__(self, network: Network, attend: Attend | None):
        super().__init__()
        self.network, self.attend, self.layer = network, attend, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        prefix, tokens = self.network.prefix, self.network.tokens
        if func is not scaled_dot_product_attention or self.attend is None:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        if q.shape[2] != prefix + tokens:
            return func(*args, **(kwargs or {}))
        side = math.isqrt(tokens)
        layer = Layer(*(x[0].contiguous() for x in (q, k, v)), (side, side), prefix)
        out = [scaled_dot_product_attention(q[:, :, :prefix], k, v)] if prefix else []
        out.append(self.attend(self.layer, layer).unsqueeze(0))
        self.layer += 1
        return torch.cat(out, 2)


def vit(cache: Path, size: int, photos: dict[str, Path]) -> Network:
    """DINOv2's ViT-S/14, its normalised patch tokens; photographs by name."""
    model = dinov2.load(cache)[0]
    side = size // dinov2.PATCH

    def open_photo(name: str) -> Tensor:
        return dinov2.open_photo(photos[name], size)

    return Network("DINOv2", side**2, 1, open_photo, lambda x: dinov2.features(model, x))


def unet(cache: Path, size: int) -> Network:
    """The consistency UNet, its height map; noise by its seed."""
    net = terrain.load(cache)

    def noise(name: str) -> Tensor:
        return terrain.noise(size, int(name))

    return Network("UNet", (size // 4) ** 2, 0, noise, lambda x: net(x, terrain.SIGMA_MAX))
