"""Routed diffusers models in half precision, under autocast, and their gradients."""

import pytest
import torch

from colt5_vision import route_attention
from tests.support.diffusers_cases import arguments, build, close, config, run, some

FEW = ("sd15", "sdxl", "ddpm", "pixart", "sd35", "flux")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some(*FEW)
def test_half_precision_errs_no_more_than_the_stock_model(case, dtype):
    truth = run(build(case), case)
    model = build(case, dtype)
    stock = run(model, case, dtype=dtype)
    report = route_attention(model, config(1.0))
    routed = run(model, case, dtype=dtype)
    assert routed.dtype == dtype and report.calls.routed == len(case.tokens)
    error = lambda out: (out.double() - truth).square().mean().sqrt()
    assert error(routed) < 1.3 * error(stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some(*FEW)
def test_autocast_errs_no_more_than_the_stock_model(case, dtype):
    truth = run(build(case), case)
    model = build(case, torch.float32)
    with torch.autocast("cpu", dtype):
        stock = run(model, case, dtype=torch.float32)
        report = route_attention(model, config(1.0))
        routed = run(model, case, dtype=torch.float32)
    assert routed.dtype == stock.dtype and report.calls.routed == len(case.tokens)
    error = lambda out: (out.double() - truth).square().mean().sqrt()
    assert error(routed) < 1.3 * error(stock)


def gradients(model, case):
    """Of all parameters and of the input, by a loss on the output."""
    call = arguments(case)
    inputs = {name: x for name, x in call.items() if name in ("sample", "hidden_states")}
    for x in inputs.values():
        x.requires_grad_()
    model(**call, return_dict=False)[0].sin().sum().backward()
    wanted = dict(model.named_parameters()) | inputs
    return {name: x.grad for name, x in wanted.items() if x.grad is not None}


@some(*FEW)
def test_gradients_are_the_stock_models_with_all_keys_and_differ_with_fewer(case):
    expected = gradients(build(case), case)
    found = []
    for share in (1.0, 0.25):
        model = build(case)
        report = route_attention(model, config(share))
        found.append(gradients(model, case))
        assert report.calls.routed == len(case.tokens)
    assert found[0].keys() == found[1].keys() == expected.keys() and len(expected) > 10
    least = 1e-6 * max(x.abs().max() for x in expected.values())  # some are 0 but for rounding
    scale = {name: x.abs().max().clamp_min(least) for name, x in expected.items()}
    for name, x in expected.items():
        close(found[0][name] / scale[name], x / scale[name], 1e-7)
    assert all(x.isfinite().all() for x in found[1].values())
    changes = [(found[1][name] - x).abs().max() / scale[name] for name, x in expected.items()]
    assert max(changes) > 0.01
