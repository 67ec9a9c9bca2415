"""The network of the needle study, its attentions, and which of them are compared.

A convolutional stem makes tokens of 8x8 pixels, two blocks follow, identical but for their
attention, and each square's token is classified.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.needle_task import WINDOW
from colt5_vision import ConditionalRoutedImageAttention, RoutingSchedule
from colt5_vision.ops import window_attention
from colt5_vision.scheduled import NARROW_SOFTMAX, NARROW_SUM, Narrowing

DIM, HEADS, DEPTH, STEM = 64, 2, 2, (16, 32)


class Variant(NamedTuple):
    """An attention: ``kind`` "full", "window", or the fusion of a routed one, its router, keys and
    queries.

    ``wide``: it starts with all keys and queries, or as many as ``--widest`` allows, and narrows as
        it trains.
    ``window``: tokens; ``options``: others of the routed attention; ``light_gain``: of its light
        branch at first.
    """

    kind: str
    router: str | None = None
    keys: str | None = None
    queries: float | None = None
    wide: bool = True
    window: int = WINDOW
    options: dict | None = None
    light_gain: float = 1.0

    def num_keys(self, tokens: int) -> int:
        """Keys that a token sees outside its window."""
        few = max(4, tokens // WINDOW**2 // 4)
        return {"full": tokens, "window": 0}.get(
            self.kind, few if self.keys == "few" else tokens // 8
        )

    def build(self, tokens: int) -> nn.Module:
        if self.router is None:
            return DenseAttention(self.kind == "window")
        attention = ConditionalRoutedImageAttention(
            DIM,
            num_heavy_tokens_q=self.queries,
            num_heavy_tokens_kv=self.num_keys(tokens),
            light_heads=HEADS,
            light_dim_head=DIM // HEADS,
            light_window_size=self.window,
            heavy_heads=HEADS,
            heavy_dim_head=DIM // HEADS,
            channel_first=False,
            fusion=self.kind,
            router=self.router,
            **(self.options or {}),
        )
        if self.light_gain != 1:
            attention.attend.light_attn.to_out.weight.data.mul_(self.light_gain)
        return attention

    @property
    def narrowing(self) -> Narrowing | None:
        """How its keys are narrowed in training."""
        if self.router is None or not self.wide:
            return None
        return NARROW_SOFTMAX if self.kind == "softmax" else NARROW_SUM

    def schedule(self, model: nn.Module, tokens: int, widest: float) -> RoutingSchedule | None:
        if self.narrowing is None:
            return None
        keys = max(1, round(widest * tokens / self.num_keys(tokens)))
        queries = max(1, round(1 / (self.queries or 1)))
        times = (1 << (times - 1).bit_length() for times in (keys, queries))
        return RoutingSchedule(model, *times)


VARIANTS = {"full": Variant("full"), "window": Variant("window")} | {
    f"{fusion}-{router}-{keys}": Variant(fusion, router, keys)
    for keys in ("eighth", "few")
    for fusion in ("softmax", "sum")
    for router in ("learned", "random", "grid")
}


class DenseAttention(nn.Module):
    """Pre-normalised attention over a map (B, H, W, C), of all tokens or inside windows."""

    def __init__(self, windowed: bool):
        super().__init__()
        self.windowed = windowed
        self.norm = nn.RMSNorm(DIM, eps=1e-6)
        self.to_qkv, self.to_out = (
            nn.Linear(DIM, 3 * DIM, bias=False),
            nn.Linear(DIM, DIM, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        grid_size = tuple(x.shape[1:3])
        qkv = self.to_qkv(self.norm(x)).flatten(1, 2).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.windowed:
            out = window_attention(q, k, v, grid_size=grid_size, window_size=WINDOW)
        else:
            out = scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2)).unflatten(1, grid_size)


class SquareReader(nn.Module):
    """Canvases (B, 1, H, W) and the tokens (B, S) of squares to class logits (B, S, 10)."""

    def __init__(self, variant: Variant, tokens: int):
        super().__init__()

        # the stem; a token sees 31 pixels
        widths, layers = (1, *STEM, DIM), []
        for i in range(3):
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.GELU(),
            ]
        layers += [nn.Conv2d(DIM, DIM, 3, 1, 1, bias=False), nn.BatchNorm2d(DIM)]
        self.stem, self.stem_norm = nn.Sequential(*layers), nn.RMSNorm(DIM, eps=1e-6)

        # layers
        self.routed = variant.router is not None
        self.attentions = nn.ModuleList(variant.build(tokens) for _ in range(DEPTH))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(
                nn.RMSNorm(DIM, eps=1e-6),
                nn.Linear(DIM, 2 * DIM),
                nn.GELU(),
                nn.Linear(2 * DIM, DIM),
            )
            for _ in range(DEPTH)
        )

        # torch's start at a third of the variance that keeps a signal's
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data.mul_(3**0.5)

        # At first a square has heard little of the digit beside what it is, a square. In an earlier
        # form of this model, normalised token by token, neither full attention nor either fusion
        # learned anything in 600 steps; over the batch what all squares share falls away.
        self.norm, self.head = nn.BatchNorm1d(DIM), nn.Linear(DIM, 10)

    def keys_now(self, own: int) -> int:
        """Keys that a token sees outside its window in this step of the training."""
        return self.attentions[0].keys_now(own) if self.routed else own

    def forward(self, images: Tensor, squares: Tensor) -> Tensor:
        x = self.stem(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.stem_norm(x)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            x = x + attention(x)
            x = x + feed_forward(x)
        x = x.flatten(1, 2)
        x = x.gather(1, squares.unsqueeze(-1).expand(-1, -1, DIM))
        return self.head(self.norm(x.flatten(0, 1))).unflatten(0, squares.shape)
