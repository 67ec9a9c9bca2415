"""Arguments of SampledAttention (and GroupedAttention): what does not fit is named, nothing is
ignored."""

import pytest
import torch

from colt5_vision.swap.controls import CONTROLS
from colt5_vision.swap.grouped import GroupedAttention
from colt5_vision.swap.sampled import KINDS, SampledAttention
from tests.support.sampled_cases import GRID, TOKENS, close, routing, tensors

BAD = {
    "router": ({"router": "best"}, ValueError, "router: expected one of"),
    "window": ({"window_size": 0}, ValueError, "window_size"),
    "no keys": ({"num_heavy_tokens_kv": 0}, ValueError, "num_heavy_tokens_kv"),
    "share": ({"num_heavy_tokens_kv": 1.01}, ValueError, "num_heavy_tokens_kv"),
    "nan": ({"num_heavy_tokens_kv": float("nan")}, ValueError, "num_heavy_tokens_kv"),
    "no queries": ({"num_heavy_tokens_q": 0}, ValueError, "num_heavy_tokens_q"),
    "text": ({"num_heavy_tokens_q": "all"}, TypeError, "num_heavy_tokens_q"),
    "dim": ({"router": "learned"}, TypeError, "dim"),
    "dim of others": ({"dim": 12}, ValueError, "dim: expected None with router='sampled'"),
    "device": ({"router": "grid", "device": "cpu"}, ValueError, "device: expected None with"),
    "window's queries": (
        {"router": "window", "num_heavy_tokens_q": 4},
        ValueError,
        "num_heavy_tokens_q: expected None with router='window'",
    ),
}


@pytest.mark.parametrize(("how", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments(how, error, match):
    with pytest.raises(error, match=match):
        SampledAttention(**{"window_size": 3, "num_heavy_tokens_kv": 0.25} | how)


def test_bad_inputs():
    q, k, v = tensors()
    made = routing(router="learned")
    expected = rf"^features: expected \({q.shape[0]}, {TOKENS}, \d+\) for router='learned', got"
    for features in (None, torch.zeros(1, TOKENS, 12), torch.zeros(2, TOKENS, 5), "all"):
        with pytest.raises(ValueError, match=expected):
            made(q, k, v, grid_size=GRID, features=features)
    with pytest.raises(ValueError, match="grid_size"):
        routing(router="window")(q, k, v, grid_size=(6, 6))


UNREAD = {
    **{("features", router): torch.zeros(2, TOKENS, 12) for router in KINDS if router != "learned"},
    **{("generator", router): torch.Generator() for router in CONTROLS},
    **{("curve", router): torch.arange(TOKENS) for router in CONTROLS if router != "grid"},
    ("num_heavy_tokens_q", "window"): 9,
}


@pytest.mark.parametrize(("name", "router"), UNREAD)
def test_what_a_router_does_not_read_is_refused(name, router):
    given = {name: UNREAD[name, router]}
    with pytest.raises(ValueError, match=f"{name}: expected None with router='{router}'"):
        routing(router=router)(*tensors(), grid_size=GRID, **given)


SETTINGS = {"window_size": (2, 5), "num_heavy_tokens_kv": 9, "num_heavy_tokens_q": 0.5}


def test_settings_of_a_call_are_those_of_a_module_that_has_them():
    q, k, v = tensors()
    expected = SampledAttention(**SETTINGS)(q, k, v, grid_size=GRID)
    close(routing(3)(q, k, v, grid_size=GRID, **SETTINGS), expected)
    assert (routing(3)(q, k, v, grid_size=GRID) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_a_call_is_never_taken_for_the_default(name):
    q, k, v = tensors()
    with pytest.raises(ValueError, match=name):
        routing(3)(q, k, v, grid_size=GRID, **{name: 0})


@pytest.mark.parametrize("kind", [SampledAttention, GroupedAttention])
@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"grid_size": (6, 9)}, ValueError, "grid_size: expected a product of 48"),
        ({"grid_size": (48,)}, ValueError, "grid_size"),
        ({"grid_size": (1, 1, 6, 8)}, ValueError, "grid_size"),
        ({"grid_size": (6.0, 8.0)}, TypeError, "grid_size"),
        ({"key_mask": torch.ones(1, 30, dtype=torch.bool)}, ValueError, "key_mask"),
        ({"key_mask": torch.ones(1, 48)}, TypeError, "key_mask"),
    ],
)
def test_what_does_not_fit_is_named(kind, how, error, match):
    q = torch.randn(1, 2, 48, 8)
    attention = kind(window_size=3, num_heavy_tokens_kv=4)
    with pytest.raises(error, match=match):
        attention(q, q, q, **({"grid_size": (6, 8)} | how))
