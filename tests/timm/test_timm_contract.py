"""timm's own tests of its models pass for ours.

By default for the models that run in seconds; ``COLT5_TIMM_MODELS='*colt5*'`` (a
``timm.list_models`` filter) for all.
"""

import inspect
import os
from unittest import mock

import pytest
import timm

import colt5_vision.models  # noqa: F401
from tests.support import timm_own_tests
from tests.support.timm_own_tests import DESELECTED, Unavailable, fetch, load, select

FAST = ["test_colt5_vit", "test_colt5_pyramid", "colt5_vit_tiny_patch16_224", "colt5_pyramid_tiny"]
MODELS = (
    timm.list_models(os.environ["COLT5_TIMM_MODELS"]) if "COLT5_TIMM_MODELS" in os.environ else FAST
)
THREE_LEVELS = ("test_model_forward_features[", "test_model_forward_intermediates[")

try:
    loaded = load(fetch(), MODELS)
except Unavailable as error:
    pytest.skip(str(error), allow_module_level=True)
own = select(loaded, MODELS)
globals().update(own)


@pytest.fixture(autouse=True)
def three_levels(request):
    name = request.node.name
    if "nano" in name and name.startswith(THREE_LEVELS):
        pytest.skip("the demo's model has two blocks, timm asks for three feature levels")


def test_an_unreachable_registry_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(timm_own_tests, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable, match="pip download .* failed"):
        fetch()


def test_timm_tests_all_of_the_contract():
    expected = ["default_cfgs", "forward", "backward", "forward_features", "forward_intermediates"]
    expected += ["forward_fx", "backward_fx"]
    assert {
        *(f"test_model_{name}" for name in expected),
        "test_prune_intermediate_layers_contract",
    } <= set(own)


def test_only_tests_of_torch_jit_are_left_out():
    for name in DESELECTED:
        assert "torch.jit.script(" in inspect.getsource(getattr(loaded, name))
    with mock.patch.object(timm_own_tests, "DESELECTED", set()):
        everything = select(loaded, MODELS)
    assert set(everything) - set(own) == DESELECTED
