"""Files of routed models."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from colt5_vision.models import (
    load_routed_attention,
    route_attention,
    routed_layers,
    save_routed_attention,
    unroute_attention,
)
from safetensors.torch import load_file, save_file
from swap_cases import CASES, build, picture, spread, trace
from swap_cases import routed_case as routed

store = sys.modules["colt5_vision.models.store"]
CASE, ARGS = CASES["vit"], {"depth": 2, "embed_dim": 64, "num_heads": 2}


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
