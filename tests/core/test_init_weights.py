"""Made on the meta device, materialised, initialised: nothing is left as it was."""

import math

import pytest
import torch

import colt5_vision
from colt5_vision import compat
from colt5_vision.positions import axial_rotary, rotary, sincos_2d
from tests.core.test_weights_through_modules import causal
from tests.support.module_cases import CASES, every_module


def fresh(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    return module


def spread(module):
    """Mean and standard deviation of every parameter."""
    return {
        name: torch.stack([p.mean(), p.std(correction=0)]) for name, p in module.named_parameters()
    }


@every_module
def test_nothing_is_left_uninitialised(case):
    module = fresh(case.build)
    init = getattr(module, "init_weights", None) or module.cross.init_weights
    init()
    left = [name for name, parameter in module.named_parameters() if parameter.isnan().any()]
    assert not left


def test_nothing_is_left_uninitialised_in_causal_attention():
    module = fresh(lambda: causal(num_heavy_tokens_q=3))
    module.init_weights()
    assert not any(parameter.isnan().any() for parameter in module.parameters())


@pytest.mark.parametrize("library", [colt5_vision, compat])
def test_a_router_draws_its_tokens_as_its_constructor_does(library):
    def make():
        return library.CoordinateDescentRouter(16, num_routing_tokens=3)

    module = fresh(make)
    torch.manual_seed(0)
    module.init_weights()
    torch.manual_seed(0)
    assert torch.equal(module.routing_token, make().routing_token)


@every_module
def test_weights_are_drawn_as_the_constructor_draws_them(case):
    torch.manual_seed(0)
    first, second = case.build(), case.build()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.fill_(3.0)
    (getattr(second, "init_weights", None) or second.cross.init_weights)()
    want, got = spread(first), spread(second)
    for (name, a), b in zip(want.items(), got.values(), strict=True):
        size = first.get_parameter(name).numel()
        if a[1] == 0:  # ones and zeros
            torch.testing.assert_close(a, b, msg=name)
        else:
            noise = 6 * a[1] / math.sqrt(size)
            assert (a - b).abs().max() < noise, name


def test_init_weights_of_every_layer_is_public():
    for case in CASES.values():
        module = case.build()
        assert callable(getattr(module, "init_weights", None) or module.cross.init_weights)
    for name in colt5_vision.__all__:
        public = getattr(colt5_vision, name)
        if isinstance(public, type) and issubclass(public, torch.nn.Module):
            assert callable(public.init_weights), name


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_positions_do_not_follow_the_default_dtype(default):
    x = torch.randn(3, 5, 8)
    places = torch.arange(5)
    want = sincos_2d(3, 4, 8, "cpu"), rotary(x, places), axial_rotary(x, (places, places))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = sincos_2d(3, 4, 8, "cpu"), rotary(x, places), axial_rotary(x, (places, places))
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
