"""Recording and drawing where the heavy branch looked."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from colt5_vision import (
    ConditionalRoutedAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    CoordinateDescentRouter,
    route_attention,
)
from colt5_vision.visualize import plot_routing, record_routing, show_routing


def attention(**kwargs):
    heads = {"light_heads": 2, "heavy_heads": 2, "light_dim_head": 4, "heavy_dim_head": 4}
    counts = {"num_heavy_tokens_kv": 5}
    return ConditionalRoutedImageAttention(8, light_window_size=4, **heads, **counts, **kwargs)


def test_records_what_the_router_chose():
    model = nn.Sequential(attention(), attention(num_routed_kv=2))
    x = torch.randn(2, 8, 6, 7)
    with record_routing(model) as records:
        model(x)
    assert [r.name for r in records] == ["0.attend.kv_router", "1.attend.kv_router"]
    flat = x.flatten(2).transpose(1, 2)
    expected = model[0].attend.kv_router(flat, num_tokens=5, grid_size=(6, 7)).indices
    assert torch.equal(records[0].routing.indices, expected) and records[0].grid_size == (6, 7)
    heat = records[0].heatmap()
    assert heat.shape == (2, 6, 7) and torch.equal(
        heat.flatten(1).nonzero()[:, 1].view(2, 5), expected[:, 0].sort().values
    )
    assert records[1].heatmap().sum().item() == pytest.approx(
        2 * 5
    )  # two routes of five, each counting a half
    model(x)
    assert len(records) == 2  # the hooks are gone


@pytest.mark.parametrize("fusion", ["sum", "softmax"])
def test_every_router_of_every_layer_is_recorded(fusion):
    heads = {"heavy_heads": 2, "heavy_dim_head": 4}
    counts = {"num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 5}
    model = nn.ModuleDict(
        {
            "map": attention(num_heavy_tokens_q=3, fusion=fusion),
            "line": ConditionalRoutedAttention(8, light_window_size=4, **heads, **counts),
            "ff": ConditionalRoutedFeedForward(8, num_heavy_tokens=4),
            "cross": ConditionalRoutedCrossAttention(8, num_tokens_q=2, num_tokens_kv=6, heads=2),
        }
    )
    x, line = torch.randn(2, 8, 6, 7), torch.randn(2, 20, 8)
    with record_routing(model) as records:
        model["ff"](model["map"](x))
        model["cross"](model["ff"](model["line"](line)), line)
    found = {(r.name, r.grid_size): int(r.routing.mask[0].sum()) for r in records}
    assert found == {
        ("map.attend.q_router", (6, 7)): 3,
        ("map.attend.kv_router", (6, 7)): 5,
        ("ff.router", (6, 7)): 4,
        ("line.attend.q_router", (1, 20)): 3,
        ("line.attend.kv_router", (1, 20)): 5,
        ("ff.router", (1, 20)): 4,
        ("cross.q_router", (1, 20)): 2,
        ("cross.kv_router", (1, 20)): 6,
    }
    for record in records:
        assert record.heatmap().sum((1, 2)).tolist() == [found[record.name, record.grid_size]] * 2


def test_plot(tmp_path):
    model = attention()
    with record_routing(model) as records:
        model(torch.randn(2, 8, 6, 6))
    figure = plot_routing(
        torch.rand(2, 3, 48, 48), records, tmp_path / "routing.png", titles=["a", "b"]
    )
    assert len(figure.axes) == 4 and (tmp_path / "routing.png").stat().st_size > 1000


@pytest.mark.parametrize("images, calls, shape", [(1, 24, (7, 4)), (1, 2, (1, 3)), (2, 9, (4, 7))])
def test_many_panels_go_on_in_further_rows(images, calls, shape):
    model = attention()
    with record_routing(model) as records:
        for _ in range(calls):
            model(torch.randn(images, 8, 6, 6))
    figure = plot_routing(torch.rand(images, 3, 48, 48), records)
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    assert figure.get_figwidth() < 26
    drawn = [bool(axis.images) for axis in figure.axes]
    assert sum(drawn) == images * (1 + calls)


def test_bad_input():
    with (
        pytest.raises(ValueError, match="no CoordinateDescentRouter"),
        record_routing(nn.Linear(2, 2)),
    ):
        pass
    router = CoordinateDescentRouter(4)
    with record_routing(router) as records:
        router(torch.randn(1, 9, 4), num_tokens=2)
    with pytest.raises(ValueError, match="sequence of 9 tokens"):
        plot_routing(torch.rand(1, 3, 48, 48), records)
    model = attention()
    with record_routing(model) as records:
        model(torch.randn(2, 8, 6, 6))
    with pytest.raises(ValueError, match="images"):
        plot_routing(torch.rand(2, 48, 48), records)
    with pytest.raises(TypeError, match="^images: expected a tensor, got Image"):
        plot_routing(Image.new("RGB", (48, 48)), records)
    with pytest.raises(ValueError, match="expected 3 samples"):
        plot_routing(torch.rand(3, 3, 48, 48), records)
    with pytest.raises(ValueError, match="titles"):
        plot_routing(torch.rand(2, 3, 48, 48), records, titles=["a"])


@pytest.mark.parametrize("router", ["sampled", "mean_query", "grid"])
def test_records_what_a_routed_model_chose(router):
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": (80, 112)}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    how = {"window_size": 3, "num_heavy_tokens_kv": 9, "min_tokens": 0, "router": router}
    route_attention(model, **how)
    x = torch.randn(2, 3, 80, 112)
    with record_routing(model) as records:
        model(x)
    assert [record.name for record in records] == ["blocks.0.attn", "blocks.1.attn"]
    for record in records:
        assert record.grid_size == (5, 7)
        heat = record.heatmap()
        assert heat.shape == (2, 5, 7) and heat.flatten(1).sum(1).tolist() == [9, 9]
        assert ((record.routing.gates > 0) & (record.routing.gates <= 1)).all()
    model(x)
    assert len(records) == 2
    plot_routing(x, records)


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_show_routing_of_layers_draws_a_file_and_leaves_no_trace(tmp_path):
    layers = [attention(num_heavy_tokens_q=3) for _ in range(5)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8)).train()
    model[0].eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    figure = show_routing(model, torch.randn(8, 6, 7), tmp_path / "shown.png")
    assert titles(figure) == ["image"] + [
        f"attention, layer {i} of 5\n5 heavy keys of 42 tokens" for i in (1, 3, 5)
    ]
    rows, columns = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    assert (rows, columns) == (2, 2)
    assert figure.get_supxlabel() == (
        "In color: heavy keys, every token of the image attends to them"
    )
    assert Image.open(tmp_path / "shown.png").format == "PNG"
    assert model.training and not model[0].training and model[1].training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_show_routing_of_chosen_layers_and_several_images():
    model = nn.Sequential(attention(), ConditionalRoutedFeedForward(8, num_heavy_tokens=4))
    figure = show_routing(model, torch.randn(3, 8, 6, 7), layers=["*router"], titles="abc")
    names = ["attention, layer 1 of 1\n5 heavy keys of 42 tokens"]
    names += ["feed-forward, layer 1 of 1\n4 heavy tokens of 42 tokens"]
    assert titles(figure) == ["a", *names, "b", "", "", "c", "", ""]
    assert "large feed-forward" in figure.get_supxlabel()


def test_show_routing_of_a_picture(tmp_path):
    """A file, turned as its EXIF says, a PIL image and an array are one input."""
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), attention()).double()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    array = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    array[0, :2] = [[0], [255]]  # shown from black to white as it is
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(array)).save(tmp_path / "turned.png", exif=turned)
    for image in (array, Image.fromarray(array), tmp_path / "turned.png"):
        figure = show_routing(model, image)
        assert np.allclose(figure.axes[0].images[0].get_array(), array / 255, atol=1e-6)
    assert seen[0].shape == (1, 3, 6, 9) and seen[0].dtype == torch.float64
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    mean = (array / 255).mean((0, 1)) - np.array((0.485, 0.456, 0.406))
    assert np.allclose(seen[0].mean((0, 2, 3)), mean / np.array((0.229, 0.224, 0.225)), atol=1e-6)
    show_routing(model, array, size=(12, 8))
    assert seen[-1].shape == (1, 3, 12, 8)


def test_show_routing_of_bad_input(monkeypatch):
    model = attention()
    for image, message in (
        (torch.randn(6, 7), r"^image: expected \(C, H, W\)"),
        (np.zeros((6, 7, 3)), "^image: expected a tensor, a file, a PIL image"),
        (5, "^image: expected a tensor, a file, a PIL image"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            show_routing(model, image)
    x = torch.randn(8, 6, 7)
    with pytest.raises(ValueError, match="^layers: expected some of attend.kv_router, got"):
        show_routing(model, x, layers=["blocks.*"])
    with pytest.raises(TypeError, match="^layers: expected a number or a list"):
        show_routing(model, x, layers="blocks.*")
    with pytest.raises(ValueError, match="found no CoordinateDescentRouter"):
        show_routing(nn.Conv2d(8, 8, 1), x)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        show_routing(model, x)


def test_show_routing_of_a_timm_model():
    timm = pytest.importorskip("timm")
    options = {"depth": 4, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    route_attention(model, window_size=3, num_heavy_tokens_kv=9, min_tokens=20)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    picture = np.full((80, 112, 3), 128, np.uint8)
    figure = show_routing(model, picture)
    shown = [f"attention, layer {i} of 4\n9 heavy keys of 35 tokens" for i in (1, 3, 4)]
    assert titles(figure) == ["image", *shown]
    # normalised as timm says of this model
    assert torch.allclose(seen[0], torch.tensor((128 / 255 - 0.5) / 0.5), atol=1e-6)
    with pytest.raises(ValueError, match=r"at this size: .*min_tokens"):
        show_routing(model, picture, size=64)


def test_show_routing_of_a_transformers_model():
    pytest.importorskip("transformers.models")
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.ViTConfig(num_hidden_layers=2, image_size=64, patch_size=8, **sizes)
    model = transformers.ViTModel(config)
    route_attention(model, window_size=3, num_heavy_tokens_kv=9, min_tokens=0)
    figure = show_routing(model, torch.randn(3, 64, 64), layers=2)
    shown = [f"attention, layer {i} of 2\n9 heavy keys of 64 tokens" for i in (1, 2)]
    assert titles(figure) == ["image", *shown]


def test_show_routing_of_keys_by_tile():
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": (96, 96)}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    route_attention(model, window_size=3, num_heavy_tokens_kv=4, min_tokens=0, router="grouped")
    with record_routing(model.eval()) as records:
        model(torch.randn(2, 3, 96, 96))
    assert records[0].routing.indices.shape == (2, 1, 4 * 4) and records[0].heatmap().max() <= 1
    figure = show_routing(model, torch.randn(3, 96, 96))
    assert "the tokens of each tile attend to a few of them" in figure.get_supxlabel()
