"""Distillation of routers."""

import io

import pytest
import torch
from torch.utils.data import DataLoader

from colt5_vision import distill_routers, routed_layers
from colt5_vision.swap import probes, teacher
from tests.support.swap_cases import CASES, build, picture, trace
from tests.support.swap_cases import routed_case as routed


def toy(**how):
    """A model of sharp attention: a few queries do not tell how much the keys matter, the guess can
    be bettered."""
    model = routed(trained=False, **{"window_size": 1, "share": 0.2} | how)
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        weight = block.attn.qkv.weight.data
        weight[:128] *= 3
        weight[128:] = torch.randn(64, 1, generator=generator) * torch.randn(
            1, 64, generator=generator
        )
    return model


def pictures(count=3):
    return [picture(batch=8, seed=seed) for seed in range(count)]


def routers(model):
    return [p for layer in routed_layers(model).values() for p in layer.attention.parameters()]


def state(model):
    """Of the model and its routers."""
    found = {k: v.clone() for k, v in model.state_dict().items()}
    return found | {f"router.{i}": p.clone() for i, p in enumerate(routers(model))}


def same(model, before):
    return all(torch.equal(value, before[key]) for key, value in state(model).items())


@pytest.mark.parametrize(("training", "router"), [(False, "learned"), (True, "learned_grouped")])
def test_distillation_betters_what_it_starts_from_and_changes_only_routers(
    training, router, monkeypatch
):
    monkeypatch.setattr(probes, "_PROBES", 2)
    model = toy(router=router).train(training)
    model.head.weight.requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes, before, random = (
        [m.training for m in model.modules()],
        state(model),
        torch.random.get_rng_state(),
    )
    untrained = [p.clone() for p in routers(model)]
    history = distill_routers(model, pictures(), steps=30, num_queries=16, lr=3e-2, progress=False)
    assert len(history) == 30 and all(
        set(step) == {"blocks.0.attn", "blocks.1.attn"} for step in history
    )
    assert all(ratio == pytest.approx(1) for ratio in history[0].values())
    last = [sum(step.values()) / 2 for step in history[-5:]]
    assert max(last) < 0.8
    after = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(not torch.equal(x, y) for x, y in zip(routers(model), untrained))
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(layer.teacher is None for layer in routed_layers(model).values())


@pytest.mark.parametrize("name", ["beit", "sam", "dinov2-registers"])
def test_distillation_runs_with_relative_positions_and_prefix_tokens(name):
    model = routed(CASES[name], trained=False, dtype=torch.float32)
    history = distill_routers(
        model, [picture(CASES[name])], steps=8, lr=1e-2, num_queries=35, progress=False
    )
    assert all(ratio == pytest.approx(1) for ratio in history[0].values())
    assert sum(history[-1].values()) < sum(history[0].values())


class Interrupted:
    """Batches, and a KeyboardInterrupt in place of the n-th."""

    def __init__(self, batches, after):
        self.batches, self.left = batches, after

    def __iter__(self):
        for batch in self.batches:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("after", [1, 5, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(after, tmp_path):
    call = {"steps": 9, "num_queries": 8, "save_every": 3, "progress": False, "seed": 4}
    straight, resumed = toy(), toy()
    expected = distill_routers(straight, pictures(4), **call)
    call["checkpoint"] = tmp_path / "run" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        distill_routers(resumed, Interrupted(pictures(4), after), **call)
    assert all(
        p.grad is None and p.requires_grad for p in [*resumed.parameters(), *routers(resumed)]
    )
    assert len(torch.load(call["checkpoint"], weights_only=True)["history"]) == after
    fresh = toy()  # another process
    torch.manual_seed(77)
    assert distill_routers(fresh, pictures(4), **call) == expected
    assert all(torch.equal(a, b) for a, b in zip(routers(fresh), routers(straight)))
    assert distill_routers(toy(), [], **call) == expected  # done: no image is needed
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["state.pt"]


@pytest.mark.parametrize("loader", [False, True])
def test_an_interruption_within_a_forward_is_resumed_bit_for_bit(loader, tmp_path, monkeypatch):
    images = torch.cat(pictures(4))
    batches = DataLoader(images, batch_size=8) if loader else list(images.split(8))
    call = {"steps": 6, "num_queries": 8, "progress": False}
    straight = toy()
    expected = distill_routers(straight, batches, **call)
    call["checkpoint"] = tmp_path / "state.pt"
    calls, cost = [], teacher._ask_map

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second layer of the third step
            raise KeyboardInterrupt
        return cost(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher, "_ask_map", interrupted)
        distill_routers(toy(), batches, **call)
    fresh = toy()
    assert distill_routers(fresh, batches, **call) == expected
    assert all(torch.equal(a, b) for a, b in zip(routers(fresh), routers(straight)))


def test_modes_of_submodules_come_back():
    model = toy().eval()
    model.blocks[0].train()
    modes = [m.training for m in model.modules()]
    distill_routers(model, pictures(1), steps=1, num_queries=8, progress=False)
    assert [m.training for m in model.modules()] == modes


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_checkpoints_that_are_no_good(tmp_path):
    file = tmp_path / "state.pt"
    call = {"num_queries": 8, "progress": False, "checkpoint": file}
    distill_routers(toy(), pictures(1), steps=2, **call)
    whole = file.read_bytes()
    for content, how, steps, match in (
        (whole, {}, 3, "steps: expected that of the checkpoint .*, 2, got 3"),
        (whole, {"layers": [0]}, 2, "checkpoint: .* does not belong to these routers"),
        (whole[: len(whole) // 2], {}, 2, "checkpoint: .* is damaged"),
        (b"", {}, 2, "checkpoint: .* is damaged"),
        (b"no pickle at all", {}, 2, "checkpoint: .* is damaged"),
        (pickled([1, 2]), {}, 2, "checkpoint: .* is damaged"),
    ):
        file.write_bytes(content)
        model = toy(**how)
        before, traced = state(model), trace(model)
        with pytest.raises(ValueError, match=match):
            distill_routers(model, pictures(1), steps=steps, **call)
        assert same(model, before)
        assert trace(model) == traced
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"inputs": []}, ValueError, "inputs: expected an iterable"),
        ({"inputs": iter([])}, ValueError, "inputs"),
        ({"inputs": torch.zeros(1, 3, 80, 112)}, TypeError, "inputs: expected an iterable.*Tensor"),
        ({"inputs": 3}, TypeError, "inputs: expected an iterable of batches, got one int"),
        ({"inputs": [(picture(), torch.zeros(2))]}, TypeError, "inputs: .*tuple; of .images, la"),
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"num_queries": 0}, ValueError, "num_queries"),
        ({"save_every": 0}, ValueError, "save_every"),
        ({"steps": 2.5}, TypeError, "steps"),
        ({"checkpoint": 5}, TypeError, "checkpoint: expected a path, got int"),
    ],
)
def test_bad_arguments_of_distillation(how, error, match):
    model = toy()
    before = trace(model)
    call = {"inputs": pictures(1), "steps": 2, "progress": False} | how
    with pytest.raises(error, match=match):
        distill_routers(model, call.pop("inputs"), **call)
    assert trace(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_iterable_that_does_not_start_over_is_an_error():
    with pytest.raises(ValueError, match="starts over"):
        distill_routers(toy(), iter(pictures(2)), steps=3, progress=False)


@pytest.mark.parametrize("router", [None, "sampled"])
def test_no_learned_router_is_an_error(router):
    model = build(CASES["vit"]) if router is None else routed(router=router)
    with pytest.raises(ValueError, match="has no learned router"):
        distill_routers(model, pictures(1), progress=False)


@pytest.mark.parametrize("progress", [False, True])
def test_progress(progress, capfd):
    distill_routers(toy(), pictures(1), steps=2, progress=progress)
    out, error = capfd.readouterr()
    assert out == "" and ("distil routers" in error) == progress and bool(error) == progress


def test_routers_of_half_precision_models_are_single_precision():
    model = toy().bfloat16()
    history = distill_routers(
        model, [x.bfloat16() for x in pictures(1)], steps=6, num_queries=8, progress=False
    )
    assert all(torch.tensor(list(step.values())).isfinite().all() for step in history)
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in routers(model))


def test_an_error_that_is_not_finite_reaches_no_router():
    model = toy()
    before, bad = state(model), pictures(1)[0].clone()
    bad[0] = float("nan")
    with pytest.raises(
        ValueError, match="inputs: batch 0 gives an error that is not finite in blocks.0.attn"
    ):
        distill_routers(model, [bad], steps=2, num_queries=8, progress=False)
    assert same(model, before)


def test_gradients_of_the_backbone_are_left_alone():
    model = toy()
    grad = model.blocks[0].mlp.fc1.weight.grad = torch.ones_like(model.blocks[0].mlp.fc1.weight)
    distill_routers(model, pictures(1), steps=1, num_queries=8, progress=False)
    assert model.blocks[0].mlp.fc1.weight.grad is grad


@pytest.mark.parametrize("other", [{"lr": 1.0}, {"seed": 5}, {"num_queries": 9}])
def test_a_checkpoint_of_other_settings_is_refused(other, tmp_path):
    call = {"steps": 2, "num_queries": 8, "progress": False, "checkpoint": tmp_path / "state.pt"}
    distill_routers(toy(), pictures(1), **call)
    with pytest.raises(ValueError, match=f"{next(iter(other))}: expected that of the checkpoint"):
        distill_routers(toy(), pictures(1), **call | other)
    with pytest.raises(ValueError, match="blocks.0.attn: expected that of the checkpoint"):
        distill_routers(toy(share=0.5), pictures(1), **call)


def test_a_checkpoint_of_the_other_kind_of_router_is_told(tmp_path):
    call = {"steps": 2, "num_queries": 8, "progress": False, "checkpoint": tmp_path / "state.pt"}
    distill_routers(toy(router="learned_grouped"), pictures(1), **call)
    with pytest.raises(ValueError, match=r'^blocks\.0\.attn: .*"learned_grouped".*"learned"'):
        distill_routers(toy(router="learned"), pictures(1), **call)


def test_why_no_layer_was_routed_is_told():
    """Relative positions: no tile can have them."""
    model = routed(CASES["beit"], router="learned_grouped", trained=False, dtype=torch.float32)
    with pytest.raises(ValueError, match="exact so far: a bias of pairs, which router='learned_gr"):
        distill_routers(model, [picture(CASES["beit"])], steps=2, progress=False)


def test_within_inference_mode_it_says_so():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no torch.inference_mode"):
        distill_routers(toy(), pictures(1), steps=1, progress=False)
