"""The timm ViT: registered, trainable, a feature backbone."""

import colt5_vision.models  # noqa: F401
import pytest
import timm
import torch

SIZES = [f"colt5_vit_{size}_patch{p}_{s}" for size in ("tiny", "small", "base") for p in (16, 8) for s in (224, 512)]


def test_registered():
    names = timm.list_models("*colt5_vit*")
    assert set(names) == {*SIZES, "colt5_vit_nano_patch8_192", "test_colt5_vit"}
    for name in SIZES:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert model.pretrained_cfg["input_size"][-1] == int(name.rsplit("_", 1)[1])


def test_small_enough():
    assert sum(p.numel() for p in timm.create_model("test_colt5_vit").parameters()) < 500_000


@pytest.mark.parametrize("fusion", ["softmax", "sum"])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_every_parameter_learns_at_any_size(fusion, stem):
    model = timm.create_model("test_colt5_vit", num_classes=5, fusion=fusion, stem=stem, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    out = model(torch.randn(4, 3, 72, 104))
    assert out.shape == (4, 5)
    out.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    silent = [n for n, p in model.named_parameters() if not p.grad.any()]
    assert not silent


@pytest.mark.parametrize(("name", "maps"), [("test_colt5_vit", 3), ("colt5_vit_nano_patch8_192", 2)])
def test_default_features(name, maps):
    assert len(timm.create_model(name, features_only=True)(torch.randn(1, 3, 64, 64))) == maps


def test_features():
    model = timm.create_model("test_colt5_vit", features_only=True, out_indices=(1, 3))
    maps = model(torch.randn(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 12, 8)] * 2
    model = timm.create_model("test_colt5_vit", num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    final, intermediates = model.forward_intermediates(x, indices=2)
    assert len(intermediates) == 2
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model(x), model.forward_head(final))


def test_reset_classifier_and_prune():
    model = timm.create_model("test_colt5_vit", num_classes=5).eval()
    model.reset_classifier(3, "catavgmax")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.prune_intermediate_layers(1) == [3] and len(model.blocks) == 4
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1 and model(torch.randn(1, 3, 64, 64)).shape == (1, 64, 8, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="stem"):
        timm.create_model("test_colt5_vit", stem="deep")
    with pytest.raises(ValueError, match="num_heads"):
        timm.create_model("test_colt5_vit", num_heads=5)
    with pytest.raises(TypeError, match="unknown"):
        timm.create_model("test_colt5_vit", unknown=1)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        timm.create_model("test_colt5_vit")(torch.randn(1, 3, 4, 64))
