"""Every public module under the tracer of TorchScript, and what stands on it."""

import inspect
from functools import partial

import pytest
import timm
import torch
from torch import nn

import colt5_vision
from colt5_vision import compat, models
from tests.support.module_cases import DIM, HEADS

ROOMS = {"core": colt5_vision, "compat": compat, "models": models}
try:
    from colt5_vision import pipelines
except ImportError:  # no diffusers
    pass
else:
    ROOMS["pipelines"] = pipelines
PUBLIC = {
    f"{room}.{name}": getattr(package, name)
    for room, package in ROOMS.items()
    for name in package.__all__
    if inspect.isclass(getattr(package, name)) and issubclass(getattr(package, name), nn.Module)
}

KEYS = {"num_heavy_tokens_kv": 5, **HEADS}
VIT = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 3,
    "dim": DIM,
    "depth": 1,
    "ff_num_heavy_tokens": 4,
    "ff_heavy_mult": 2,
    "ff_light_mult": 0.5,
    **{f"attn_{name}": size for name, size in KEYS.items()},
    "attn_num_heavy_tokens_q": 4,
}
# by the end of the name: what is made with, and the shapes that are taken
MADE = {
    "ConditionalRoutedImageAttention": (KEYS, (2, DIM, 9, 7)),
    "ConditionalRoutedAttention": (KEYS, (2, 63, DIM)),
    "ConditionalRoutedAutoregressiveAttention": (
        {"num_heavy_tokens_q": 2, **KEYS},
        (2, 63, DIM),
    ),
    "ConditionalRoutedCrossAttention": (
        {"num_tokens_q": 6, "num_tokens_kv": 5, "dim_head": 8, "heads": 2},
        (2, 63, DIM),
        (2, 20, DIM),
    ),
    "ConditionalRoutedFeedForward": ({"num_heavy_tokens": 6}, (2, DIM, 9, 7)),
    "ConditionalRoutedTransformerBlock": (
        {"num_heavy_attn_tokens_kv": 5, "num_heavy_ff_tokens": 6, **HEADS},
        (2, DIM, 9, 7),
    ),
    "CoordinateDescentRouter": ({}, (2, 63, DIM)),
    "ConditionalRoutedAttentionBlock": (
        {"num_heavy_tokens_kv": 5, "heads": 2, "dim_head": 8, "light_window_size": 4},
        (2, DIM, 9, 7),
    ),
    "ConditionalRoutedViT": (VIT, (2, 3, 16, 16)),
    "Colt5VisionTransformer": ("test_colt5_vit", (2, 3, 64, 96)),
    "Colt5Pyramid": ("test_colt5_pyramid", (2, 3, 64, 96)),
}
every = pytest.mark.parametrize("name", PUBLIC)


class Choice(nn.Module):
    """A router as a module of tensors alone."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        return tuple(self.router(x, num_tokens=5))


def made(name):
    """A public module, and the inputs of a call."""
    torch.manual_seed(0)
    kind = PUBLIC[name]
    how, *shapes = MADE[name.partition(".")[2]]
    if isinstance(how, str):
        module = timm.create_model(how, num_classes=3)
        assert type(module) is kind
    else:
        module = kind(**({} if "dim" in how else {"dim": DIM}) | how)
    return module.eval(), tuple(map(torch.randn, shapes))


def as_traced(module):
    is_router = isinstance(module, colt5_vision.CoordinateDescentRouter)
    return Choice(module) if is_router else module


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_gives_the_same(name):
    module, inputs = made(name)
    module = as_traced(module)
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs, check_trace=False)
        others = tuple(x.flip(0) for x in inputs)
        torch.testing.assert_close(traced(*others), module(*others))


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_in_scopes_gives_the_same(name):
    """As fvcore counts: a graph whose nodes lie in the scopes of their modules, by hooks."""
    module, inputs = made(name)
    module = as_traced(module)

    def enter(scope, *_):
        torch._C._get_tracing_state().push_scope(scope)

    def leave(*_):
        torch._C._get_tracing_state().pop_scope()

    for path, part in module.named_modules():
        part.register_forward_pre_hook(partial(enter, path or "whole"))
        part.register_forward_hook(leave)
    with torch.no_grad():
        graph, out = torch.jit._get_trace_graph(module, inputs)[:2]
    for _, part in module.named_modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(out, module(*inputs))
    scopes = {node.scopeName() for node in graph.nodes()}
    assert any(scope.startswith("whole/") for scope in scopes), scopes


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_old_onnx_exporter_is_refused_and_the_new_one_named(name, tmp_path):
    module, inputs = made(name)
    with pytest.raises(NotImplementedError, match="^torch.onnx.export: expected dynamo=True"):
        torch.onnx.export(module, inputs, tmp_path / "model.onnx", dynamo=False)
    with torch.no_grad():  # and nothing stays behind
        as_traced(module)(*inputs)
