"""Heavy outputs are joined to what the light branch made, and nobody sees its output change."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from colt5_vision import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention
from colt5_vision.branches import LightBranch

HEADS = {
    "light_heads": 2,
    "heavy_heads": 2,
    "light_dim_head": 8,
    "heavy_dim_head": 8,
    "light_window_size": 4,
}


def attention():
    torch.manual_seed(0)
    counts = {"num_heavy_tokens_q": 8, "num_heavy_tokens_kv": 8}
    return ConditionalRoutedImageAttention(16, **counts, **HEADS, fusion="sum").double()


def feed_forward():
    torch.manual_seed(0)
    return ConditionalRoutedFeedForward(16, num_heavy_tokens=8).double()


MODULES = {"attention": attention, "feed-forward": feed_forward}


def image():
    return torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(module, run=None):
    x = image().requires_grad_()
    out = (run or module)(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_selective_checkpointing(make):
    """It keeps what a matmul returned: that must not change afterwards."""

    def policy(_, op, *args, **kwargs):
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    module = make()

    def and_on(x):
        return module(x).sin()  # whose backward needs the output of the module, made anew

    contexts = partial(create_selective_checkpoint_contexts, policy)
    run = partial(checkpoint, and_on, use_reentrant=False, context_fn=contexts)
    same(gradients(module, run), gradients(module, and_on))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_keep_what_they_saw(make, everywhere):
    module, seen = make(), []

    def look(layer, inputs, out):
        if isinstance(layer, nn.Linear):
            seen.append((out, out.detach().clone()))

    want = gradients(module)
    if everywhere:
        handles = [nn.modules.module.register_module_forward_hook(look)]
    else:
        handles = [
            layer.register_forward_hook(look)
            for layer in module.modules()
            if isinstance(layer, nn.Linear)
        ]
    try:
        same(gradients(module), want)
    finally:
        for handle in handles:
            handle.remove()
    assert seen and all(torch.equal(out, before) for out, before in seen)


class Squashed(LightBranch):
    def forward(self, *args):
        return super().forward(*args).sigmoid()  # autograd needs its output


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


def test_a_light_branch_that_goes_on_is_not_written_into():
    module = attention()
    module.attend.light_attn.__class__ = Squashed
    x = image()[:1].requires_grad_()
    name = "attend.light_attn.to_out.weight"
    weight = module.get_parameter(name).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(module, {name: w}, (x,)), weight
    )


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_wrapped_light_branch(make):
    module = make()
    want = gradients(module)
    owner, name = (module, "light_ff") if make is feed_forward else (module.attend, "light_attn")
    setattr(owner, name, Wrapped(getattr(owner, name)))
    same(gradients(module), want)


def test_a_compiled_light_branch():
    module = feed_forward()
    want = gradients(module)
    module.light_ff = torch.compile(module.light_ff, backend="eager")
    same(gradients(module), want)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6, "elementwise_affine": False}])
def test_another_norm_in_the_heavy_branch(options):
    module = attention()
    module.attend.heavy_attn.norm = nn.RMSNorm(16, **options).double()
    out = module(image())
    module.attend.heavy_attn.norm = Wrapped(module.attend.heavy_attn.norm)
    torch.testing.assert_close(out, module(image()))


def test_hooks_on_the_heavy_norm_are_called():
    module, calls = attention(), []
    module.attend.heavy_attn.norm.register_forward_hook(lambda *_: calls.append(1))
    module(image())
    assert len(calls) == 2  # queries and keys
