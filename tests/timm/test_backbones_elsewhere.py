"""Our backbones inside other libraries: segmentation, detection, linear probing, export."""

import math

import pytest
import timm
import torch
from torch import nn

import colt5_vision.models  # noqa: F401
from tests.support.marks import further

SMALL = ["test_colt5_vit", "test_colt5_pyramid"]


def test_unet_of_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet(
        "tu-colt5_pyramid_tiny",
        encoder_weights=None,
        classes=2,
        decoder_channels=(64, 32, 16, 8, 8),
    )
    masks = model(torch.randn(2, 3, 64, 96))
    assert masks.shape == (2, 2, 64, 96)
    masks.square().mean().backward()
    assert not [
        n
        for n, p in model.encoder.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]


def test_faster_rcnn_of_torchvision():
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = timm.create_model("test_colt5_pyramid", features_only=True)
    pyramid = detection.backbone_utils.BackboneWithFPN(
        backbone,
        return_layers={f"stages_{i}": str(i) for i in range(4)},
        in_channels_list=backbone.feature_info.channels(),
        out_channels=16,
    )
    sizes = tuple((2**i,) for i in range(3, 8))  # four maps and the one pooled from the last
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    model = detection.FasterRCNN(pyramid, 3, min_size=64, max_size=96, rpn_anchor_generator=anchors)
    images = [torch.rand(3, 60, 90), torch.rand(3, 64, 64)]
    boxes = torch.tensor([[5.0, 5.0, 30.0, 40.0]])
    losses = model(images, [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images])
    assert all(loss.isfinite() for loss in losses.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(losses.values()).backward()
    assert not [
        n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    optimizer.step()
    found = model.eval()(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize("name", ["test_colt5_vit", *further("test_colt5_pyramid")])
def test_linear_probe_on_a_frozen_backbone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    probe = nn.Linear(model.head_hidden_size, 2)
    # stripes along one axis or the other
    wave = torch.sin(torch.arange(48) * (2 * math.pi / 12) + torch.rand(32, 1) * 2 * math.pi)
    labels = torch.arange(32) % 2
    rows = wave.unsqueeze(2).expand(-1, -1, 48)
    images = (
        torch.where(labels[:, None, None] == 1, rows, rows.mT).unsqueeze(1).expand(-1, 3, -1, -1)
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        features = model(images)
        assert not features.requires_grad
        losses.append(
            nn.functional.cross_entropy(
                probe(nn.functional.layer_norm(features, features.shape[1:])), labels
            )
        )
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "node"), zip(SMALL, ("blocks.1", "stages.1"), strict=True))
def test_feature_extraction_of_torchvision(name, node):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = timm.create_model(name).eval()
    traced = extraction.create_feature_extractor(model, {node: "features"})
    seen = []
    model.get_submodule(node).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for size in ((96, 96), (64, 120)):
            x = torch.randn(2, 3, *size)
            found = traced(x)["features"]
            model(x)
            torch.testing.assert_close(found, seen.pop())


@pytest.mark.parametrize("name", ["test_colt5_vit", *further("test_colt5_pyramid")])
def test_torch_export_for_any_batch_and_size(name):
    model = timm.create_model(name, num_classes=5).eval()
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        model, (torch.randn(2, 3, 96, 96),), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}}
    )
    with torch.no_grad():
        for shape in ((2, 3, 96, 96), (3, 3, 64, 120)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x), model(x))
