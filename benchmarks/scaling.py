"""Arithmetic of training a ``colt5_vit`` on many GPUs: tokens, FLOPs, memory, communication.

``python -m benchmarks.scaling`` prints the tables of docs/scaling.md. It counts; it measures
nothing and needs no GPU.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import timm
import torch
from torch import nn

import colt5_vision.models  # noqa: F401

# data sheets, an NVIDIA H100 or H200 SXM: assumptions, all of them upper bounds
PEAK = 989e12  # dense bfloat16, FLOP/s
HBM = 3.35e12  # bytes/s of the H100, the slower of the two
MEMORY = 80e9  # bytes of the H100, the smaller of the two
NVLINK = 450e9  # bytes/s in each direction: the 900 GB/s of the data sheet are the sum of both
NIC = 50e9  # bytes/s in each direction: InfiniBand, 400 Gb/s for each GPU
NODE = 8  # GPUs
CLUSTERS = (8, 64)
IMAGENET = 1_281_167  # training images of ImageNet-1k

ACTIVATION = 2  # bytes: bfloat16
GATHERED = 2  # bytes of a parameter as FSDP2 gathers it: bfloat16
GRADIENT = 4  # bytes of a gradient as it is reduced: float32
STATE = 16  # bytes of a parameter, its gradient and AdamW's two moments: float32
# fused attention, backward over forward: five matrix products for two, the logits made again
RECOMPUTED = 2.5

ATTENTION = ("window attention", "routed attention")  # inside an operator of colt5_vision


@dataclass(frozen=True)
class Setup:
    """A ``colt5_vit`` (``fusion="softmax"``, every token queries) and its input, in the names of
    timm's arguments; and

    Attributes:
        title: for the tables.
        global_batch: images a step over all GPUs.
        imagenet: whether an epoch is one of ImageNet-1k.
    """

    img_size: int
    in_chans: int
    patch_size: int
    stem: str
    embed_dim: int
    depth: int
    num_heads: int
    window_size: int
    num_heavy_tokens_kv: int | float
    num_heavy_ff_tokens: int | float
    title: str = ""
    global_batch: int = 1
    imagenet: bool = False
    light_ff_mult: float = 1.0
    heavy_ff_mult: float = 4.0
    num_classes: int = 1000

    def create(self, device: str = "meta") -> nn.Module:
        """The model; on the meta device it takes no memory."""
        overrides = asdict(self)
        for name in ("title", "global_batch", "imagenet"):
            del overrides[name]
        return timm.create_model(
            "colt5_vit_base_patch16_512", device=torch.device(device), **overrides
        )

    @cached_property
    def parameters(self) -> int:
        """Of the model."""
        return sum(p.numel() for p in self.create().parameters())

    @cached_property
    def block_parameters(self) -> int:
        """Of one block."""
        return sum(p.numel() for p in self.create().blocks[0].parameters())

    @property
    def side(self) -> int:
        """Of the map, in tokens."""
        return -(-self.img_size // self.patch_size)

    @property
    def tokens(self) -> int:
        """N."""
        return self.side**2

    def _routed(self, count: float) -> int:
        return min(
            count if isinstance(count, int) else max(1, round(count * self.tokens)), self.tokens
        )

    @property
    def keys(self) -> int:
        """K, routed keys."""
        return self._routed(self.num_heavy_tokens_kv)

    @property
    def heavy(self) -> int:
        """F, tokens with the heavy feed-forward."""
        return self._routed(self.num_heavy_ff_tokens)

    def convolutions(self) -> Iterable[tuple[int, int, int, int]]:
        """(input channels, output channels, kernel side, output tokens) of each convolution of the
        stem."""
        if self.stem == "patch":
            yield self.in_chans, self.embed_dim, self.patch_size, self.tokens
            return
        steps, channels, side = self.patch_size.bit_length() - 1, self.in_chans, self.img_size
        for i in range(steps):
            width, side = max(8, self.embed_dim >> (steps - 1 - i)), -(-side // 2)
            yield channels, width, 3, side**2
            channels = width
        yield channels, self.embed_dim, 3, side**2


_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "num_heavy_ff_tokens": 1 / 4}
_XL = _BASE | {"embed_dim": 1152, "depth": 28, "num_heads": 16}
_IMAGE = {
    "img_size": 512,
    "in_chans": 3,
    "stem": "conv",
    "window_size": 8,
    "num_heavy_tokens_kv": 1 / 8,
}
_LATENT = {
    "img_size": 256,
    "in_chans": 16,
    "stem": "patch",
    "window_size": 16,
    "num_heavy_tokens_kv": 1024,
}
_IMAGENET = {"global_batch": 1024, "imagenet": True}
SETUPS = (
    Setup(title="base, 512 px, stride 16", patch_size=16, **_BASE, **_IMAGE, **_IMAGENET),
    Setup(title="base, 512 px, stride 8", patch_size=8, **_BASE, **_IMAGE, **_IMAGENET),
    Setup(title="XL, 2048-px latents, stride 2", patch_size=2, **_XL, **_LATENT, global_batch=64),
    Setup(
        title="base, 2048-px latents, stride 1", patch_size=1, **_BASE, **_LATENT, global_batch=64
    ),
)


def forward_flops(setup: Setup) -> dict[str, float]:
    """FLOPs of matrix products and convolutions of one image by part, two for a multiply-add.

    Norms, activations, rotary positions, softmax, gates, top-k, gathering and scattering count as
    none.
    """
    n, c, depth = setup.tokens, setup.embed_dim, setup.depth
    in_line = [
        min(setup.window_size, setup.side - i) for i in range(0, setup.side, setup.window_size)
    ]
    pairs = (
        sum(length**2 for length in in_line) ** 2
    )  # of tokens in one window; N * window² where windows fit
    return {
        "stem": sum(
            2.0 * i * o * kernel**2 * tokens for i, o, kernel, tokens in setup.convolutions()
        ),
        "projections": depth * 8 * n * c**2,
        "window attention": depth * 4 * pairs * c,
        "routed attention": depth * 4 * n * setup.keys * c,
        "routers": depth * 2 * 2 * n * c,
        "feed-forward, light": depth * 4 * setup.light_ff_mult * n * c**2,
        "feed-forward, heavy": depth * 4 * setup.heavy_ff_mult * setup.heavy * c**2,
        "classifier": 2 * c * setup.num_classes,
    }


def backward_flops(setup: Setup) -> dict[str, float]:
    """FLOPs of the gradients of one image by part: twice forward, but the image needs none, and
    attention is fused."""
    forward = forward_flops(setup)
    grads = {
        part: flops * (RECOMPUTED if part in ATTENTION else 2) for part, flops in forward.items()
    }
    i, o, kernel, tokens = next(iter(setup.convolutions()))
    grads["stem"] -= 2 * i * o * kernel**2 * tokens
    return grads


def checkpointing_flops(setup: Setup) -> float:
    """FLOPs of one image that run the blocks again."""
    return sum(
        flops for part, flops in forward_flops(setup).items() if part not in ("stem", "classifier")
    )


def full_attention_flops(setup: Setup) -> float:
    """Forward and backward of one image if all attention were full (the stem, projections and the
    rest the same)."""
    others = sum(
        f[part]
        for f in (forward_flops(setup), backward_flops(setup))
        for part in f
        if part not in ATTENTION
    )
    return others + setup.depth * 4 * setup.tokens**2 * setup.embed_dim * (1 + RECOMPUTED)


def block_elements(setup: Setup) -> float:
    """Elements of one image that one block keeps for backward, in eager PyTorch on a GPU.

    Attention: its input, normalised, q, k, v, output. Feed-forward: input,
    normalised, the light hidden layer before and after GELU; of the routed tokens input,
    normalised, hidden layer twice, output. What has no channels (logits, logsumexps, indices,
    norms) and rotary tables are left out.
    """
    attention, light, heavy = 6, 2 + 2 * setup.light_ff_mult, 3 + 2 * setup.heavy_ff_mult
    return ((attention + light) * setup.tokens + heavy * setup.heavy) * setup.embed_dim


def saved_elements(setup: Setup, checkpointing: bool = False) -> float:
    """Elements of one image that the model keeps for backward; checkpointing: block inputs, and one
    block run again."""
    stem = setup.in_chans * setup.img_size**2
    # of each but the last convolution: what goes into its norm, into GELU, and on
    stem += sum(3 * width * tokens for _, width, _, tokens in list(setup.convolutions())[:-1])
    one = setup.tokens * setup.embed_dim
    blocks = (
        setup.depth * one + block_elements(setup)
        if checkpointing
        else setup.depth * block_elements(setup)
    )
    return stem + blocks + 2 * one  # the last norm, timm's, is plain torch and keeps a copy more


def state_bytes(setup: Setup, gpus: int, sharded: bool) -> float:
    """Parameters, gradients and optimizer on one GPU, with the bfloat16 copies that are alive at
    once."""
    if not sharded:
        return (STATE + GATHERED) * setup.parameters  # autocast keeps its copies during a step
    # the block that is computed and the next one, and the gradients of one, in bfloat16 and as they
    # are reduced
    alive = (2 * GATHERED + GATHERED + GRADIENT) * setup.block_parameters
    return STATE * setup.parameters / gpus + alive


def all_reduce_bytes(setup: Setup, gpus: int) -> float:
    """What one GPU sends (and receives) in a step of DDP: a ring."""
    return 2 * (gpus - 1) / gpus * GRADIENT * setup.parameters


def gather_scatter_bytes(setup: Setup, gpus: int) -> tuple[float, float]:
    """What one GPU sends (and receives) in a step of FSDP2: all-gathers, and the reduce-scatter of
    gradients.

    Blocks are gathered in forward and again in backward, the rest (stem, norm, classifier) once.
    """
    others = (gpus - 1) / gpus
    gathered = setup.parameters + setup.depth * setup.block_parameters
    return others * gathered * GATHERED, others * setup.parameters * GRADIENT


def link_rate(gpus: int) -> float:
    """Bytes/s at which a GPU's ring can run.

    Between nodes there are as many rings as GPUs in a node, each with a part of the data and a
    network card of its own: together they pass the border of a node at 8 times a card's rate.
    """
    return NVLINK if gpus <= NODE else min(NVLINK, NODE * NIC)


def overlap_seconds(setup: Setup, sharded: bool) -> float:
    """Computing time of one image at the peak rate, during which communication can run: DDP's in
    backward only."""
    flops = sum(backward_flops(setup).values())
    return (flops + sharded * sum(forward_flops(setup).values())) / PEAK


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_setup(rows: dict[str, list[str]]) -> str:
    return table(
        ["", *(setup.title for setup in SETUPS)], ([name, *cells] for name, cells in rows.items())
    )


def _number(value: float) -> str:
    """Three digits."""
    return (
        f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def model_table() -> str:
    """The four models."""
    rows = {
        "input": [f"{s.img_size} × {s.img_size} × {s.in_chans}" for s in SETUPS],
        "stem": [f"{s.stem}, stride {s.patch_size}" for s in SETUPS],
        "depth × C, heads": [f"{s.depth} × {s.embed_dim}, {s.num_heads}" for s in SETUPS],
        "tokens N": [f"{s.tokens:,}" for s in SETUPS],
        "window w²": [f"{s.window_size}² = {s.window_size**2}" for s in SETUPS],
        "routed keys K": [f"{s.keys:,}" for s in SETUPS],
        "heavy feed-forward tokens F": [f"{s.heavy:,}" for s in SETUPS],
        "parameters P, million (one block)": [
            f"{s.parameters / 1e6:.1f} ({s.block_parameters / 1e6:.2f})" for s in SETUPS
        ],
    }
    return _by_setup(rows)


def flops_table() -> str:
    """Forward + backward of one image by part."""
    parts = [{p: f + backward_flops(s)[p] for p, f in forward_flops(s).items()} for s in SETUPS]
    totals = [sum(part.values()) for part in parts]
    rows = {
        name: [f"{_number(p[name] / 1e9)} ({p[name] / t:.1%})" for p, t in zip(parts, totals)]
        for name in parts[0]
    }
    rows["all"] = [f"**{_number(total / 1e9)}**" for total in totals]
    rows["of these, forward"] = [_number(sum(forward_flops(s).values()) / 1e9) for s in SETUPS]
    rows["more with checkpointing"] = [_number(checkpointing_flops(s) / 1e9) for s in SETUPS]
    rows["with full attention"] = [
        f"{_number(full_attention_flops(s) / 1e9)} ({full_attention_flops(s) / t:.1f}×)"
        for s, t in zip(SETUPS, totals)
    ]
    rows["ms at the peak rate"] = [_number(1e3 * total / PEAK) for total in totals]
    moved = [2 * ACTIVATION * saved_elements(s) for s in SETUPS]
    rows["ms to write and read the saved activations once"] = [
        _number(1e3 * each / HBM) for each in moved
    ]
    return _by_setup(rows)


def memory_table() -> str:
    """Activations of one image; parameters, gradients and optimizer of one GPU."""
    gigabytes = {
        "activations of one image": [ACTIVATION * saved_elements(s) for s in SETUPS],
        "the same, checkpointing": [
            ACTIVATION * saved_elements(s, checkpointing=True) for s in SETUPS
        ],
        "parameters, gradients, AdamW: DDP": [state_bytes(s, 1, False) for s in SETUPS],
        **{
            f"parameters, gradients, AdamW: FSDP2, {n} GPUs": [
                state_bytes(s, n, True) for s in SETUPS
            ]
            for n in CLUSTERS
        },
    }
    return _by_setup({name: [_number(x / 1e9) for x in row] for name, row in gigabytes.items()})


def step_table() -> str:
    """One step on 8 and 64 GPUs."""
    # the columns
    head = [
        "model",
        "GPUs",
        "images a GPU",
        "ms at the peak rate",
        "memory FSDP2, GB",
        "with checkpointing",
    ]
    head += [
        "DDP sends, GB",
        "hidden from GB/s",
        "FSDP2 gathers + scatters, GB",
        "hidden from GB/s",
    ]
    head += [
        "DDP / FSDP2 hidden from images a GPU",
        "images/s, at most",
        "ImageNet-1k epoch, s, at least",
    ]

    rows = []
    for setup in SETUPS:
        flops = sum(forward_flops(setup).values()) + sum(backward_flops(setup).values())
        for gpus in CLUSTERS:
            # memory of a GPU
            images, state = setup.global_batch // gpus, state_bytes(setup, gpus, True)
            memory = [
                state + images * ACTIVATION * saved_elements(setup),
                state + images * ACTIVATION * saved_elements(setup, checkpointing=True),
            ]

            # what is sent, and how fast it must go to be hidden behind the step
            reduce, (gather, scatter) = (
                all_reduce_bytes(setup, gpus),
                gather_scatter_bytes(setup, gpus),
            )
            needs = [
                (reduce, overlap_seconds(setup, False)),
                (gather + scatter, overlap_seconds(setup, True)),
            ]
            rates = [sent / (images * seconds) / 1e9 for sent, seconds in needs]
            hidden = [_number(sent / seconds / link_rate(gpus)) for sent, seconds in needs]

            # a row
            cells = [setup.title, str(gpus), str(images), _number(1e3 * images * flops / PEAK)]
            cells += [_number(x / 1e9) if x < MEMORY else f"**{_number(x / 1e9)}**" for x in memory]
            cells += [_number(reduce / 1e9), _number(rates[0])]
            cells += [
                f"{_number(gather / 1e9)} + {_number(scatter / 1e9)}",
                _number(rates[1]),
                " / ".join(hidden),
            ]
            most = gpus * PEAK / flops
            cells += [_number(most), _number(IMAGENET / most) if setup.imagenet else "–"]
            rows.append(cells)
    return table(head, rows)


def rates_table() -> str:
    """The assumptions."""
    rows = [
        ["bfloat16, dense", f"{PEAK / 1e12:.0f} TFLOP/s"],
        ["HBM (H100; the H200 has more)", f"{MEMORY / 1e9:.0f} GB, {HBM / 1e12:.2f} TB/s"],
        [
            "NVLink, each direction (the data sheet adds both)",
            f"{NVLINK / 1e9:.0f} of {2 * NVLINK / 1e9:.0f} GB/s",
        ],
        ["InfiniBand, each GPU and direction", f"{NIC / 1e9:.0f} GB/s = {8 * NIC / 1e9:.0f} Gb/s"],
        [
            f"ring over nodes of {NODE}, {NODE} cards side by side",
            f"{link_rate(2 * NODE) / 1e9:.0f} GB/s",
        ],
    ]
    return table(["data sheet, H100 / H200 SXM", "rate"], rows)


def tables() -> str:
    """All that docs/scaling.md shows."""
    parts = {
        "Rates assumed": rates_table(),
        "Models": model_table(),
        "GFLOP of one image, forward + backward": flops_table(),
        "Memory, GB": memory_table(),
        "One step": step_table(),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__).parse_args()
    print(tables())
