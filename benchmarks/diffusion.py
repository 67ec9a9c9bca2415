"""Speed of self-attention at Stable Diffusion 1.5's shapes beside its peers:
``python -m benchmarks.diffusion``.

The whole layer with its projections (attn1: 320 channels, 8 heads x 40), batch 2 as with
classifier-free guidance, random weights, one thread. Ratios to full attention from one run, median
of interleaved repeats; quality is in ``examples/distill_diffusion.py``.
"""

import argparse
import json
import platform
from pathlib import Path

import tomesd
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from colt5_vision import RoutedAttentionConfig
from colt5_vision.pipelines import RoutedAttnProcessor
from support.measure import medians
from support.peers import ReplaceAttention, subsampled_keys

CHANNELS, HEADS, BATCH = 320, 8, 2


def layer(side: int, config: RoutedAttentionConfig | None = None):
    """A call of attn1 on (B, N, C), with full attention or routed."""
    torch.manual_seed(0)
    attn = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).eval()
    if config is not None:
        attn.set_processor(RoutedAttnProcessor(config, grid_size=(side, side)))
    return attn


def merged(side: int, ratio: float):
    """tomesd: a part of the tokens is merged before the layer and copied back after it."""
    attn, generator = layer(side), torch.Generator().manual_seed(0)

    def call(x: Tensor) -> Tensor:
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            x, side, side, 2, 2, int(x.shape[1] * ratio), generator=generator
        )
        return unmerge(attn(merge(x)))

    return call


def fewer_keys(side: int):
    attn = layer(side)

    def call(x: Tensor) -> Tensor:
        with ReplaceAttention(subsampled_keys, (side, side), 0, 1 / 4):
            return attn(x)

    return call


def compare(side: int, repeats: int) -> dict[str, float]:
    x = torch.randn(BATCH, side * side, CHANNELS, generator=torch.Generator().manual_seed(1))
    routed = RoutedAttentionConfig(min_tokens=1)
    calls = {"full SDPA": layer(side), "routed, window 16, keys 1/16": layer(side, routed)}
    calls["routed, window 16, keys 1/8"] = layer(
        side, RoutedAttentionConfig(min_tokens=1, num_heavy_tokens_kv=1 / 8)
    )
    calls |= {f"tomesd {ratio:.0%} merged": merged(side, ratio) for ratio in (0.5, 0.75)}
    calls["ToDo, keys subsampled 2 x 2"] = fewer_keys(side)
    tiles = RoutedAttentionConfig(router="window", window_size=32, min_tokens=1)
    calls["tiles of 32 x 32, no global view"] = layer(side, tiles)
    with torch.inference_mode():
        full, every = (
            calls["full SDPA"](x),
            layer(side, RoutedAttentionConfig(min_tokens=1, num_heavy_tokens_kv=1.0)),
        )
        torch.testing.assert_close(every(x), full, rtol=1e-3, atol=1e-4)
        return medians(
            {name: (lambda call=call: call(x)) for name, call in calls.items()},
            repeats,
            warm_up=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diffusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="of the latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()

    # measure
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = {}
    for side in args.sides:
        found[side] = compare(side, args.repeats)

    # write
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}, not run on a GPU"
    lines = ["# Self-attention at Stable Diffusion 1.5's shapes", "", machine, ""]
    lines.append(
        "| attn1, batch 2, 8 heads x 40 | " + " | ".join(f"{s} x {s} latents" for s in found) + " |"
    )
    lines.append("|---|" + "---|" * len(found))
    for name in next(iter(found.values())):
        cells = [f"{t[name]:.3f} s ({t['full SDPA'] / t[name]:.1f}x)" for t in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (args.output / "diffusion.md").write_text("\n".join(lines) + "\n")
    (args.output / "diffusion.json").write_text(
        json.dumps({"machine": machine, "seconds": found}, indent=1) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
