"""Counts that narrow as training goes on."""

import pytest
import torch
from torch import nn

from colt5_vision import (
    ConditionalRoutedAttention,
    ConditionalRoutedAutoregressiveAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedImageAttention,
    RoutingSchedule,
)

COUNTS = {"num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 4}


def image(**counts):
    heads = {"light_heads": 2, "light_dim_head": 8, "heavy_heads": 2, "heavy_dim_head": 8}
    return ConditionalRoutedImageAttention(16, light_window_size=4, **heads, **counts)


def test_counts_halve_from_hold_until_they_are_the_modules_own():
    module = image(num_heavy_tokens_kv=4)
    schedule, seen = RoutingSchedule(module, keys=16, hold=0.25, until=0.75), []
    for step in range(65):
        schedule.step(step / 64)
        seen.append(module.num_heavy_tokens_kv)
    assert seen == [64] * 24 + [32] * 8 + [16] * 8 + [8] * 8 + [4] * 17
    assert module.num_heavy_tokens_q is None


def test_hold_and_until_at_once_are_one_step_down():
    module = image(num_heavy_tokens_kv=4)
    schedule, seen = RoutingSchedule(module, keys=8, hold=0.5, until=0.5), []
    for progress in (0.0, 0.49, 0.5, 1.0):
        schedule.step(progress)
        seen.append(module.num_heavy_tokens_kv)
    assert seen == [32, 32, 4, 4]


def test_alternating_steps_have_the_first_counts_and_the_modules_own_in_turn():
    module = image(num_heavy_tokens_kv=4)
    schedule, seen = RoutingSchedule(module, keys=16, hold=0.25, until=0.75, alternate=True), []
    for step in range(33):
        schedule.step(step / 32)
        seen.append(module.num_heavy_tokens_kv)
    assert seen[:9] == [64] * 9 and seen[24:] == [4] * 9
    assert set(seen[9:24:2]) ^ set(seen[10:24:2]) == {4, 64}


def test_an_evaluation_takes_no_training_steps_turn():
    module = image(num_heavy_tokens_kv=4)
    schedule, seen = RoutingSchedule(module, keys=16, hold=0, until=1, alternate=True), []
    for step in range(1, 7):
        schedule.step(step / 8)
        seen.append(module.num_heavy_tokens_kv)
        schedule.step(1.0)
        assert module.num_heavy_tokens_kv == 4
    assert set(seen[::2]) ^ set(seen[1::2]) == {4, 64}


def test_softmax_alternates_and_sum_narrows_late_by_default():
    modules = nn.ModuleList(image(num_heavy_tokens_kv=4, fusion=fusion) for fusion in ("softmax", "sum"))
    modules.append(ConditionalRoutedAttention(16, light_window_size=4, **COUNTS))
    for given in ({}, {"alternate": False}):
        schedule, seen = RoutingSchedule(modules, keys=4, **given), []
        for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
            schedule.step(progress)
            seen.append([module.num_heavy_tokens_kv // 4 for module in modules])
        softmax, *others = zip(*seen)
        assert softmax == ((4, 4, 4, 4, 2, 2, 2, 1) if given else (4, 4, 1, 4, 1, 4, 1, 1))
        assert others == [(4, 4, 4, 4, 4, 4, 2, 1)] * 2


def test_every_attention_of_a_model_keeps_its_own_count():
    model = nn.Sequential(
        image(num_heavy_tokens_q=0.25, num_heavy_tokens_kv=0.125),
        nn.Linear(16, 16),
        ConditionalRoutedAttention(16, light_window_size=4, **COUNTS),
        ConditionalRoutedAutoregressiveAttention(16, light_window_size=8, heavy_window_size=16, **COUNTS),
    )
    schedule = RoutingSchedule(model, keys=4, queries=8)

    cross = ConditionalRoutedCrossAttention(16, num_tokens_q=0.5, num_tokens_kv=7)
    both = RoutingSchedule(nn.ModuleList([model, cross]), keys=2)
    both.step(0.1)
    assert (cross.num_tokens_q, cross.num_tokens_kv) == (0.5, 14) and model[2].num_heavy_tokens_kv == 8
    both.step(1)

    def counts():
        return [(m.num_heavy_tokens_q, m.num_heavy_tokens_kv) for m in model if not isinstance(m, nn.Linear)]

    own = counts()
    schedule.step(0)
    assert counts() == [(1.0, 0.5), (24, 16), (24, 16)]
    schedule.step(1)
    assert counts() == own == [(0.25, 0.125), (3, 4), (3, 4)]


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_the_forward_uses_as_many_keys_and_more_than_all_are_all(fusion):
    torch.manual_seed(0)
    module, x = image(num_heavy_tokens_kv=2, fusion=fusion), torch.randn(2, 16, 6, 7)
    routed = []
    module.kv_router.register_forward_hook(lambda m, args, routing: routed.append(routing.indices.shape[-1]))
    schedule = RoutingSchedule(module, keys=32, hold=0.0, until=1.0, alternate=False)
    for progress in (0.0, 0.2, 1.0):
        schedule.step(progress)
        module(x).sum().backward()
    assert routed == [42, 32, 2]
    assert module.kv_router.routing_token.grad.abs().max() > 0


@pytest.mark.parametrize(
    "name, call",
    [
        ("keys", lambda m: RoutingSchedule(m, keys=3)),
        ("queries", lambda m: RoutingSchedule(m, queries=0)),
        ("keys", lambda m: RoutingSchedule(m, keys=2.0)),
        ("hold, until: expected both or none", lambda m: RoutingSchedule(m, hold=0.7)),
        ("hold, until: expected 0", lambda m: RoutingSchedule(m, hold=0.7, until=0.6)),
        ("alternate", lambda m: RoutingSchedule(m, alternate=1)),
        ("hold, until: expected 0", lambda m: RoutingSchedule(m, hold=0.0, until=float("nan"))),
        ("model", lambda m: RoutingSchedule(nn.Linear(2, 2))),
        ("progress", lambda m: RoutingSchedule(m).step(1.2)),
        ("progress", lambda m: RoutingSchedule(m).step(float("nan"))),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        call(image(num_heavy_tokens_kv=4))
