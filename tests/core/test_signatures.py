"""What signatures promise: one default for one argument, masks by name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest

import colt5_vision
from colt5_vision import ops, visualize

MODULES = [colt5_vision, ops, visualize]
ROOMS = {"models": "timm", "pipelines": "diffusers"}  # and what each needs
MODULES += [
    importlib.import_module(f"colt5_vision.{room}")
    for room, needs in ROOMS.items()
    if find_spec(f"{needs}.models")
]
PUBLIC = {name: getattr(module, name) for module in MODULES for name in module.__all__}
PUBLIC = {name: one for name, one in PUBLIC.items() if callable(one)}
MASKS = ("mask", "key_mask", "context_mask")

# defaults that differ: of which callables, and why
APART = {
    "eps": (
        {"gather_normalize", "router_logits", "ConditionalRoutedAttentionBlock"},
        "of a norm, torch's and diffusers' own; elsewhere the temperature of a soft top-k",
    ),
    "n_iters": (
        {"coordinate_descent"},
        "an operator of iterations has some; None is the closed form, which it is not",
    ),
    "light_window_size": (
        {
            "ConditionalRoutedAttention",
            "ConditionalRoutedAutoregressiveAttention",
            "ConditionalRoutedTransformerBlock",
        },
        "128 tokens of a line; 16 x 16 of a map; the block takes both, each with its own",
    ),
    **dict.fromkeys(
        ("light_heads", "light_dim_head", "heavy_heads", "heavy_dim_head"),
        (
            {"ConditionalRoutedImageAttention"},
            "as elsewhere, but that softmax takes what is not given from the other branch",
        ),
    ),
    "num_heavy_tokens_kv": ({"RoutedAttentionConfig"}, "a layer to train has none"),
    "layers": ({"show_routing"}, "how many are drawn, not which are routed"),
    "router": ({"RoutedAttentionConfig"}, "pretrained weights come without a learned router"),
    "min_tokens": ({"calibrate_routing"}, "what is measured needs no estimate of the gain"),
    "place": ({"RoutingRecord"}, "where a map lies in a picture; elsewhere a layer in a network"),
    "window_size": ({"RoutedAttentionConfig"}, "for pretrained weights; a backbone was made for 7"),
}
# registered architectures: their sizes and choices are the model's own
BACKBONES = {"Colt5Pyramid", "Colt5VisionTransformer"}


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    named = inspect.signature(function).parameters
    return {p.name: p for p in named.values() if p.default is not p.empty}


@pytest.mark.parametrize("name", sorted({p for one in PUBLIC.values() for p in parameters(one)}))
def test_one_argument_has_one_default(name):
    """In the constructors and functions of everything public."""
    given = {
        public: parameters(one)[name].default
        for public, one in PUBLIC.items()
        if name in parameters(one)
    }
    others, _ = APART.get(name, (set(), ""))
    assert others & PUBLIC.keys() <= given.keys(), "an exception of nothing"
    alike = {public: value for public, value in given.items() if public not in others | BACKBONES}
    assert len({repr(value) for value in alike.values()}) <= 1, alike


def library_functions() -> Iterator[tuple[str, Callable]]:
    """Every function and method of the core, but for ``compat``, which has other signatures."""
    for found in pkgutil.walk_packages(colt5_vision.__path__, "colt5_vision."):
        parts = found.name.split(".")
        if {"compat", *ROOMS} & set(parts) or parts[-1].startswith(("triton", "kernels")):
            continue
        module = importlib.import_module(found.name)
        for name, one in vars(module).items():
            if getattr(one, "__module__", None) != found.name:
                continue
            members = vars(one).items() if inspect.isclass(one) else [(None, one)]
            for member, function in members:
                if inspect.isfunction(function):
                    yield ".".join(filter(None, (found.name, name, member))), function


def test_a_mask_that_may_be_left_out_is_given_by_name():
    functions = dict(library_functions())
    functions |= {name: one for name, one in PUBLIC.items() if inspect.isfunction(one)}
    by_position = [
        f"{name}: {p.name}"
        for name, function in functions.items()
        for p in parameters(function).values()
        if p.name in MASKS and p.kind is not p.KEYWORD_ONLY
    ]
    assert len(functions) > 200 and not by_position
