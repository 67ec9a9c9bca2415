"""The modules under test, one list for every bar, and how to run them whatever their layout."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from colt5_vision import (
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    ConditionalRoutedTransformerBlock,
)
from colt5_vision.cross_attention import ConditionalRoutedCrossAttention
from colt5_vision.sequence import ConditionalRoutedAttention

DIM = 16
HEADS = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": 4,
    "heavy_dim_head": 8,
    "heavy_heads": 2,
}
Attention = functools.partial(ConditionalRoutedImageAttention, DIM, num_heavy_tokens_kv=5, **HEADS)
FeedForward = functools.partial(ConditionalRoutedFeedForward, DIM, num_heavy_tokens=6)
Block = functools.partial(
    ConditionalRoutedTransformerBlock,
    DIM,
    num_heavy_attn_tokens_kv=5,
    num_heavy_ff_tokens=6,
    **HEADS,
)
Sequence = functools.partial(ConditionalRoutedAttention, DIM, num_heavy_tokens_kv=5, **HEADS)


class CrossOfItself(nn.Module):
    """Cross attention as a module of one input: the context is the input, turned back to front."""

    def __init__(self, *, num_heavy_tokens_q=None, num_heavy_tokens_kv=5, **kwargs):
        super().__init__()
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        counts = {"num_tokens_q": num_heavy_tokens_q, "num_tokens_kv": num_heavy_tokens_kv}
        self.cross = ConditionalRoutedCrossAttention(DIM, dim_head=8, heads=2, **counts, **kwargs)

    def forward(self, x, mask=None, num_heavy_tokens_q=None, num_heavy_tokens_kv=None):
        masks = {} if mask is None else {"mask": mask, "context_mask": mask.flip(1)}
        return self.cross(
            x,
            x.flip(1),
            num_tokens_q=num_heavy_tokens_q,
            num_tokens_kv=num_heavy_tokens_kv,
            **masks,
        )


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    layout: str = "first"  # of the map: channel "first" or "last", or flat "tokens"
    residual: bool = False
    routes_on_rounded: str = ""  # count of tokens that are chosen by an intermediate

    @property
    def precise(self):
        """Counts to compare precisions with: a choice by a rounded intermediate may differ."""
        return {self.routes_on_rounded: 1.0} if self.routes_on_rounded else {}


FF = "num_heavy_ff_tokens"
CASES = {
    "sum": Case(functools.partial(Attention)),
    "sum-q": Case(
        functools.partial(Attention, num_heavy_tokens_q=6, multiply_queries_by_score=True)
    ),
    "sum-2-rotary": Case(
        functools.partial(Attention, num_routed_kv=2, rotary_emb=True, channel_first=False), "last"
    ),
    "sum-straight": Case(functools.partial(Attention, router_straight_through=True)),
    "sum-q-soft": Case(
        functools.partial(
            Attention,
            num_heavy_tokens_q=7,
            router_straight_through=False,
            multiply_keys_by_score=True,
        )
    ),
    "sum-heavy": Case(functools.partial(Attention, num_heavy_tokens_q=6, has_light_attn=False)),
    "softmax": Case(functools.partial(Attention, fusion="softmax")),
    "softmax-q": Case(functools.partial(Attention, fusion="softmax", num_heavy_tokens_q=6)),
    "softmax-2-rotary": Case(
        functools.partial(
            Attention, fusion="softmax", num_routed_kv=2, rotary_emb=True, channel_first=False
        ),
        "last",
    ),
    "softmax-cells": Case(
        functools.partial(Attention, fusion="softmax", router_kwargs={"cell_size": 3})
    ),
    "softmax-mean": Case(
        functools.partial(Attention, fusion="softmax", router="mean_query"),
        routes_on_rounded="num_heavy_tokens_kv",
    ),
    "ff": Case(FeedForward),
    "ff-tokens": Case(FeedForward, "tokens"),
    "block": Case(Block, residual=True, routes_on_rounded=FF),
    "block-softmax-q": Case(
        functools.partial(Block, fusion="softmax", num_heavy_attn_tokens_q=6, channel_first=False),
        "last",
        residual=True,
        routes_on_rounded=FF,
    ),
    "sequence": Case(Sequence, "tokens"),
    "sequence-q-rotary": Case(
        functools.partial(
            Sequence, num_heavy_tokens_q=6, rotary_emb=True, multiply_queries_by_score=True
        ),
        "tokens",
    ),
    "sequence-2-soft": Case(
        functools.partial(
            Sequence,
            num_heavy_tokens_q=6,
            num_routed_kv=2,
            router_straight_through=False,
            multiply_keys_by_score=True,
            router_kwargs={"cell_size": (1, 10)},
        ),
        "tokens",
    ),
    "sequence-heavy": Case(functools.partial(Sequence, has_light_attn=False), "tokens"),
    "cross": Case(CrossOfItself, "tokens"),
    "cross-q-blocks": Case(
        functools.partial(
            CrossOfItself,
            num_heavy_tokens_q=6,
            kv_routing_tokens=2,
            kv_router_kwargs={"cell_size": (1, 10)},
        ),
        "tokens",
    ),
    "cross-q-queried": Case(
        functools.partial(
            CrossOfItself, num_heavy_tokens_q=6, kv_routing_tokens=2, routing_from_queries=True
        ),
        "tokens",
    ),
    "block-sequence": Case(Block, "tokens", residual=True, routes_on_rounded=FF),
}
every_module = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def some(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def build(case, dtype=torch.float32, seed=0):
    """The module with every parameter off its initial zero."""
    torch.manual_seed(seed)
    module = case.build()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.to(dtype)


def image(batch=3, height=9, width=7, dtype=torch.float32, seed=1):
    """A map (B, H, W, C), whatever the layout of the module."""
    return torch.randn(
        batch, height, width, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def some_mask(batch=3, height=9, width=7, seed=2):
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < 0.6


def apply(case, module, x, mask=None, **kwargs):
    """The module on a map (B, H, W, C) in its own layout -> (B, H, W, C)."""
    if case.layout == "tokens":
        mask = None if mask is None else mask.flatten(1)
        return module(x.flatten(1, 2), mask=mask, **kwargs).unflatten(1, x.shape[1:3])
    if case.layout == "last":
        return module(x, mask=mask, **kwargs)
    return module(x.permute(0, 3, 1, 2), mask=mask, **kwargs).permute(0, 2, 3, 1)


def gradients(case, module, x, mask=None, call=None, at=0, **kwargs):
    """Output, and the gradients of a loss on the valid tokens by x and by every parameter.

    The loss weighs each token of each sample differently; ``at`` is the place of the first sample
    in a larger batch.
    """
    x = x.detach().clone().requires_grad_()
    out = (call or functools.partial(apply, case, module))(x, mask, **kwargs)
    weight = image(at + out.shape[0], *out.shape[1:3], seed=7)[at:].to(out.dtype)
    loss = out * weight if mask is None else torch.where(mask.unsqueeze(-1), out, 0) * weight
    return out.detach(), torch.autograd.grad(loss.sum(), [x, *module.parameters()])


def assert_near(got, want, tolerance):
    """Equal but for ``tolerance`` of the norm."""
    error = (got.double() - want.double()).norm()
    assert error <= tolerance * want.double().norm(), (
        f"relative error {error / want.double().norm():.1e}"
    )


def assert_same(got, want, **tolerance):
    torch.testing.assert_close(got[0], want[0], **tolerance)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
