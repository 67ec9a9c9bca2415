"""Recording and drawing where the heavy branch looked."""

import pytest
import torch
from torch import nn

from colt5_vision import ConditionalRoutedImageAttention, CoordinateDescentRouter
from colt5_vision.visualize import plot_routing, record_routing


def attention(**kwargs):
    heads = {"light_heads": 2, "heavy_heads": 2, "light_dim_head": 4, "heavy_dim_head": 4}
    return ConditionalRoutedImageAttention(8, num_heavy_tokens_kv=5, light_window_size=4, **heads, **kwargs)


def test_records_what_the_router_chose():
    model = nn.Sequential(attention(), attention(num_routed_kv=2))
    x = torch.randn(2, 8, 6, 7)
    with record_routing(model) as records:
        model(x)
    assert [r.name for r in records] == ["0.kv_router", "1.kv_router"]
    flat = x.flatten(2).transpose(1, 2)
    expected = model[0].kv_router(flat, num_tokens=5, grid_size=(6, 7)).indices
    assert torch.equal(records[0].routing.indices, expected) and records[0].grid_size == (6, 7)
    heat = records[0].heatmap()
    assert heat.shape == (2, 6, 7) and torch.equal(
        heat.flatten(1).nonzero()[:, 1].view(2, 5), expected[:, 0].sort().values
    )
    assert records[1].heatmap().sum().item() == pytest.approx(2 * 5)  # two routes of five, each counting a half
    model(x)
    assert len(records) == 2  # the hooks are gone


def test_plot(tmp_path):
    model = attention()
    with record_routing(model) as records:
        model(torch.randn(2, 8, 6, 6))
    figure = plot_routing(torch.rand(2, 3, 48, 48), records, tmp_path / "routing.png", titles=["a", "b"])
    assert len(figure.axes) == 4 and (tmp_path / "routing.png").stat().st_size > 1000


def test_bad_input():
    with pytest.raises(ValueError, match="no CoordinateDescentRouter"), record_routing(nn.Linear(2, 2)):
        pass
    router = CoordinateDescentRouter(4)
    with record_routing(router) as records:
        router(torch.randn(1, 9, 4), num_tokens=2)
    with pytest.raises(ValueError, match="sequence"):
        records[0].heatmap()
    model = attention()
    with record_routing(model) as records:
        model(torch.randn(2, 8, 6, 6))
    with pytest.raises(ValueError, match="images"):
        plot_routing(torch.rand(2, 48, 48), records)
    with pytest.raises(ValueError, match="expected 3 samples"):
        plot_routing(torch.rand(3, 3, 48, 48), records)
    with pytest.raises(ValueError, match="titles"):
        plot_routing(torch.rand(2, 3, 48, 48), records, titles=["a"])
