"""ONNX export of backbones and of swapped models, run by onnxruntime."""

import pytest
import timm
import torch

import colt5_vision.models  # noqa: F401
from colt5_vision import route_attention

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def check(model, x, tmp_path):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1:].numel() ** -0.5)
        expected = model.eval()(x)
    assert expected.std() > 1e-2
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_colt5_vit", {"depth": 2}),
        ("test_colt5_vit", {"depth": 1, "fusion": "sum", "num_heavy_tokens_q": 1 / 4}),
        ("test_colt5_pyramid", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_backbone(name, options, tmp_path):
    check(timm.create_model(name, num_classes=7, **options), torch.randn(1, 3, 64, 96), tmp_path)


@pytest.mark.parametrize("router", ["sampled", "grid"])
def test_swapped_vit(router, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=96, depth=2)
    route_attention(model, window_size=2, num_heavy_tokens_kv=1 / 4, router=router, min_tokens=0)
    check(model, torch.randn(1, 3, 96, 96), tmp_path)
