"""The timm backbones: registered, trainable at any size, feature extractors (timm's own tests:
test_timm_contract)."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch.profiler import ProfilerActivity, profile

import colt5_vision.models  # noqa: F401
from colt5_vision import CoordinateDescentRouter
from colt5_vision.models import colt5_pyramid, colt5_vit

VITS = [
    f"colt5_vit_{size}_patch{p}_{s}"
    for size in ("tiny", "small", "base")
    for p in (16, 8)
    for s in (224, 512)
]
PYRAMIDS = [f"colt5_pyramid_{size}" for size in ("tiny", "small", "base")]
SMALL = ["test_colt5_vit", "test_colt5_pyramid"]
both = pytest.mark.parametrize("name", SMALL)


def parameters_in_millions(name: str) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6


def test_registered():
    assert set(timm.list_models("*colt5*")) == {
        *VITS,
        "colt5_vit_nano_patch8_192",
        *PYRAMIDS,
        *SMALL,
    }
    for name in VITS:
        assert timm.get_pretrained_cfg(name).input_size[-1] == int(name.rsplit("_", 1)[1])
    assert timm.list_models(module="colt5_vit") and timm.list_models(module="colt5_pyramid")


def test_a_search_finds_the_constructor_of_every_model():
    sources = [Path(module.__file__).read_text() for module in (colt5_vit, colt5_pyramid)]
    for name in timm.list_models("*colt5*"):
        assert sum(f"\ndef {name}(" in source for source in sources) == 1
        assert timm.models.model_entrypoint(name).__name__ == name


def test_sizes():
    assert all(parameters_in_millions(name) < 0.5 for name in SMALL)
    assert [round(parameters_in_millions(name)) for name in PYRAMIDS] == [16, 35, 105]


@both
@pytest.mark.parametrize("fusion", ["softmax", "sum"])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_every_parameter_learns_at_any_size(name, fusion, stem):
    model = timm.create_model(
        name, num_classes=5, fusion=fusion, stem=stem, drop_path_rate=0.1, init_values=0.1
    )
    model.set_grad_checkpointing()
    out = model(torch.randn(8, 3, 72, 104))
    assert out.shape == (8, 5)
    out.square().sum().backward()
    missing = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not missing
    silent = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert not silent


@pytest.mark.parametrize(
    ("name", "maps"),
    [("test_colt5_vit", 3), ("colt5_vit_nano_patch8_192", 2), ("test_colt5_pyramid", 4)],
)
def test_default_features(name, maps):
    assert len(timm.create_model(name, features_only=True)(torch.randn(1, 3, 64, 64))) == maps


@pytest.mark.parametrize("feature_cls", ["getter", "list", "hook", "fx"])
def test_features(feature_cls):
    x = torch.randn(1, 3, 90, 70)
    extra = {"features_only": True, "feature_cls": feature_cls, "out_indices": (1, 3)}
    model = timm.create_model("test_colt5_vit", **extra)
    assert [tuple(m.shape) for m in model(x)] == [(1, 64, 12, 9)] * 2
    model = timm.create_model("test_colt5_pyramid", **extra)
    assert model.feature_info.reduction() == [8, 32] and model.feature_info.channels() == [32, 96]
    assert [tuple(m.shape) for m in model(x)] == [(1, 32, 12, 9), (1, 96, 3, 3)]


@both
def test_forward_intermediates(name):
    model = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    final, intermediates = model.forward_intermediates(x, indices=2, norm=True)
    assert len(intermediates) == 2
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(intermediates[-1], final)
    torch.testing.assert_close(model(x), model.forward_head(final))
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_checkpointed_features_have_the_same_gradients():
    x, grads = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_colt5_pyramid", features_only=True)
        model.set_grad_checkpointing(enable)
        sum(f.square().mean() for f in model(x)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


@both
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_reset_classifier(name, pool):
    model = (
        timm.create_model(name, num_classes=5, global_pool=pool)
        .double()
        .eval()
        .requires_grad_(False)
    )
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    assert model(x).shape == (2, 3) and model.get_classifier().weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.fc.weight",
        "head.fc.bias",
    ]
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)


def test_prune():
    model = timm.create_model("test_colt5_vit").eval()
    assert model.prune_intermediate_layers(1, prune_head=False) == [3] and len(model.blocks) == 4
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1 and model(torch.randn(1, 3, 64, 64)).shape == (1, 64, 8, 8)
    model = timm.create_model("test_colt5_pyramid").eval()
    assert model.prune_intermediate_layers([1], prune_head=False) == [
        1
    ]  # the head no longer fits: it goes all the same
    assert model.num_features == 32 and model(torch.randn(1, 3, 64, 64)).shape == (1, 32, 8, 8)


@both
def test_parameter_groups(name):
    model = timm.create_model(name)
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() and model.no_weight_decay() <= names
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == names and len(set(groups.values())) == 4 + 2 + (
        name == "test_colt5_pyramid"
    )
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 6
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert (
        scales[model.stem.convs[0].weight]
        < scales[model.norm.weight]
        < scales[model.head.fc.weight]
    )


@both
def test_device_and_dtype(name):
    model = timm.create_model(
        name, device="meta", dtype=torch.bfloat16, fusion="sum", init_values=0.1
    )
    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model(torch.randn(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model(x).dtype == torch.float32
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert timm.create_model(name, dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@both
def test_input_size_and_round_trip(name, tmp_path):
    model = timm.create_model(
        name, num_classes=7, in_chans=1, global_pool="max", num_heavy_tokens_kv=1 / 2
    ).eval()
    assert model.in_chans == 1
    model.set_input_size((64, 88))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.img_size == (64, 88)
    x = torch.randn(2, 1, 64, 88)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    for size in (0, (64, 2), (64, 64, 64), 64.0):
        with pytest.raises((TypeError, ValueError), match="img_size"):
            model.set_input_size(size)
    assert model.img_size == (64, 88)


@both
def test_compiles_to_one_graph(name):
    model, x = timm.create_model(name, num_classes=5), torch.randn(2, 3, 64, 80)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_pyramid_routes_where_the_map_is_large():
    model = timm.create_model("test_colt5_pyramid").eval()
    routers = {n: m for n, m in model.named_modules() if isinstance(m, CoordinateDescentRouter)}
    learned = {n.split(".")[1] for n, m in routers.items() if m.routing_token is not None}
    assert learned == {"0", "1", "2"}
    attention, x = model.stages[3].blocks[0].attn, torch.randn(1, 96, 9, 7)
    with torch.no_grad():
        expected = attention(x)
        attention.attend.window_size = (1, 1)
        torch.testing.assert_close(attention(x), expected)  # full attention, whatever the window


def test_pyramid_never_holds_a_token_by_token_matrix():
    model, x = (
        timm.create_model("test_colt5_pyramid", features_only=True),
        torch.randn(1, 3, 256, 256),
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        sum(f.square().mean() for f in model(x)).backward()
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    tokens = 64 * 64
    assert 0 < largest < 4 * tokens * tokens / 64


def test_bad_input():
    for name in SMALL:
        with pytest.raises(ValueError, match="stem"):
            timm.create_model(name, stem="deep")
        with pytest.raises(ValueError, match="num_heads"):
            timm.create_model(name, num_heads=5)
        with pytest.raises(TypeError, match="unknown"):
            timm.create_model(name, unknown=1)
        with pytest.raises(TypeError, match="out_indices"):
            timm.create_model(name, out_indices=(0, 1))
        with pytest.raises(ValueError, match="img_size"):
            timm.create_model(name, img_size=2)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        timm.create_model("test_colt5_vit")(torch.randn(1, 3, 4, 64))
    with pytest.raises(ValueError, match="4 dimensions|B, C, H, W"):
        timm.create_model("test_colt5_vit")(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="num_heavy_tokens_kv"):
        timm.create_model("test_colt5_pyramid", num_heavy_tokens_kv=(0.5, 0.5))
    with pytest.raises(ValueError, match="patch_size"):
        timm.create_model("test_colt5_vit", patch_size=12)
