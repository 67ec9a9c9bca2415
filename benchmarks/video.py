"""Attention of a video at Wan's shape, routed and full:

    python -m benchmarks.video                  # 21 x 45 x 80 tokens, 12 heads x 128: ten minutes
    python -m benchmarks.video --heads 1        # one

One call of each on the same random q, k, v, on all cores. The values do not matter for the time.
That routed attention with every key is full attention is checked first, on a small volume.
"""

import argparse
import platform
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision.swap.sampled import SampledAttention
from support.measure import medians, table

WINDOWS = ((1, 16, 16), (3, 8, 8))


def inputs(grid: tuple[int, ...], heads: int, head_dim: int) -> list[torch.Tensor]:
    """Random q, k, v (1, heads, T * H * W, head_dim)."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, grid[0] * grid[1] * grid[2], head_dim)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def routed(grid: tuple[int, ...], window: tuple[int, ...], keys: float, qkv: list[torch.Tensor]):
    """A call of routed attention."""
    attention = SampledAttention(window_size=window, num_heavy_tokens_kv=keys)
    return lambda: attention(*qkv, grid_size=grid)


def check() -> None:
    """With every key routed it is full attention."""
    grid = (3, 5, 7)
    qkv = inputs(grid, 2, 16)
    expected = scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(routed(grid, (2, 3, 3), 1.0, qkv)(), expected, rtol=1e-4, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grid", type=int, nargs=3, default=[21, 45, 80], help="T H W in tokens")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--share", type=float, default=1 / 16, help="keys routed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    grid = tuple(args.grid)

    # full attention, and routed with every window
    with torch.inference_mode():
        check()
        qkv = inputs(grid, args.heads, args.head_dim)
        calls = {"full SDPA": lambda: scaled_dot_product_attention(*qkv)}
        for window in WINDOWS:
            name = "windows of " + " x ".join(str(side) for side in window)
            calls[name] = routed(grid, window, args.share, qkv)
        seconds = medians(calls, args.repeats)

    # the table
    full = seconds["full SDPA"]
    rows = [[name, f"{taken:.3g}", f"{full / taken:.3g}"] for name, taken in seconds.items()]
    shape = f"{' x '.join(map(str, grid))} tokens, {args.heads} heads x {args.head_dim}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    keys = f"Routed keys: {args.share:.4g} of the tokens, routing included."
    lines = [
        f"# Attention of a video: {shape}",
        "",
        f"{machine}, float32, not run on a GPU. {keys}",
    ]
    lines += ["", *table(["attention", "seconds", "times as fast as full"], rows)]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "video.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
