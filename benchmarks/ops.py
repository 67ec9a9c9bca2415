"""Speed of the operators on the CPU beside their peers, ratios from one run: ``python -m benchmarks.ops``.

Median of interleaved repeats; the gates on one thread (8 rows of 65,536 logits, k = 1152), attention on all.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from colt5_attention.coor_descent import coor_descent
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision.ops import (
    coordinate_descent,
    route_topk,
    routed_window_attention,
    soft_topk,
)
from examples.measure import medians


def gates(repeats: int) -> list[tuple[str, str, str, float, float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores = torch.randn(8, 65536, requires_grad=True)
    grad, k = torch.randn(8, 65536), 1152

    def both(function):
        return lambda: torch.autograd.grad(function(scores), scores, grad)

    train = medians(
        {
            "peer": both(lambda s: coor_descent(s, k=k, n_iters=50, eps=1.0)),
            "soft_topk": both(lambda s: soft_topk(s, k)),
            "coordinate_descent": both(lambda s: coordinate_descent(s, k, n_iters=50)),
        },
        repeats,
        warm_up=True,
    )
    with torch.no_grad():
        infer = medians(
            {"topk": lambda: scores.topk(k), "route_topk": lambda: route_topk(scores, k)}, 5 * repeats, True
        )
    torch.set_num_threads(threads)
    what, peer = "gates, forward + backward", "colt5_attention.coor_descent, 50 iterations"
    return [
        ("soft_topk (exact)", what, peer, train["soft_topk"], train["peer"]),
        ("coordinate_descent, 50 iterations", what, peer, train["coordinate_descent"], train["peer"]),
        ("route_topk", "selection", "torch.topk", infer["route_topk"], infer["topk"]),
    ]


def attention(side: int, share: int, window: int, repeats: int) -> list[tuple[str, str, str, float, float]]:
    torch.manual_seed(0)
    tokens = side * side
    q, k, v = (x.transpose(1, 2) for x in torch.randn(3, 1, tokens, 6, 64).unbind(0))
    routed, weights = torch.randperm(tokens)[None, : tokens // share], torch.zeros(1, tokens // share)
    call = {"grid_size": (side, side), "window_size": window, "routed_indices": routed, "log_weights": weights}
    leaves, grad = [x.detach().clone().requires_grad_() for x in (q, k, v)], torch.randn(1, 6, tokens, 64)
    rows = []
    for what, run in (
        ("forward", lambda f: f(q, k, v)),
        ("forward + backward", lambda f: torch.autograd.grad(f(*leaves), leaves, grad)),
    ):
        calls = {
            "full": lambda run=run: run(scaled_dot_product_attention),
            "routed": lambda run=run: run(lambda *x: routed_window_attention(*x, **call)),
        }
        times = medians(calls, repeats, warm_up=True)
        name = f"routed_window_attention, {side}x{side} tokens, 6 x 64, window {window}, keys 1/{share}"
        rows.append((name, what, "full SDPA", times["routed"], times["full"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = [*gates(args.repeats), *attention(64, 16, 16, args.repeats), *attention(109, 16, 14, args.repeats)]
    lines = ["| ours | what | peer | ours, ms | peer, ms | ratio |", "|---|---|---|---|---|---|"]
    lines += [f"| {n} | {w} | {p} | {o * 1e3:.1f} | {t * 1e3:.1f} | {t / o:.1f}x |" for n, w, p, o, t in rows]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, not run on a GPU"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ops_cpu.md").write_text(f"# Operators on the CPU\n\n{machine}\n\n" + "\n".join(lines) + "\n")
    keys = ("ours", "what", "peer", "ours_s", "peer_s")
    record = {"machine": machine, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
    (args.output / "ops_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(machine, *lines, sep="\n")


if __name__ == "__main__":
    main()
