"""What the tests of routed rows share."""

import torch

from colt5_vision.ops import gather_normalize, join
from colt5_vision.routing import Routing


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def some_map(layout, batch, num, dim, dtype=torch.float32, device="cpu"):
    """(B, N, C) in several layouts of memory."""
    x = randn(batch, num, dim, dtype=dtype, device=device)
    if layout == "first":  # a (B, C, H, W) map, permuted
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.cat([x, x + 1], -1)[..., :dim]
    return x


def distinct(*shape, limit, seed=3, device="cpu"):
    """int64, distinct within a row; rows share entries."""
    return (
        randn(*shape[:-1], limit, seed=seed).argsort(-1)[..., : shape[-1]].contiguous().to(device)
    )


def gather(x, indices, weight, grad, choice=None, dtype=None):
    """Rows and gradients, or those of the formula in ``dtype``."""
    x, weight = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight))
    out = gather_normalize(x, indices, weight, backend=choice)
    return [
        t.double()
        for t in (out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out.dtype)))
    ]


def filled(indices, gates=None):
    """A routing without empty slots; no gates: 1."""
    gates = torch.ones(indices.shape, device=indices.device) if gates is None else gates
    return Routing(indices, gates, gates, torch.ones_like(indices, dtype=torch.bool))


def scatter(out, rows, indices, gates, null, grad, choice=None, dtype=None):
    """The joined map and gradients by everything, or those of the formula in ``dtype``."""
    given = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (out, rows, gates, null)
    ]
    found = join(given[0], given[1], filled(indices, given[2]), given[3], backend=choice)
    inputs = [t for t in given if t is not None]
    return [
        t.double()
        for t in (found.detach(), *torch.autograd.grad(found, inputs, grad.to(found.dtype)))
    ]


def scatter_inputs(layout, batch, num, dim, slots, dtype=torch.float32, device="cpu"):
    out = some_map(layout, batch, num, dim, dtype, device)
    rows = randn(batch, slots, dim, seed=1, dtype=dtype, device=device)
    gates, null = randn(batch, slots, seed=2, device=device), randn(dim, seed=4, device=device)
    return out, rows, distinct(batch, slots, limit=num, device=device), gates, null
