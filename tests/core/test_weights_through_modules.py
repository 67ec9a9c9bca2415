"""A weight is used by calling the module that holds it, so adapters and wrappers in its place work.

Each test is of a whole kind: every Linear of every layer.
"""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import colt5_vision.models  # noqa: F401  registers the backbones
from colt5_vision import ConditionalRoutedAutoregressiveAttention
from tests.support.module_cases import CASES, DIM, apply, build, image


def causal(**kwargs):
    heads = {"light_heads": 2, "light_dim_head": 8, "heavy_heads": 2, "heavy_dim_head": 8}
    return ConditionalRoutedAutoregressiveAttention(
        DIM, num_heavy_tokens_kv=5, light_window_size=8, **heads, **kwargs
    )


def stirred(module, seed=0):
    """The module with every parameter off its initial zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def of_case(case):
    return lambda: (build(case), lambda module: apply(case, module, image()))


def of_sequence(**kwargs):
    return lambda: (stirred(causal(**kwargs)), lambda module: module(image().flatten(1, 2)))


def of_backbone(name, **kwargs):
    def make():
        torch.manual_seed(0)
        model = timm.create_model(name, depth=1, **kwargs) if "vit" in name else None
        model = timm.create_model(name, **kwargs) if model is None else model
        pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        return stirred(model).eval(), lambda module: module(pixels)

    return make


MAKERS = {name: of_case(case) for name, case in CASES.items()} | {
    "causal": of_sequence(),
    "causal-q-rotary": of_sequence(num_heavy_tokens_q=3, num_routed_kv=2, rotary_emb=True),
    "colt5_vit": of_backbone("test_colt5_vit"),
    "colt5_vit-sum": of_backbone("test_colt5_vit", fusion="sum"),
    "colt5_pyramid": of_backbone("test_colt5_pyramid"),
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def linears(module):
    names = [name for name, part in module.named_modules() if type(part) is nn.Linear]
    assert names
    return names


@every_layer
def test_an_adapter_on_any_linear_changes_the_output_and_trains(make):
    peft = pytest.importorskip("peft")
    module, run = make()
    before = run(module).detach()
    for name in linears(module):
        adapted = copy.deepcopy(module)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=f".*{name}", init_lora_weights=False)
        peft.inject_adapter_in_model(config, adapted)

        out = run(adapted)
        assert (out - before).abs().max() > 1e-5, name
        out.square().sum().backward()
        grads = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
        assert grads, name
        assert all(grad is not None and grad.any() for grad in grads.values()), name


@every_layer
def test_weight_norm_on_every_linear_is_the_same_and_trains(make):
    module, run = make()
    before = run(module).detach()
    for name in linears(module):
        parametrizations.weight_norm(module.get_submodule(name))
    out = run(module)
    torch.testing.assert_close(out, before, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        if "parametrizations" in name:
            assert parameter.grad is not None, name


@every_layer
def test_a_pruned_linear_is_one_with_those_weights(make):
    module, run = make()
    before = run(module).detach()
    for name in linears(module):
        prune.l1_unstructured(module.get_submodule(name), "weight", amount=0.5)
    masked = run(module).detach()
    for name in linears(module):
        prune.remove(module.get_submodule(name), "weight")
    assert (masked - before).abs().max() > 1e-5
    torch.testing.assert_close(run(module).detach(), masked, atol=0, rtol=0)


@every_layer
@torch.no_grad()
def test_dynamic_int8_on_every_linear_runs_and_is_near(make):
    module, run = make()
    module.eval()
    before = run(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    # int8 weights move a logit at the border of the top-k, and with it the whole token
    error = (run(quantised) - before).norm(dim=-1)
    assert error.max() > 0 and (error / before.norm(dim=-1)).median() < 0.2


@every_layer
@torch.no_grad()
def test_offloaded_weights_are_fetched(make):
    cpu_offload = pytest.importorskip("accelerate").cpu_offload
    module, run = make()
    module.eval()
    before = run(module)
    cpu_offload(module, execution_device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    torch.testing.assert_close(run(module), before, atol=0, rtol=0)


@every_layer
def test_another_class_in_the_place_of_any_part_is_called(make):
    """Wrapping every module that has weights, one at a time, changes nothing."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    module, run = make()
    before = run(module).detach()
    for name in linears(module):
        owner, _, child = name.rpartition(".")
        owner = module.get_submodule(owner)
        part = getattr(owner, child) if not child.isdigit() else owner[int(child)]
        wrapped = Wrapped(part)
        setattr(owner, child, wrapped)
        torch.testing.assert_close(run(module).detach(), before, atol=0, rtol=0)
        assert wrapped.calls, name
        setattr(owner, child, part)
