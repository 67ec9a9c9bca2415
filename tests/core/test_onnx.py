"""ONNX export of backbones and of swapped models, run by onnxruntime."""

import pytest
import timm
import torch

import colt5_vision.models  # noqa: F401
from colt5_vision import route_attention
from tests.support.marks import further

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPEN = torch.export.Dim.DYNAMIC


def check(model, sizes, tmp_path):
    """One file of a map of the first size; of several sizes, height and width are open."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1:].numel() ** -0.5)
    model.eval()
    maps = [torch.randn(1, 3, *size) for size in sizes]
    how = {"dynamic_shapes": ({2: OPEN, 3: OPEN},)} if len(maps) > 1 else {}
    program = torch.onnx.export(model, (maps[0],), dynamo=True, verbose=False, **how)
    program.save(tmp_path / "model.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for x in maps:
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x)
        assert expected.std() > 1e-2
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


SIZES = [(64, 96), (96, 64), (72, 136)]
CELLS = {"depth": 1, "router_kwargs": {"cell_size": 3}}
SUM = {"depth": 1, "fusion": "sum", "num_heavy_tokens_q": 1 / 4}


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("test_colt5_vit", SUM, SIZES),
        # torch fixes a size of 1: the last stage, too, has several windows in the first map
        ("test_colt5_pyramid", {"depths": (1, 0, 0, 1)}, [(160, 192), (96, 96), (160, 64)]),
        *further(("test_colt5_vit", {"depth": 2}, SIZES), ("test_colt5_vit", CELLS, SIZES)),
    ],
)
def test_backbone_of_any_size(name, options, sizes, tmp_path):
    check(timm.create_model(name, num_classes=7, **options), sizes, tmp_path)


@pytest.mark.parametrize(
    ("router", "sizes"),
    [
        ("sampled", [(96, 96), (64, 128), (112, 80)]),
        *further(("grid", [(96, 96)]), ("grouped", [(80, 112)])),
    ],
)
def test_swapped_vit(router, sizes, tmp_path):
    name, dynamic = "vit_tiny_patch16_224", len(sizes) > 1
    how = {"img_size": sizes[0], "depth": 1, "dynamic_img_size": dynamic}
    model = timm.create_model(name, num_classes=7, **how)
    route_attention(model, window_size=2, num_heavy_tokens_kv=1 / 4, router=router, min_tokens=0)
    check(model, sizes, tmp_path)


def test_the_old_exporter_is_refused_and_the_new_one_named(tmp_path):
    model, x = timm.create_model("test_colt5_vit", depth=1).eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(NotImplementedError, match="dynamo=True"):
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)
