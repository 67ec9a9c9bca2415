"""Tiny models of every class of the table, made in memory, and the arguments of their forwards for
a map of so many tokens: a file a family."""

import copy
from functools import cache
from typing import Any

import torch

from tests.support.diffusers_cases import spread
from tests.support.diffusers_models import latents, packed, refined, unets, videos, videos_with_text
from tests.support.diffusers_models.tiny import Tiny

MODELS: dict[str, Tiny] = {}
for _family in (packed, refined, latents, unets, videos, videos_with_text):
    MODELS |= _family.MODELS
MODELS = dict(sorted(MODELS.items()))
"""By the name of the class."""


@cache
def _pristine(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return spread(MODELS[name].make())


def build(name: str) -> torch.nn.Module:
    return copy.deepcopy(_pristine(name))


def run(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """All outputs of a model in one row, without gradients."""
    with torch.no_grad():
        return torch.cat([x.flatten() for x in outputs(model(**call))])


def outputs(out: Any) -> list[torch.Tensor]:
    """The tensors in what a model returns."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (list, tuple)):
        return [x for one in out for x in outputs(one)]
    return []
