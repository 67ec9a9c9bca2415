"""Files of routed models, and distillation of their routers."""

import io
import json
import sys

import numpy as np
import pytest
import timm
import torch
from colt5_vision.models import (
    distill_routers,
    load_routed_attention,
    route_attention,
    routed_layers,
    save_routed_attention,
    unroute_attention,
)
from safetensors.torch import load_file, save_file
from swap_cases import CASES, build, image, spread, trace
from torch.utils.data import DataLoader

store, distill = (sys.modules[f"colt5_vision.models.{name}"] for name in ("store", "distill"))
CASE, ARGS = CASES["vit"], {"depth": 2, "embed_dim": 64, "num_heads": 2}


def routed(case=CASE, share=0.25, dtype=torch.float32, trained=True, **how):
    how = {"window_size": 3, "num_heavy_tokens_kv": share, "router": "learned"} | how
    model = route_attention(build(case, dtype), **how)
    if how["router"] == "learned" and trained:
        for part in routed_layers(model).values():
            torch.nn.init.normal_(part.correction[2].weight, std=3)
    return model


def picture(case=CASE, **how):
    return image(case, dtype=torch.float32, **how)


def saved(path, model=None):
    save_routed_attention(model or routed(), path, model_args=ARGS)
    return path


def same_outputs(a, b, case=CASE):
    with torch.no_grad():
        return torch.equal(a(picture(case)), b(picture(case)))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit", ARGS),
        ("dinov2-registers", ARGS),
        ("siglip", ARGS),
        ("eva02", ARGS),
        ("beit", ARGS),
        ("sam", CASES["sam"].args),
    ],
)
def test_round_trip(name, args, tmp_path):
    model = routed(case := CASES[name])
    save_routed_attention(model, tmp_path / "new" / "a.safetensors", model_args=args)
    loaded = load_routed_attention(tmp_path / "new" / "a.safetensors")
    assert type(loaded) is type(model) and not loaded.training
    assert repr(loaded) == repr(model)
    assert list(routed_layers(loaded)) == list(routed_layers(model))
    assert same_outputs(loaded, model, case)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "how",
    [
        {"layers": [-1], "num_heavy_tokens_q": 0.5},
        {"share": 7, "window_size": (2, 4), "router": "mean_query"},
        {"num_heavy_tokens_q": 6, "router": "grid"},
    ],
)
def test_round_trip_of_settings(how, tmp_path):
    model = routed(**how)
    loaded = load_routed_attention(str(saved(tmp_path / "a.safetensors", model)))
    found, expected = ({n: repr(p) for n, p in routed_layers(m).items()} for m in (loaded, model))
    assert found == expected
    assert same_outputs(loaded, model)
    assert set(load_file(tmp_path / "a.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_the_model_remembers_its_arguments(name, tmp_path):
    model = timm.create_model(name, num_classes=7, in_chans=1, img_size=64, dynamic_img_size=True)
    route_attention(spread(model).eval(), window_size=2, num_heavy_tokens_kv=0.5)
    save_routed_attention(model, tmp_path / "a.safetensors")
    loaded, x = load_routed_attention(tmp_path / "a.safetensors"), torch.randn(1, 1, 48, 96)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("before", ["original", "routed alike", "routed otherwise"])
def test_loads_into_a_model_in_place(before, tmp_path):
    model, path = routed(layers=[1]), saved(tmp_path / "a.safetensors", routed(layers=[1]))
    other = spread(build(CASE, torch.float32), seed=5)
    if before != "original":
        route_attention(other, window_size=2 if "other" in before else 3, num_heavy_tokens_kv=9, router="random")
    assert load_routed_attention(path, other) is other
    assert repr(other) == repr(model)
    assert same_outputs(other, model)
    unroute_attention(other)
    assert other.patch_embed._forward_hooks == {}
    assert same_outputs(other, unroute_attention(model))


def changed(path, **about):
    header = {store._KEY: json.dumps(about)} if about else {"format": "pt"}
    save_file({"x": torch.zeros(2)}, path, metadata=header)


def test_files_that_are_no_good(tmp_path):
    path, model = saved(tmp_path / "a.safetensors"), build(CASE, torch.float32)
    whole = path.read_bytes()
    before = trace(model)
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (short := tmp_path / "short.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="path: .*short.safetensors is missing or damaged"):
            load_routed_attention(short, model)
    with pytest.raises(ValueError, match="path: .*none is missing or damaged"):
        load_routed_attention(tmp_path / "none", model)
    (noise := tmp_path / "noise").write_bytes(b"not ours" * 100)
    with pytest.raises(ValueError, match="missing or damaged"):
        load_routed_attention(noise, model)
    changed(other := tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no file of save_routed_attention"):
        load_routed_attention(other, model)
    changed(other, format=2, model_name=CASE.name, model_args={}, layers={})
    with pytest.raises(ValueError, match="expected format 1, got 2"):
        load_routed_attention(other, model)
    layers = {"blocks.0.attn": {"window_size": 3, "num_heavy_tokens_kv": 0.25, "num_heavy_tokens_q": None}}
    layers["blocks.0.attn"] |= {"window_size": [3, 3], "router": "grid"}
    changed(other, format=1, model_name=CASE.name, model_args=ARGS, layers=layers)
    with pytest.raises(ValueError, match="path: .* tensors or settings do not fit"):
        load_routed_attention(other, model)
    changed(other, format=1, model_name=CASE.name, model_args={"depth": 2, "nonsense": 1}, layers=layers)
    with pytest.raises(ValueError, match="path: cannot make 'vit_tiny_patch16_224'.*nonsense"):
        load_routed_attention(other, model)
    assert trace(model) == before


@pytest.mark.parametrize("first", [False, True])
def test_a_file_of_another_model_leaves_this_one_untouched(first, tmp_path):
    path = saved(tmp_path / "a.safetensors")
    others = [build(CASE, torch.float32, num_classes=6), build(CASE, torch.float32, depth=3)]
    others += [build(CASES["eva02"], torch.float32)]
    for model in others:
        if first:
            route_attention(model, window_size=2, num_heavy_tokens_kv=3)
        before = trace(model)
        with pytest.raises(ValueError, match="model: .* tensors or settings do not fit"):
            load_routed_attention(path, model)
        assert trace(model) == before


def test_arguments_that_do_not_make_the_model_leave_the_old_file(tmp_path):
    path, model = saved(tmp_path / "a.safetensors"), routed()
    whole, before = path.read_bytes(), trace(model)
    with pytest.raises(ValueError, match="model_args: .* tensors or settings do not fit"):
        save_routed_attention(model, path)
    with pytest.raises(ValueError, match="cannot make"):
        save_routed_attention(model, path, model_args=ARGS | {"nonsense": 1})
    for name in ("resnet0", ""):
        model.pretrained_cfg = {}
        with pytest.raises(ValueError, match="model_name: expected a name timm knows"):
            save_routed_attention(model, path, model_name=name, model_args=ARGS)
    save_routed_attention(model, tmp_path / "b.safetensors", model_name=CASE.name, model_args=ARGS)
    with pytest.raises(ValueError, match="model: nothing is routed"):
        save_routed_attention(build(CASE), path)
    assert path.read_bytes() == whole
    before.pop(("", "pretrained_cfg", "architecture"), None)
    assert all(trace(model)[key] == value for key, value in before.items() if key[1] != "pretrained_cfg")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.safetensors")
    whole, model = path.read_bytes(), routed(layers=[0])

    def interrupted(weights, part, metadata):
        save_file(weights, part, metadata=metadata)
        part.write_bytes(part.read_bytes()[:99])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "save_file", interrupted)
        saved(path, model)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    saved(path, model)
    assert list(routed_layers(load_routed_attention(path))) == ["blocks.0.attn"]


def toy(**how):
    """A model whose values, not its keys, say which tokens matter: the mean query's guess can be bettered."""
    model = routed(trained=False, **{"window_size": 1, "share": 0.2} | how)
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        weight = block.attn.qkv.weight.data
        weight[:128] *= 0.1
        weight[128:] = torch.randn(64, 1, generator=generator) * torch.randn(1, 64, generator=generator)
    return model


def pictures(count=3):
    return [picture(batch=8, seed=seed) for seed in range(count)]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
def test_distillation_betters_the_mean_query_and_changes_only_routers(training):
    model = toy().train(training)
    model.head.weight.requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes, before, random = [m.training for m in model.modules()], state(model), torch.random.get_rng_state()
    history = distill_routers(model, pictures(), steps=30, num_queries=16, lr=3e-2, progress=False)
    assert len(history) == 30 and all(set(step) == {"blocks.0.attn", "blocks.1.attn"} for step in history)
    assert all(ratio == pytest.approx(1) for ratio in history[0].values())
    last = [sum(step.values()) / 2 for step in history[-5:]]
    assert max(last) < 0.8
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if ".routing." not in key)
    assert all(not torch.equal(after[key], before[key]) for key in before if ".routing." in key)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all("teacher" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["beit", "sam", "dinov2-registers"])
def test_distillation_runs_with_relative_positions_and_prefix_tokens(name):
    model = routed(CASES[name], trained=False, dtype=torch.float32)
    history = distill_routers(model, [picture(CASES[name])], steps=8, lr=1e-2, num_queries=35, progress=False)
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
    assert all(p.grad is None and p.requires_grad for p in resumed.parameters())
    assert len(torch.load(call["checkpoint"], weights_only=True)["history"]) == after
    fresh = toy()  # another process
    torch.manual_seed(77)
    assert distill_routers(fresh, pictures(4), **call) == expected
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), straight.parameters()))
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
    calls, cost = [], distill._Teacher._cost

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the second layer of the third step
            raise KeyboardInterrupt
        return cost(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill._Teacher, "_cost", interrupted)
        distill_routers(toy(), batches, **call)
    fresh = toy()
    assert distill_routers(fresh, batches, **call) == expected
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), straight.parameters()))


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
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert trace(model) == traced
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"images": []}, ValueError, "images: expected an iterable"),
        ({"images": iter([])}, ValueError, "images"),
        ({"steps": 0}, ValueError, "steps"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"num_queries": 0}, ValueError, "num_queries"),
        ({"save_every": 0}, ValueError, "save_every"),
        ({"steps": 2.5}, TypeError, "steps"),
    ],
)
def test_bad_arguments_of_distillation(how, error, match):
    model = toy()
    before = trace(model)
    call = {"images": pictures(1), "steps": 2, "progress": False} | how
    with pytest.raises(error, match=match):
        distill_routers(model, call.pop("images"), **call)
    assert trace(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_iterable_that_does_not_start_over_is_an_error():
    with pytest.raises(ValueError, match="starts over"):
        distill_routers(toy(), iter(pictures(2)), steps=3, progress=False)


@pytest.mark.parametrize("router", [None, "mean_query"])
def test_no_learned_router_is_an_error(router):
    model = build(CASE) if router is None else routed(router=router)
    with pytest.raises(ValueError, match="has no learned router"):
        distill_routers(model, pictures(1), progress=False)


@pytest.mark.parametrize("progress", [False, True])
def test_progress(progress, capfd):
    distill_routers(toy(), pictures(1), steps=2, progress=progress)
    out, error = capfd.readouterr()
    assert out == "" and ("distil routers" in error) == progress and bool(error) == progress


@pytest.mark.parametrize("how", [{"num_heads": 4}, {"act_layer": "relu"}])
def test_settings_that_no_shape_tells_are_compared(how, tmp_path):
    path = tmp_path / "a.safetensors"
    other = route_attention(timm.create_model("test_vit", **how), window_size=2, num_heavy_tokens_kv=0.5)
    with pytest.raises(ValueError, match="model_args: .* do not fit"):
        save_routed_attention(other, path)
    save_routed_attention(other, path, model_args=how)
    assert repr(load_routed_attention(path)) == repr(other)
    plain = timm.create_model("test_vit")
    traced = trace(plain)
    with pytest.raises(ValueError, match="model: .* do not fit"):
        load_routed_attention(path, plain)
    assert trace(plain) == traced


def test_half_precision_comes_back(tmp_path):
    model = route_attention(timm.create_model("test_vit"), window_size=2, num_heavy_tokens_kv=0.5).bfloat16()
    save_routed_attention(model, tmp_path / "a.safetensors")
    assert {p.dtype for p in load_routed_attention(tmp_path / "a.safetensors").parameters()} == {torch.bfloat16}


def test_integers_of_numpy_can_be_saved(tmp_path):
    model = timm.create_model("test_vit")
    route_attention(model, window_size=np.int64(2), num_heavy_tokens_kv=np.int64(4), num_heavy_tokens_q=np.int64(5))
    save_routed_attention(model, tmp_path / "a.safetensors")
    assert repr(load_routed_attention(tmp_path / "a.safetensors")) == repr(model)


def test_a_swap_that_fails_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.safetensors"
    model = timm.create_model("test_vit")
    save_routed_attention(route_attention(model, window_size=2, num_heavy_tokens_kv=0.5), path)
    other = route_attention(timm.create_model("test_vit"), window_size=2, num_heavy_tokens_kv=0.5, layers=[0])
    other.blocks[1].attn.attn_drop.p = 0.1
    traced = trace(other)
    with pytest.raises(ValueError, match="attn_drop"):
        load_routed_attention(path, other)
    assert trace(other) == traced


def test_half_precision_routers_are_trained_in_float32():
    model = toy().bfloat16()
    history = distill_routers(model, [x.bfloat16() for x in pictures(1)], steps=6, num_queries=8, progress=False)
    assert all(torch.tensor(list(step.values())).isfinite().all() for step in history)
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in model.parameters())


def test_an_error_that_is_not_finite_reaches_no_router():
    model = toy()
    before, bad = state(model), pictures(1)[0].clone()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="images: batch 0 gives an error that is not finite in blocks.0.attn"):
        distill_routers(model, [bad], steps=2, num_queries=8, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


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
