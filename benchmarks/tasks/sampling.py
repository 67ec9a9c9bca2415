"""A picture from a consistency model in several steps."""

import torch
from torch import Tensor

from support import terrain

SIGMAS = (terrain.SIGMA_MAX, 20.0, 5.0, 1.0)
"""Standard deviations of the noise at the steps, over data of 0.5."""


def denoised(net: terrain.TerrainNet, size: int, seed: int) -> Tensor:
    """(1, 1, size, size), a height map: the network's answer to noise, made noisy again and
    answered at each step.

    Source: multistep consistency sampling (arXiv 2303.01469, algorithm 1).
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 1, size, size)
    for sigma in SIGMAS:
        noise = torch.randn(image.shape, generator=generator)
        spread = (sigma**2 - terrain.SIGMA_MIN**2) ** 0.5
        image = net(image + spread * noise, sigma)
    return image
