"""One choice at a time: which settings of the routed attention are worth having, and so are its
defaults.

    python -m benchmarks.ablations             # 18 settings x 2 seeds, 600 steps
    python -m benchmarks.ablations --resume    # go on after an interruption, or add seeds
    python -m benchmarks.ablations --gates     # the gates alone: seconds
    python -m benchmarks.ablations --quick     # see that it runs

Costs: an hour on two CPU cores. Leaves in --output: ``ablations_cpu.json`` and ``.md``.

Two tables. The gates: how far their sum is from k and their gradient from that of the exact gates
in float64, for exact gates and for 20 and 50 iterations. Accuracy: the task of
``benchmarks.needle``, routed attention of ``sum`` with 1/8 of the keys, each row different in what
it says. Keys of pretrained networks, how many of them heavy, sampled or pooled, are rows of
``python -m benchmarks.training_free``.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.needle import SETTINGS, parse, parser_of, records_of
from benchmarks.needle_model import Variant
from benchmarks.needle_report import (
    about,
    accuracy_table,
    by_variant,
    machine,
    summarize,
)
from colt5_vision.ops import coordinate_descent, soft_topk
from colt5_vision.store import save_atomically
from support.command_line import exit_status
from support.measure import table

_BASE = Variant("sum", "learned", "eighth")
_STRAIGHT = {"router_straight_through": True}


def _router(**options) -> dict:
    return {"router_kwargs": options}


ABLATIONS = {
    "default: sum, 1/8 of the keys, every token a query": _BASE,
    "softmax": _BASE._replace(kind="softmax"),
    "eps 0.1": _BASE._replace(options=_router(eps=0.1)),
    "eps 0.3": _BASE._replace(options=_router(eps=0.3)),
    "eps 3": _BASE._replace(options=_router(eps=3.0)),
    "20 iterations, eps 1": _BASE._replace(options=_router(n_iters=20)),
    "50 iterations, eps 0.1": _BASE._replace(options=_router(n_iters=50, eps=0.1)),
    "straight-through gates, gradient of their logarithm": _BASE._replace(options=_STRAIGHT),
    "straight-through gates, gradient of the gates": _BASE._replace(
        options=_STRAIGHT | _router(log_gradient=False)
    ),
    "light branch at full scale at first": _BASE._replace(light_gain=5.0),
    "window 4": _BASE._replace(window=4),
    "window 16": _BASE._replace(window=16),
    "a route for each head": _BASE._replace(options={"num_routed_kv": 2}),
    "RoPE": _BASE._replace(options={"rotary_emb": True}),
    "1/4 of the tokens queries": _BASE._replace(queries=0.25),
    "1/4 of the tokens queries, soft gates": _BASE._replace(
        queries=0.25, options={"router_straight_through": False}
    ),
    "1/4 of the tokens queries, no null token": _BASE._replace(
        queries=0.25, options={"use_null_q_tokens": False}
    ),
    "1/8 of the keys from the start": _BASE._replace(wide=False),
}


def gates() -> list[dict]:
    """Errors of the gates and their gradient on 8 rows of normal logits, n tokens, k of them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, k in ((576, 72), (576, 4), (65536, 1024)):
        logits = torch.randn(8, n, generator=generator)
        weight = torch.rand(8, n, generator=generator)
        for eps in (1.0, 0.3, 0.1, 0.03):
            methods = {"exact": soft_topk}
            for count in (20, 50):
                methods[f"{count} iterations"] = lambda s, k, count=count, **how: (
                    coordinate_descent(s, k, n_iters=count, **how)
                )
            _, want = _gradient(soft_topk, logits.double(), weight.double(), k, eps)
            for name, method in methods.items():
                soft, grad = _gradient(method, logits, weight, k, eps)
                error = (grad - want).norm() / want.norm()
                rows.append({"n": n, "k": k, "eps": eps, "gates": name})
                rows[-1] |= {
                    "sum": (soft.double().sum(-1) / k).mean().item(),
                    "gradient_error": error.item(),
                }
    return rows


def _gradient(method, logits: torch.Tensor, weight: torch.Tensor, k: int, eps: float):
    logits = logits.clone().requires_grad_()
    soft = method(logits, k, eps=eps)
    return soft.detach(), torch.autograd.grad((soft * weight).sum(), logits)[0]


def study(args: argparse.Namespace) -> None:
    stem = Path(args.output) / "ablations_cpu"
    measured = gates()
    header = [
        "n",
        "k",
        "eps",
        "gates",
        "sum of the gates over k",
        "error of the gradient over its norm",
    ]
    cells = [
        [g["n"], g["k"], g["eps"], g["gates"], f"{g['sum']:.6f}", f"{g['gradient_error']:.1e}"]
        for g in measured
    ]

    # the gates
    lines = table(header, cells)
    if args.gates:
        print(*lines, sep="\n")
        return

    # the trainings, written as they end
    for records in records_of(ABLATIONS, args, stem.with_suffix(".json")):
        if not records:
            continue
        groups, first = by_variant(records, list(ABLATIONS)), records[0]
        summary, runs = summarize(groups), [run for group in groups.values() for run in group]

        # the record, and the same for people
        whole = {
            "machine": machine(),
            **{name: first[name] for name in SETTINGS if name != "widest"},
        }
        whole |= {"gates": measured, "summary": summary, "runs": runs}
        text = [
            "# One choice at a time\n",
            "## Accuracy\n",
            about(runs),
            *accuracy_table(summary, first["tokens"]),
        ]
        text += ["", "## Gates\n", "Normal logits, 8 rows, float32, on the CPU.\n", *lines, ""]

        save_atomically(
            stem.with_suffix(".json"),
            lambda part, whole=whole: part.write_text(json.dumps(whole, indent=1) + "\n"),
        )
        save_atomically(
            stem.with_suffix(".md"), lambda part, text=text: part.write_text("\n".join(text))
        )
    print(f"wrote {stem}.json, .md")


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, ABLATIONS, "ablations")
    parser.add_argument("--gates", action="store_true", help="only the table of the gates, printed")
    parser.set_defaults(seeds=[0, 1], steps=600)
    return exit_status(study, parse(parser, argv), argv)


if __name__ == "__main__":
    sys.exit(main())
