"""Counts that narrow as training goes on."""

import copy
import io

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


def keys(module):
    """How many keys a training forward would route now."""
    return module.keys_now(module.num_heavy_tokens_kv)


def run(module, places, **kwargs):
    """Keys of a training forward after the steps of a new schedule, one after the other."""
    schedule, seen = RoutingSchedule(module, **kwargs), []
    for progress in places:
        schedule.step(progress)
        seen.append(keys(module))
    assert module.num_heavy_tokens_kv == 4 and module.num_heavy_tokens_q is None
    return seen


def test_counts_halve_from_hold_until_they_are_the_modules_own():
    places = [step / 64 for step in range(65)]
    seen = run(image(num_heavy_tokens_kv=4), places, key_factor=16, hold=0.25, until=0.75)
    assert seen == [64] * 24 + [32] * 8 + [16] * 8 + [8] * 8 + [4] * 17


def test_hold_and_until_at_once_are_one_step_down():
    places = (0.0, 0.49, 0.5, 1.0)
    seen = run(image(num_heavy_tokens_kv=4), places, key_factor=8, hold=0.5, until=0.5)
    assert seen == [32, 32, 4, 4]


def test_alternating_steps_have_the_first_counts_and_the_modules_own_in_turn():
    options = {"key_factor": 16, "hold": 0.25, "until": 0.75, "alternate": True}
    seen = run(image(num_heavy_tokens_kv=4), [step / 32 for step in range(33)], **options)
    assert seen[:9] == [64] * 9 and seen[24:] == [4] * 9
    assert set(seen[9:24:2]) ^ set(seen[10:24:2]) == {4, 64}


def test_an_evaluation_takes_no_training_steps_turn():
    module = image(num_heavy_tokens_kv=4)
    schedule = RoutingSchedule(module, key_factor=16, hold=0, until=1, alternate=True)
    seen = []
    for step in range(1, 7):
        schedule.step(step / 8)
        seen.append(keys(module))
        schedule.step(1.0)
        assert keys(module) == 4
    assert set(seen[::2]) ^ set(seen[1::2]) == {4, 64}


def test_a_turn_that_is_given_is_taken():
    module, seen = image(num_heavy_tokens_kv=4), []
    schedule = RoutingSchedule(module, key_factor=16, hold=0, until=1, alternate=True)
    for turn in (4, 4, 5, None, None):
        schedule.step(0.5, turn)
        seen.append(keys(module))
    assert seen == [4, 4, 64, 4, 64]


def test_softmax_alternates_and_sum_narrows_late_by_default():
    modules = nn.ModuleList(
        image(num_heavy_tokens_kv=4, fusion=fusion) for fusion in ("softmax", "sum")
    )
    modules.append(ConditionalRoutedAttention(16, light_window_size=4, **COUNTS))
    for given in ({}, {"alternate": False}):
        schedule, seen = RoutingSchedule(modules, key_factor=4, **given), []
        for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
            schedule.step(progress)
            seen.append([keys(module) // 4 for module in modules])
        softmax, *others = zip(*seen)
        assert softmax == ((4, 4, 4, 4, 2, 2, 2, 1) if given else (4, 4, 1, 4, 1, 4, 1, 1))
        assert others == [(4, 4, 4, 4, 4, 4, 2, 1)] * 2


def test_every_attention_of_a_model_keeps_its_own_count():
    layers = [
        image(num_heavy_tokens_q=0.25, num_heavy_tokens_kv=0.125),
        ConditionalRoutedAttention(16, light_window_size=4, **COUNTS),
        ConditionalRoutedAutoregressiveAttention(
            16, light_window_size=8, heavy_window_size=16, **COUNTS
        ),
    ]
    cross = ConditionalRoutedCrossAttention(16, num_tokens_q=0.5, num_tokens_kv=7)
    model = nn.Sequential(*layers, nn.Linear(16, 16), cross)

    def counts():
        own = [(m.num_heavy_tokens_q, m.num_heavy_tokens_kv) for m in layers]
        own.append((cross.num_tokens_q, cross.num_tokens_kv))
        return [(m.queries_now(q), m.keys_now(k)) for m, (q, k) in zip((*layers, cross), own)]

    own = [(0.25, 0.125), (3, 4), (3, 4), (0.5, 7)]
    schedule = RoutingSchedule(model, key_factor=4, query_factor=8)
    assert counts() == own
    schedule.step(0)
    assert counts() == [(1.0, 0.5), (24, 16), (24, 16), (1.0, 28)]
    model.eval()
    assert counts() == own
    model.train()
    schedule.step(1)
    assert counts() == own


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_the_forward_uses_as_many_keys_and_more_than_all_are_all(fusion):
    torch.manual_seed(0)
    module, x = image(num_heavy_tokens_kv=2, fusion=fusion), torch.randn(2, 16, 6, 7)
    router, routed = module.attend.kv_router, []
    router.register_forward_hook(lambda m, args, found: routed.append(found.indices.shape[-1]))
    schedule = RoutingSchedule(module, key_factor=32, hold=0.0, until=1.0, alternate=False)
    for progress in (0.0, 0.2, 1.0):
        schedule.step(progress)
        module(x).sum().backward()
    assert routed == [42, 32, 2]
    assert router.routing_token.grad.abs().max() > 0


@pytest.mark.parametrize("count", [4, 1 / 16])
@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_a_second_schedule_on_a_model_starts_from_its_own_counts(count, fusion):
    module = image(num_heavy_tokens_kv=count, fusion=fusion)
    RoutingSchedule(module, key_factor=8).step(0.0)  # a notebook's cell, interrupted
    again, seen = RoutingSchedule(module, key_factor=8), []  # and run again
    for progress in (0.0, 0.7, 1.0):
        again.step(progress)
        seen.append(keys(module))
    assert seen == [8 * count, count, count]


def test_copies_taken_while_it_runs_have_the_models_own_counts():
    module, x = image(num_heavy_tokens_kv=4), torch.randn(1, 16, 6, 7)
    schedule = RoutingSchedule(module, key_factor=4)
    schedule.step(0.0)
    average = torch.optim.swa_utils.AveragedModel(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [average.module, copy.deepcopy(module), torch.load(file, weights_only=False)]
    for progress in (0.5, 1.0):
        schedule.step(progress)
        average.update_parameters(module)
    for other in copies:
        assert keys(other.train()) == 4 and other.num_heavy_tokens_kv == 4
        torch.testing.assert_close(other.eval()(x), module.eval()(x))


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_an_evaluation_after_an_interruption_has_the_models_own_counts(fusion):
    torch.manual_seed(0)
    module, x = image(num_heavy_tokens_kv=4, fusion=fusion).eval(), torch.randn(1, 16, 6, 7)
    with torch.no_grad():
        expected = module(x)
        RoutingSchedule(module.train(), key_factor=8).step(0.0)  # and no step after it
        assert not torch.equal(module(x), expected)
        torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, call",
    [
        ("key_factor", lambda m: RoutingSchedule(m, key_factor=3)),
        ("query_factor", lambda m: RoutingSchedule(m, query_factor=0)),
        ("key_factor", lambda m: RoutingSchedule(m, key_factor=2.0)),
        ("hold, until: expected both or none", lambda m: RoutingSchedule(m, hold=0.7)),
        ("hold, until: expected 0", lambda m: RoutingSchedule(m, hold=0.7, until=0.6)),
        ("alternate", lambda m: RoutingSchedule(m, alternate=1)),
        ("hold, until: expected 0", lambda m: RoutingSchedule(m, hold=0.0, until=float("nan"))),
        ("model", lambda m: RoutingSchedule(nn.Linear(2, 2))),
        ("progress", lambda m: RoutingSchedule(m).step(1.2)),
        ("progress", lambda m: RoutingSchedule(m).step(float("nan"))),
        ("progress", lambda m: RoutingSchedule(m).step(None)),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        call(image(num_heavy_tokens_kv=4))
