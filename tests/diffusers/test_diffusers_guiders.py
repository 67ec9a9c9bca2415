"""diffusers' guiders and FasterCache on a routed model: they hook layers in the middle of a run.

Flux is not among them: those of diffusers 0.42 that hook attention fail on the stock model.
"""

import pytest
import torch
from diffusers import (
    AutoGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import (
    FasterCacheConfig,
    LayerSkipConfig,
    SmoothedEnergyGuidanceConfig,
    apply_faster_cache,
)

from colt5_vision import route_attention, unroute_attention
from colt5_vision.swap.reroute import NOT_CALLED
from tests.support.diffusers_cases import CASES, build, close, config, run

BLOCKS = {
    "pixart": "transformer_blocks",
    "sd15": "mid_block.attentions.0.transformer_blocks",
}


class Smoothed(SmoothedEnergyGuidance):
    """In diffusers 0.42 it does not count what it prepares, and so smooths nothing."""

    def prepare_models(self, denoiser):
        self._count_prepared += 1
        super().prepare_models(denoiser)


def skipping(blocks, **how):
    when = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return SkipLayerGuidance(**when, skip_layer_config=LayerSkipConfig([0], blocks, **how))


def perturbed(blocks):
    when = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    what = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    layers = LayerSkipConfig([0], blocks, **what)
    return PerturbedAttentionGuidance(**when, perturbed_guidance_config=layers)


def worse(blocks):
    layers = LayerSkipConfig([0], blocks, skip_ff=False, dropout=0.3)
    return AutoGuidance(auto_guidance_config=layers)


GUIDERS = {
    "perturbed attention": perturbed,
    "skipped blocks": skipping,
    "skipped attention": lambda blocks: skipping(blocks, skip_ff=False),
    "smoothed energy": lambda blocks: Smoothed(
        seg_guidance_config=SmoothedEnergyGuidanceConfig([0], fqn=blocks)
    ),
    "worse model": worse,
}


def guided(model, case, guider, hooked=lambda: None):
    """The prediction of one step; ``hooked`` is called when the guider's hooks are on the model."""
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    found, names = {}, guider._input_predictions
    for i, name in enumerate(names):
        guider.prepare_models(model)
        if i == len(names) - 1:
            hooked()
        torch.manual_seed(0)
        found[name] = run(model, case, seed=i % 2)
        guider.cleanup_models(model)
    return guider.forward(**found).pred, found


@pytest.mark.parametrize("first", ["routing", "hooks"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("guider", GUIDERS)
def test_a_guider_does_what_it_does_to_the_stock_model(guider, name, first):
    case, model = CASES[name], build(CASES[name])
    make = lambda: GUIDERS[guider](BLOCKS[name])
    expected, parts = guided(model, case, make())
    plain = run(model, case, seed=1 if guider == "worse model" else 0)
    assert (list(parts.values())[-1] - plain).abs().max() > 1e-3  # it changes something

    reports = []
    if first == "routing":
        reports.append(route_attention(model, config(1.0)))
        found, _ = guided(model, case, make())
    else:
        hooked = lambda: reports.append(route_attention(model, config(1.0)))
        found, _ = guided(model, case, make(), hooked)
    close(found, expected, 1e-7)
    assert reports[0].calls.routed
    unroute_attention(model)
    assert torch.equal(guided(model, case, make())[0], expected)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("guider", ["perturbed attention", "skipped attention"])
def test_a_layer_perturbed_before_it_ever_routed_is_not_said_to_attend(guider, name):
    model, guider = build(CASES[name]), GUIDERS[guider](BLOCKS[name])
    report = route_attention(model, config())
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    for _ in guider._input_predictions[:-1]:
        guider.prepare_models(model)
        guider.cleanup_models(model)
    guider.prepare_models(model)
    with pytest.warns(RuntimeWarning, match="no call of it has been so far: no call of") as told:
        run(model, CASES[name])
    assert not any("full attention" in str(one.message) for one in told)
    assert len(told) == 1 and report.calls.exact.keys() == {NOT_CALLED} and report.calls.routed
    guider.cleanup_models(model)
    report.reset_calls()
    run(model, CASES[name])
    assert report.calls.routed and not report.calls.exact


@pytest.mark.parametrize("first", ["cache", "routing"])
def test_faster_cache_gives_what_it_gives_the_stock_model(first):
    case = CASES["pixart"]
    cache = FasterCacheConfig(
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        spatial_attention_timestep_skip_range=(-1, 2000),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: 500,
        tensor_format="BCHW",
    )

    def steps(model):
        return [run(model, case, seed=step) for step in range(4)]

    stock, model = build(case), build(case)
    apply_faster_cache(stock, cache)
    expected = steps(stock)
    if first == "cache":
        apply_faster_cache(model, cache)
    report = route_attention(model, config(1.0))
    if first == "routing":
        apply_faster_cache(model, cache)
    close(steps(model), expected, 1e-6)
    assert 0 < report.calls.routed < 4 * len(case.tokens)
