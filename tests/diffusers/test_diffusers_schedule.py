"""Schedules by resolution and by timestep: where they say so, attention is bit for bit full."""

import json

import pytest
import torch

from colt5_vision import (
    RoutedAttentionConfig,
    route_attention,
    routed_layers,
    unroute_attention,
)
from colt5_vision.swap.config import ScheduleRule
from tests.support.diffusers_cases import (
    CASES,
    arguments,
    build,
    config,
    every_family,
    run,
    some,
)
from tests.support.diffusers_pipes import generate, pipeline


def enable(model, share=0.25, size=None, **how):
    route_attention(model, config(share, **how), sample_size=size)
    return model


def at(model, case, time, size=None):
    """The output at a timestep, in the units of the model: Flux's are a thousandth."""
    given = arguments(case, size)
    like = given["timestep"]
    time = (
        torch.full_like(like, time / 1000)
        if like.is_floating_point()
        else torch.full_like(like, time)
    )
    with torch.no_grad():
        return model(**given | {"timestep": time}, return_dict=False)[0]


@every_family
def test_the_first_steps_are_bit_for_bit_full(case):
    unit = 1000 if arguments(case)["timestep"].is_floating_point() else 1
    model, original = (
        enable(build(case), schedule=[{"min_timestep": 800 / unit, "full": True}]),
        build(case),
    )
    always = enable(build(case))
    for time, full in ((999, True), (800, True), (799, False), (0, False), (900, True)):
        assert torch.equal(at(model, case, time), at(original if full else always, case, time))
        assert not torch.equal(at(original, case, time), at(always, case, time))
    assert set(routed_layers(model)) == set(case.tokens)


@some("sd15", "dit", "flux")
def test_the_last_steps_are_bit_for_bit_full(case):
    unit = 1000 if arguments(case)["timestep"].is_floating_point() else 1
    model, original = (
        enable(build(case), schedule=[{"max_timestep": 200 / unit, "full": True}]),
        build(case),
    )
    for time in (200, 0):
        assert torch.equal(at(model, case, time), at(original, case, time))
    assert not torch.equal(at(model, case, 201), at(original, case, 201))


def test_resolutions_are_scheduled_each_on_its_own():
    case, original = CASES["sd15"], build(CASES["sd15"])
    for rule, routed in (({"max_tokens": 64}, 256), ({"min_tokens": 65}, 64)):
        model = build(case)
        report = route_attention(model, config(schedule=[rule | {"full": True}]))
        names = [name for name, tokens in case.tokens.items() if tokens == routed]
        assert set(report) == set(names)
        why = {
            name: f"{n} tokens: the schedule says so"
            for name, n in case.tokens.items()
            if n != routed
        }
        assert report.exact == case.exact | why
        assert torch.equal(run(model, case), run(enable(build(case), layers=names), case))
        assert not torch.equal(run(model, case), run(original, case))
        unroute_attention(model)
        assert torch.equal(run(model, case), run(original, case))


@some("sd15", "sd3", "flux")
def test_settings_are_changed_and_the_first_rule_that_holds_counts(case):
    rules = [
        {"min_tokens": 100, "max_tokens": 200, "window_size": 5},
        ScheduleRule(min_tokens=50, num_heavy_tokens_kv=0.5),
        {"max_tokens": 10**6, "full": True},
    ]
    model, seen = build(case), {}
    route_attention(model, config(schedule=rules), sample_size=case.size)
    for name, processor in routed_layers(model).items():
        processor.attention.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.update({name: kwargs}), with_kwargs=True
        )
    run(model, case)
    for name, tokens in case.tokens.items():
        window, share = ((5, 5), None) if 100 <= tokens <= 200 else (None, 0.5)
        assert seen[name]["window_size"] == window and seen[name]["num_heavy_tokens_kv"] == share


@some("sd15", "sd21", "pixart")
def test_changed_settings_are_those_of_a_model_that_has_them(case):
    changed = {"window_size": 2, "num_heavy_tokens_kv": 0.5, "num_heavy_tokens_q": 0.5}
    model = enable(build(case), schedule=[{"min_timestep": 500} | changed])
    other = enable(build(case), window_size=2, share=0.5, num_heavy_tokens_q=0.5)
    assert torch.equal(at(model, case, 500), at(other, case, 500))
    assert torch.equal(at(model, case, 499), at(enable(build(case)), case, 499))


@some("sd15", "dit", "sd3", "flux")
def test_a_batch_of_different_timesteps_is_an_error(case):
    scheduled, plain = (
        enable(build(case), schedule=[{"min_timestep": 0.8, "full": True}]),
        enable(build(case)),
    )
    times = torch.tensor([100, 200]) / (
        1000 if arguments(case)["timestep"].is_floating_point() else 1
    )
    given = arguments(case) | {"timestep": times}
    with pytest.raises(
        ValueError, match="timestep: the schedule needs one for the whole batch, got"
    ):
        scheduled(**given)
    with torch.no_grad():
        assert plain(**given, return_dict=False)[0].isfinite().all()
        scheduled(**given | {"timestep": times[:1].expand(2)})


@pytest.mark.parametrize("time", [900, 900.0, torch.tensor(900), torch.tensor([900, 900])])
def test_timesteps_come_as_numbers_and_tensors(time):
    case = CASES["sd15"]
    model, original = (
        enable(build(case), schedule=[{"min_timestep": 800, "full": True}]),
        build(case),
    )
    with torch.no_grad():
        outs = [
            m(**arguments(case) | {"timestep": time}, return_dict=False)[0]
            for m in (model, original)
        ]
    assert torch.equal(*outs)


def test_a_pipeline_is_full_in_its_first_steps_only():
    pipe = pipeline("sd15")
    found = []

    def keep(pipe, step, time, tensors):
        found.append((int(time), tensors["latents"].clone()))
        return tensors

    generate(pipe, callback_on_step_end=keep, num_inference_steps=3)
    route_attention(pipe, config(schedule=[{"min_timestep": 400, "full": True}]))
    generate(pipe, callback_on_step_end=keep, num_inference_steps=3)
    same = [
        torch.equal(before[1], after[1]) for before, after in zip(found[:3], found[3:], strict=True)
    ]
    assert same == [time >= 400 for time, _ in found[3:]] == [True, False, False]


WRONG = {
    "mapping": ({"full": True}, TypeError, "schedule: expected a sequence of rules"),
    "number": ([3], TypeError, "schedule: expected a ScheduleRule or a dict"),
    "unknown": (
        [{"min_token": 3, "full": True}],
        ValueError,
        r"schedule: expected arguments among .*got \['min_token'\]",
    ),
    "nothing": ([{"min_tokens": 3}], ValueError, "got no setting"),
    "both": ([{"full": True, "window_size": 3}], ValueError, "got full=True and other settings"),
    "order": (
        [{"min_tokens": 3, "max_tokens": 2, "full": True}],
        ValueError,
        "min_tokens: expected at most max_tokens",
    ),
    "times": (
        [{"min_timestep": 3, "max_timestep": 2.5, "full": True}],
        ValueError,
        "min_timestep: expected at most",
    ),
    "text": ([{"min_timestep": "3", "full": True}], TypeError, "min_timestep: expected a number"),
    "nan": (
        [{"max_timestep": float("nan"), "full": True}],
        ValueError,
        "max_timestep: expected a number",
    ),
    "negative": ([{"min_tokens": -1, "full": True}], ValueError, "min_tokens"),
    "full": ([{"full": 1}], TypeError, "full: expected a bool"),
    "share": ([{"num_heavy_tokens_kv": 1.5}], ValueError, "num_heavy_tokens_kv"),
    "window": ([{"window_size": 0}], ValueError, "window_size"),
}


@pytest.mark.parametrize(("schedule", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_rules_are_named(schedule, error, match):
    with pytest.raises(error, match=match):
        RoutedAttentionConfig(schedule=schedule)


WRONG_CONFIG = {
    "window": ({"window_size": None}, TypeError, "window_size: expected a value"),
    "keys": ({"num_heavy_tokens_kv": 0}, ValueError, "num_heavy_tokens_kv"),
    "queries": ({"num_heavy_tokens_q": -1}, ValueError, "num_heavy_tokens_q"),
    "router": ({"router": "oracle"}, ValueError, "router: expected one of .* got 'oracle'"),
    "min_tokens": ({"min_tokens": -1}, ValueError, "min_tokens"),
    "min_tokens type": ({"min_tokens": 1.5}, TypeError, "min_tokens"),
    "one name": ({"layers": "attn1"}, TypeError, "layers: .*'attn1'"),
    "one index": ({"layers": 0}, TypeError, "layers: expected a list of names"),
    "bool": ({"layers": [True]}, TypeError, "layers: expected a list of names"),
    "no layers": ({"layers": []}, ValueError, "layers: expected at least one"),
}


@pytest.mark.parametrize(("how", "error", "match"), WRONG_CONFIG.values(), ids=WRONG_CONFIG)
def test_wrong_settings_are_named(how, error, match):
    with pytest.raises(error, match=match):
        RoutedAttentionConfig(**how)


def test_a_configuration_survives_json():
    rules = [{"min_tokens": 9, "window_size": (3, 4)}, {"max_timestep": 0.5, "full": True}]
    settings = RoutedAttentionConfig(
        window_size=5, layers=["up*", 1], num_heavy_tokens_q=7, schedule=rules
    )
    assert RoutedAttentionConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match="config: expected arguments among"):
        RoutedAttentionConfig.from_dict({"windows": 3})
    with pytest.raises(ValueError, match="config: expected all of .*got none for .*layers"):
        RoutedAttentionConfig.from_dict({"window_size": 3})
    assert RoutedAttentionConfig.from_dict({"window_size": 3}, whole=False).window_size == (3, 3)
