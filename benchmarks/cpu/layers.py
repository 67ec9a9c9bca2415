"""The whole layer, norm and projections included, beside other layers of the same width; and how
its time grows."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import colt5_attention
import tomesd
import torch
from torch import Tensor

from benchmarks.gpu.attention import FLOPS, dense_layer, partitioned, routed_layer
from benchmarks.gpu.measure import PASSES, Map, both, forward
from support.peers import subsampled_keys

from .cases import CPU, SHARE, SPEED, Case

FUSIONS = ("softmax", "sum")
MERGED = 0.75  # of the tokens, the most that tomesd merges in cells of 2 x 2


def fixed(side: int, keys: int, window: int = 16) -> Map:
    """A map of 64 channels with this many routed keys, whatever its side; they must divide its
    tokens."""
    if side**2 % keys:
        raise ValueError(f"keys: expected a divisor of {side} x {side} tokens, got {keys}")
    return Map(side, 2, 32, window=window, share=side**2 // keys)


def shared(size: Map) -> Map:
    """The same map with a share of its tokens routed, 1/16."""
    return replace(size, share=16)


def ours(size: Map, fusion: str):
    torch.manual_seed(0)
    return routed_layer(size, fusion, CPU, torch.float32)


def predecessor(size: Map):
    """Its image layer, every argument that ours does not share at its own default. It routes inside
    each window, so the same number of tokens in all is its share of every window."""
    torch.manual_seed(0)
    width = {"dim_head": size.head_dim, "heads": size.heads}
    here = max(1, size.window**2 // size.share)
    return colt5_attention.ConditionalRoutedImageAttention(
        size.heads * size.head_dim,
        num_heavy_tokens_q=here,
        num_heavy_tokens_kv=here,
        light_window_size=size.window,
        **{
            f"{branch}_{key}": value
            for branch in ("light", "heavy")
            for key, value in width.items()
        },
    )


def subsampled(weights, size: Map, share: float) -> Callable:
    """ToDo: keys and values of every n-th row and column."""
    grid = (size.side, size.side)
    return dense_layer(weights, lambda q, k, v: subsampled_keys(q, k, v, grid, 0, share, offset=0))


def merged(weights, size: Map) -> Callable:
    """tomesd: tokens are merged before the layer and copied back after it."""
    dense, generator = dense_layer(weights), torch.Generator().manual_seed(0)

    def run(x: Tensor) -> Tensor:
        flat, side = x.flatten(1, 2), size.side
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            flat, side, side, 2, 2, int(MERGED * size.tokens), generator=generator
        )
        return unmerge(dense(merge(flat).unsqueeze(2)).squeeze(2)).view_as(x)

    return run


FULL, STRIDE_2, TOMESD = "full SDPA", "ToDo, keys 2 x 2 subsampled", f"tomesd, {MERGED:.0%} merged"
# other attentions with the norm and the projections of ours
PEERS: dict[str, Callable] = {
    FULL: lambda weights, size: dense_layer(weights),
    "window alone, partition + SDPA": lambda weights, size: dense_layer(weights, partitioned(size)),
    STRIDE_2: lambda weights, size: subsampled(weights, size, 1 / 4),
    "ToDo, subsampled to as many keys": lambda weights, size: subsampled(
        weights, size, 1 / size.share
    ),
    TOMESD: merged,
}


def routing(layer, size: Map) -> Callable:
    """What the layer's routers do in it, and no more: indices, and the gates that gradients go
    through."""
    routers = (layer.attend.q_router, layer.attend.kv_router)

    def run(x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        found = [
            router(tokens, num_tokens=1 / size.share) for router in routers if router is not None
        ]
        return torch.cat(
            [
                routing.log_weights if layer.fusion == "softmax" else routing.gates
                for routing in found
            ],
            1,
        )

    return run


@dataclass(frozen=True)
class Layer(Case):
    """
    Attributes:
        size: of the map; its share holds for all that route a fixed number of keys.
        most_pairs: query-key pairs that are still tried; a pair of a backward counts for as much as
            it costs.
    """

    size: Map
    most_pairs: float = 256**4

    group: ClassVar[str] = "layers"

    def __str__(self) -> str:
        return f"{self.size.side}x{self.size.side}, {self.size.tokens // self.size.share} keys"

    def tiny(self) -> "Layer":
        return replace(self, size=replace(self.size, side=2 * self.size.window, share=16))

    def makers(self):
        size = self.size
        found: dict[str, Callable] = {}
        for name, some in (("", size), (", keys 1/16", shared(size))):
            for fusion in FUSIONS:
                found[f"fusion {fusion}{name}"] = lambda some=some, fusion=fusion: self._of(
                    ours(some, fusion)
                )
        for fusion in FUSIONS:
            found[f"routing of fusion {fusion}"] = lambda fusion=fusion: self._routing(fusion)
        for name, build in PEERS.items():
            found[name] = lambda build=build: self._dense(build)
        found["colt5_attention's image layer"] = lambda: self._of(predecessor(size))
        return found

    def _input(self) -> Tensor:
        size = self.size
        shape = (size.batch, size.side, size.side, size.heads * size.head_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def _calls(self, function: Callable, parameters: tuple, grad: Tensor | None = None):
        x = self._input()
        return both(function, [x], torch.ones_like(x) if grad is None else grad, parameters)

    def _dense(self, build: Callable):
        weights = ours(self.size, "softmax").attend
        used = tuple(p for name, p in weights.named_parameters() if "router" not in name)
        return self._calls(build(weights, self.size), used)

    def _of(self, layer):
        return self._calls(layer, tuple(layer.parameters()))

    def _routing(self, fusion: str):
        layer = ours(self.size, fusion)
        run = routing(layer, self.size)
        parameters = tuple(p for name, p in layer.named_parameters() if "router" in name)
        with torch.no_grad():
            shape = run(self._input()).shape
        return self._calls(
            run, parameters, torch.randn(shape, generator=torch.Generator().manual_seed(1))
        )

    def ratios(self):
        peers = [*PEERS, "colt5_attention's image layer"]
        mine = [f"fusion {fusion}{keys}" for keys in ("", ", keys 1/16") for fusion in FUSIONS]
        shares = [(SHARE, f"routing of fusion {fusion}", f"fusion {fusion}") for fusion in FUSIONS]
        return [(SPEED, name, peer) for name in mine for peer in peers] + shares

    def _pairs(self, variant: str) -> float:
        """Query-key pairs of what does not grow linearly."""
        tokens = self.size.tokens
        if variant == "fusion softmax, keys 1/16":
            return tokens * (tokens // 16 + self.size.window**2)
        # tomesd: a quarter of the tokens attend to each other, and the others are compared with
        # them
        return {FULL: 1, STRIDE_2: 1 / 4, TOMESD: 1 / 16 + 3 / 16}.get(variant, 0) * tokens**2

    def unfit(self, variant, what):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # of the bare matrix of similarities, before what is made of it
        if variant == TOMESD and (needed := 4 * self.size.tokens**2 * 3 / 16) > memory / 2:
            return f"not tried: its similarities alone are {needed / 2**30:.0f} GiB"
        pairs, most = self._pairs(variant), self.most_pairs / FLOPS[what]
        if pairs > most:
            return (
                f"not tried: {pairs:.1e} pairs of query and key, of which {most:.1e} fit the time "
                "of a run"
            )
        return None


@dataclass(frozen=True)
class Growth(Case):
    """The forward of both fusions at several sides in the same rounds: growth hangs on no drift of
    the machine."""

    sides: tuple[int, ...] = (64, 128, 256, 512)
    keys: int = 1024
    window: int = 16
    most_pairs: float = 256**4

    group: ClassVar[str] = "growth"
    probed: ClassVar[bool] = False  # the layers tell

    def __str__(self) -> str:
        return f"{self.sides[0]}² to {self.sides[-1]}²"

    def _layers(self) -> dict[str, tuple[Layer, str]]:
        """By name, a case at one side and a variant of it."""
        found = {}
        for keys in ("", ", keys 1/16"):
            for fusion in FUSIONS:
                for side in self.sides:
                    size = fixed(side, self.keys, self.window)
                    name = f"fusion {fusion}{keys}"
                    found[f"{name} at {side}"] = (Layer((), size, self.most_pairs), name)
        return found

    def makers(self):
        def make(layer: Layer, variant: str):
            size = shared(layer.size) if variant.endswith("1/16") else layer.size
            module = ours(size, variant.split(",")[0].removeprefix("fusion "))
            return {PASSES[0]: forward(module, [layer._input()])}

        return {name: lambda which=which: make(*which) for name, which in self._layers().items()}

    def series(self) -> dict[str, dict[int, str]]:
        """By layer, the variant at each side."""
        found: dict[str, dict[int, str]] = {}
        for name, (layer, variant) in self._layers().items():
            found.setdefault(variant, {})[layer.size.side] = name
        return found

    def ratios(self):
        return []

    def unfit(self, variant, what):
        layer, name = self._layers()[variant]
        return layer.unfit(name, what)
