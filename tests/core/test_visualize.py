"""Recording and drawing where the heavy branch looked."""

import pytest
import torch
from torch import nn

from colt5_vision import (
    ConditionalRoutedAttention,
    ConditionalRoutedCrossAttention,
    ConditionalRoutedFeedForward,
    ConditionalRoutedImageAttention,
    CoordinateDescentRouter,
    route_attention,
)
from colt5_vision.visualize import plot_routing, record_routing


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
