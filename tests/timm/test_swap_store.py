"""Routings in files: configuration and routers, free of the wrappers around a model."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from colt5_vision import (
    RoutedAttentionConfig,
    load_routing,
    route_attention,
    routed_layers,
    save_routing,
    unroute_attention,
)
from tests.support.swap_cases import CASES, build, picture, some, trace
from tests.support.swap_cases import routed_case as routed

store = sys.modules["colt5_vision.swap.store"]
CASE = CASES["vit"]


def saved(path, model=None):
    save_routing(routed() if model is None else model, path)
    return path


def weights_of(path):
    return next(path.glob("*.safetensors"))


def settings(model):
    return {n: (repr(layer.attention), layer.config) for n, layer in routed_layers(model).items()}


def same_outputs(a, b, case=CASE):
    with torch.no_grad():
        return torch.equal(a(picture(case)), b(picture(case)))


@some("vit", "dinov2-registers", "siglip", "eva02", "beit", "sam", "sam2", "gemma4")
def test_round_trip(case, tmp_path):
    model, other = routed(case), build(case, torch.float32)
    save_routing(model, tmp_path / "new" / "routing")
    report = load_routing(other, tmp_path / "new" / "routing")
    assert list(report.layer_calls) == list(routed_layers(model))
    assert settings(other) == settings(model)
    assert same_outputs(other, model, case)
    assert len(list((tmp_path / "new" / "routing").iterdir())) == 2


@pytest.mark.parametrize(
    "how",
    [
        {"layers": [-1], "num_heavy_tokens_q": 0.5},
        {"share": 7, "window_size": (2, 4), "router": "sampled"},
        {"share": 7, "window_size": (2, 4), "router": "learned_grouped"},
        {"num_heavy_tokens_q": 6, "router": "grid", "window_size": (1, 2, 4)},
        {"schedule": [{"max_tokens": 3, "full": True}], "layers": ["blocks.0.*"]},
    ],
)
def test_round_trip_of_settings(how, tmp_path):
    model, other = routed(**how), build(CASE, torch.float32)
    load_routing(other, str(saved(tmp_path, model)))
    assert settings(other) == settings(model)
    assert same_outputs(other, model)
    learned = [
        layer for layer in routed_layers(model).values() if list(layer.attention.parameters())
    ]
    kept = sum(len(list(layer.attention.parameters())) for layer in learned)
    assert len(load_file(weights_of(tmp_path))) == kept


@pytest.mark.parametrize("before", ["original", "routed alike", "routed otherwise"])
def test_loads_into_a_model_in_place_of_what_was_routed(before, tmp_path):
    model, path = routed(layers=[1]), saved(tmp_path, routed(layers=[1]))
    other = build(CASE, torch.float32)
    if before != "original":
        size = 2 if "other" in before else 3
        how = {"window_size": size, "num_heavy_tokens_kv": 9, "router": "random", "min_tokens": 0}
        route_attention(other, **how)
    load_routing(other, path)
    assert settings(other) == settings(model)
    assert same_outputs(other, model)
    unroute_attention(other)
    assert other.patch_embed._forward_hooks == {}


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "peft": lambda model: peft(model),
}


def peft(model):
    library = pytest.importorskip("peft")
    config = library.LoraConfig(target_modules="all-linear")
    return library.get_peft_model(model, config)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_free_of_wrappers(wrap, tmp_path):
    bare, wrapped = routed(), wrap(build(CASE, torch.float32))
    saved(tmp_path / "bare", bare)
    load_routing(wrapped, tmp_path / "bare")
    saved(tmp_path / "wrapped", wrapped)
    for first, second in zip(
        sorted((tmp_path / "bare").iterdir()), (sorted((tmp_path / "wrapped").iterdir()))
    ):
        assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    other = build(CASE, torch.float32)
    load_routing(other, tmp_path / "wrapped")
    assert same_outputs(other, bare)


def test_lora_on_all_linears_does_not_meet_the_routers():
    model = routed()
    adapted = [n for n, _ in peft(model).named_modules() if n.endswith("lora_A")]
    assert len(adapted) == 2 * 4 + 1 and not [n for n in adapted if "correction" in n]


def test_files_that_are_no_good(tmp_path):
    path, model = saved(tmp_path / "a"), build(CASE, torch.float32)
    text, data = (path / store._CONFIG).read_text(), weights_of(path).read_bytes()
    about = json.loads(text)
    before = trace(model)

    def refused(match, text=text, data=data):
        (path / store._CONFIG).write_text(text)
        weights_of(path).write_bytes(data)
        with pytest.raises(ValueError, match=match):
            load_routing(model, path)
        assert trace(model) == before

    for cut in (0, 4, len(data) // 2, len(data) - 1):
        refused("is missing, damaged or foreign: expected sha256", data=data[:cut])
    refused("expected sha256", data=data[:-1] + bytes([data[-1] ^ 1]))
    for cut in (0, 9, len(text) - 9):
        refused("is missing, damaged or foreign", text=text[:cut])
    for change, match in (
        ({"format": 1}, "expected format 2 of save_routing"),
        ({"layers": ["blocks.0.attn"]}, "is of another model than VisionTransformer"),
        ({"layers": None}, "expected names of layers and a config"),
        ({"layers": [{}]}, "expected names of layers and a config"),
        ({"layers": ["blocks.0.attn", 1]}, "expected names of layers and a config"),
        ({"by_layer": [1]}, "missing, damaged or foreign"),
        ({"by_layer": {"blocks.9.attn": about["config"]}}, "does not fit .*blocks.9.attn"),
        ({"by_layer": {"blocks.0.attn": {"nonsense": 1}}}, "does not fit .*nonsense"),
        ({"weights": {}}, "foreign: 'file'"),
        ({"config": about["config"] | {"nonsense": 1}}, "does not fit .*nonsense"),
        ({"config": about["config"] | {"schedule": [{"full": True}]}}, "got none for .*max_tokens"),
        ({"config": about["config"] | {"router": "sampled"}}, "8 tensors in .* do not fit"),
        ({"config": about["config"] | {"window_size": 0}}, "does not fit .*window_size"),
    ):
        refused(match, text=json.dumps(about | change))

    # a part that is lost is never a default
    for name in about:
        lost = {key: value for key, value in about.items() if key != name}
        refused(f"foreign: .*{'save_routing' if name == 'format' else name}", json.dumps(lost))
    for name in about["config"]:
        lost = {key: value for key, value in about["config"].items() if key != name}
        for change in ({"config": lost}, {"by_layer": {"blocks.0.attn": lost}}):
            refused(f"does not fit .*got none for .*{name}", json.dumps(about | change))
    refused("foreign", text="[1]")
    with pytest.raises(ValueError, match="directory: .*none.* is missing"):
        load_routing(model, tmp_path / "none")
    with pytest.raises(TypeError, match="directory: expected a path, got VisionTransformer"):
        save_routing(routed(), model)
    with pytest.raises(
        TypeError, match="model: expected a torch.nn.Module.*got PosixPath|directory"
    ):
        load_routing(path, model)
    assert trace(model) == before


@pytest.mark.parametrize("first", [False, True])
def test_a_file_of_another_model_leaves_this_one_untouched(first, tmp_path):
    path = saved(tmp_path)
    for model in (build(CASE, torch.float32, depth=3), build(CASES["sam"], torch.float32)):
        if first:
            route_attention(model, window_size=2, num_heavy_tokens_kv=3, min_tokens=0)
        before = trace(model)
        with pytest.raises(ValueError, match="is of another model"):
            load_routing(model, path)
        assert trace(model) == before
    wide = build(CASE, torch.float32, embed_dim=128)
    with pytest.raises(
        ValueError, match="tensors in .* do not fit.*expected .64, 128., got .64, 64"
    ):
        load_routing(wide, path)


def test_an_interrupted_save_leaves_the_old_routing(tmp_path, monkeypatch):
    path, model = saved(tmp_path), routed(layers=[0])
    names = sorted(p.name for p in path.iterdir())
    original, calls = store.save_atomically, []

    def interrupted(file, write):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(file, write)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "save_atomically", interrupted)
        saved(path, model)
    other = build(CASE, torch.float32)
    load_routing(other, path)
    assert len(routed_layers(other)) == 2
    saved(path, model)
    assert len(names) == len(list(path.iterdir()))


def test_nothing_routed_or_several_ways_is_an_error(tmp_path):
    model = build(CASE)
    with pytest.raises(ValueError, match="model: nothing is routed"):
        save_routing(model, tmp_path)
    model = routed()
    rules = [{"min_timestep": 800, "full": True}]
    routed_layers(model)["blocks.0.attn"].config = RoutedAttentionConfig(schedule=rules)
    with pytest.raises(ValueError, match="one schedule for all layers"):
        save_routing(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_key_is_saved_as_one_and_all_keys_as_all(tmp_path):
    """1 == 1.0 in Python."""

    def pair():
        return nn.ModuleDict({name: build(CASE, torch.float32) for name in "ab"})

    model, other = pair(), pair()
    for name, keys in (("a", 1), ("b", 1.0)):
        route_attention(model[name], num_heavy_tokens_kv=keys, min_tokens=0)
    load_routing(other, saved(tmp_path, model))
    keys = {n: layer.config.num_heavy_tokens_kv for n, layer in routed_layers(other).items()}
    assert {type(count) for n, count in keys.items() if n.startswith("a")} == {int}
    assert {type(count) for n, count in keys.items() if n.startswith("b")} == {float}


def test_integers_of_numpy_can_be_saved(tmp_path):
    how = {"window_size": np.int64(2), "share": np.int64(4), "num_heavy_tokens_q": np.int64(5)}
    rule = {"max_tokens": np.int64(9), "full": True}
    how |= {"schedule": [rule], "min_tokens": np.int64(0)}
    timed = RoutedAttentionConfig(schedule=[rule | {"max_timestep": np.float32(2)}])
    assert json.dumps(timed.to_dict())
    model, other = routed(**how), build(CASE, torch.float32)
    load_routing(other, saved(tmp_path, model))
    assert settings(other) == settings(model)


def test_half_precision_models_take_the_routers(tmp_path):
    model, other = routed().bfloat16(), build(CASE, torch.bfloat16)
    load_routing(other, saved(tmp_path, model))
    x = picture(CASE).bfloat16()
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
