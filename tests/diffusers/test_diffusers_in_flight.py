"""Several forwards in flight, broken off, checkpointed in other ways than diffusers' own, and
attention that is not torch's."""

import diffusers
import pytest
import torch
from diffusers.models import Transformer2DModel
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from colt5_vision import route_attention
from colt5_vision.swap.report import NEVER_ROUTED
from colt5_vision.swap.reroute import NOT_CALLED
from tests.support.diffusers_cases import (
    CASES,
    WIDTH,
    arguments,
    build,
    close,
    config,
    run,
    some,
)

RULES = {
    "window": {"min_timestep": 500, "window_size": 5},
    "keys": {"min_timestep": 500, "num_heavy_tokens_kv": 9},
    "full": {"min_timestep": 500, "full": True},
}


def enable(model, **how):
    route_attention(model, config(**how))
    return model.train()


def timed(case, timestep, seed=0):
    call = arguments(case, seed=seed)
    return call | {"timestep": torch.full_like(call["timestep"], timestep)}


def gradient(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", RULES)
@some("sd15", "sd35", "flux")
def test_a_checkpointed_forward_keeps_its_own_timestep(case, rule):
    """As in consistency training: the student at one timestep, its target at another, backward
    after both."""
    grads = []
    for checkpointing in (False, True):
        model = enable(build(case), schedule=[RULES[rule]])
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = model(**timed(case, 900), return_dict=False)[0].square().mean()
        with torch.no_grad():
            model(**timed(case, 100, seed=1))
        loss.backward()
        grads.append(gradient(model))
    close(*grads)


@some("sd15", "flux")
def test_reentrant_checkpointing_is_an_error(case):
    model = enable(build(case))
    model.enable_gradient_checkpointing(
        lambda block, *args: checkpoint(block, *args, use_reentrant=True)
    )
    call = arguments(case)
    call |= {
        name: call[name].requires_grad_() for name in ("sample", "hidden_states") if name in call
    }
    loss = model(**call, return_dict=False)[0].square().mean()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_whole_transformer_can_be_checkpointed(frozen, monkeypatch):
    case, grads, call = CASES["sd15"], [], Transformer2DModel.__call__

    def whole(self, *args, **kwargs):
        return checkpoint(lambda *given: call(self, *given, **kwargs), *args, use_reentrant=False)

    for checkpointing in (False, True):
        model = enable(build(case))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                not frozen or "attn1.to_q" in name
            )  # as with LoRA: inputs need no gradient
        if checkpointing:
            monkeypatch.setattr(Transformer2DModel, "__call__", whole)
        losses = [
            model(**arguments(case, size), return_dict=False)[0].square().mean()
            for size in case.sizes[:2]
        ]
        sum(losses).backward()
        grads.append(gradient(model))
    assert grads[0]
    close(*grads)


@some("sd15", "pixart", "flux")
def test_a_forward_that_breaks_off_leaves_nothing_behind(case):
    size, other = case.sizes[:2]
    model, first = enable(build(case)), next(iter(case.tokens))
    expected = run(enable(build(case)), case, other)

    def stop(*args):
        raise KeyboardInterrupt

    handle = model.get_submodule(first).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, case, size)
    handle.remove()
    assert torch.equal(run(model, case, other), expected)


def test_attention_that_other_code_has_replaced_is_counted_and_told(monkeypatch):
    case = CASES["pixart"]
    model, original = build(case), functional.scaled_dot_product_attention
    report = route_attention(model, config())
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: original(*args, **kwargs),
    )
    run(model, case)  # it calls torch's own in the end
    assert report.calls.routed == len(report)
    report.reset_calls()
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: (q @ k.mT).softmax(-1) @ v,
    )
    with pytest.warns(RuntimeWarning, match=NEVER_ROUTED):
        run(model, case)
    assert report.calls.exact == {NOT_CALLED: len(report)} and not report.calls.routed


def test_the_mode_tokens_of_a_flux_controlnet_count_as_text():
    case, model = CASES["flux"], build(CASES["flux"])
    net = diffusers.FluxControlNetModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=model.config.in_channels,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=model.config.axes_dims_rope,
        num_mode=3,
    ).double()
    report = route_attention(net, config())
    call = arguments(case, batch=1)
    with torch.no_grad():
        net(**call, controlnet_cond=call["hidden_states"], controlnet_mode=torch.tensor([[1]]))
    assert report.calls.routed == len(report) == 3
