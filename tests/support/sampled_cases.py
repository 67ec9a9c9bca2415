"""A small map, attention over it, and what the routers of ``SampledAttention`` take."""

import torch

from colt5_vision.swap.sampled import SampledAttention
from tests.support.attention_cases import randn

GRID = (6, 7)
TOKENS = 42


def routing(keys=0.25, *, window=3, **how):
    torch.manual_seed(0)
    if how.get("router") == "learned":
        how = {"dim": 12} | how
    if how.get("router") == "window":
        how.pop("num_heavy_tokens_q", None)
    return SampledAttention(window_size=window, num_heavy_tokens_kv=keys, **how)


def tensors(prefix=0, batch=2, sharpness=2.0, dtype=torch.float64, seed=0):
    q, k, v = (randn(batch, 4, prefix + TOKENS, 8, seed=seed + i).to(dtype) for i in range(3))
    return q * sharpness, k, v


def reads(router, batch=2, dtype=torch.float64):
    """What a router reads besides queries and keys, as an argument."""
    known = randn(batch, TOKENS, 12, seed=11).to(dtype)
    return {"features": known} if router == "learned" else {}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
