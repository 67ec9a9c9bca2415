"""What a user's type checker sees of the public surface; ``make lint`` checks it, nobody runs it.

Types are what the signatures say, and every wrong call is refused: mypy complains of a
``type: ignore`` that is not needed.
"""

from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import colt5_vision as c
import models  # colt5_vision.models, and pipelines likewise, where a checker finds them
import pipelines
from colt5_vision import compat, ops
from colt5_vision.swap.report import Calls
from colt5_vision.visualize import RoutingRecord, plot_routing, record_routing, show_routing


def swap(model: nn.Module, images: Tensor) -> None:
    report = c.route_attention(model, window_size=14, sample_size=(64, 96))
    assert_type(report, c.RoutedAttentionReport)
    assert_type(report.exact, dict[str, str])
    assert_type(c.why_not(model), dict[str, str])
    config = c.RoutedAttentionConfig(num_heavy_tokens_kv=1 / 16, layers=["blocks.*", 3])
    c.route_attention(model, config)
    c.route_attention(model, sample_size="large")  # type: ignore[arg-type]
    c.RoutedAttentionConfig(window_size="16")  # type: ignore[arg-type]
    c.RoutedAttentionConfig(windows=16)  # type: ignore[call-arg]
    assert_type(c.distill_routers(model, [images], steps=2), list[dict[str, float]])
    c.save_routing(model, Path("folder"))
    c.load_routing(model, "folder")
    c.unroute_attention(model)


def layers(x: Tensor) -> None:
    layer = c.ConditionalRoutedImageAttention(64, num_heavy_tokens_kv=1 / 8, device="cpu")
    assert_type(layer.forward(x, num_heavy_tokens_kv=torch.tensor([4, 8])), Tensor)
    c.ConditionalRoutedImageAttention(64, num_heavy_tokens_kv="8")  # type: ignore[arg-type]
    c.ConditionalRoutedImageAttention(64)  # type: ignore[call-arg]
    c.ConditionalRoutedFeedForward(64, num_heavy_tokens=8, dtype=torch.float16)
    c.ConditionalRoutedFeedForward(64, num_heavy_tokens=8, dtype=16)  # type: ignore[arg-type]
    router = c.CoordinateDescentRouter(64)
    assert_type(router.forward(x, num_tokens=4), c.Routing)
    schedule = c.RoutingSchedule(layer, key_factor=4)
    schedule.step(0.5)
    schedule.step("half")  # type: ignore[arg-type]


def operators(x: Tensor) -> None:
    assert_type(ops.soft_topk(x, 4), Tensor)
    ops.soft_topk(x, "4")  # type: ignore[arg-type]
    out: Tensor = ops.routed_window_attention(x, x, x, grid_size=(8, 8), window_size=4)
    ops.window_attention(out, x, x, grid_size="8", window_size=4)  # type: ignore[arg-type]


def pictures(model: nn.Module, x: Tensor) -> None:
    show_routing(model, "photo.jpg", Path("heavy.png"), layers=["*.3.*"], size=518)
    show_routing(model, 5)  # type: ignore[arg-type]
    with record_routing(model) as records:
        model(x)
    assert_type(records, list[RoutingRecord])
    figure: Any = plot_routing(x, records)
    figure.savefig("heavy.png")


def sequences(x: Tensor) -> None:
    along = c.ConditionalRoutedAttention(64, num_heavy_tokens_kv=8, light_window_size=32)
    assert_type(along.forward(x, mask=x > 0), Tensor)
    along.forward(x, x > 0)  # type: ignore[call-arg]
    across = c.ConditionalRoutedCrossAttention(64, num_tokens_q=4, num_tokens_kv=8)
    assert_type(across.forward(x, x, context_mask=x > 0), Tensor)
    causal = c.ConditionalRoutedAutoregressiveAttention(64, num_heavy_tokens_kv=8)
    assert_type(causal.forward(x), Tensor | tuple[Tensor, c.AutoregressiveCache])
    causal.forward(x, cache=x)  # type: ignore[arg-type]


def rooms(x: Tensor) -> None:
    vit = models.Colt5VisionTransformer(img_size=224, depth=2)
    assert_type(vit.forward_features(x), Tensor)
    models.Colt5VisionTransformer(depth="2")  # type: ignore[arg-type]
    processor = pipelines.RoutedAttnProcessor(grid_size=(8, 8), place="before")
    assert_type(processor.calls, Calls)
    pipelines.RoutedAttnProcessor(place="between")  # type: ignore[arg-type]
    layer = compat.ConditionalRoutedImageAttention(64, num_heavy_tokens_kv=8, use_triton=True)
    assert_type(compat.convert_colt5_attention_state_dict({}, layer), dict[str, Tensor])
