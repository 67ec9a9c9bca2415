"""Gates, selection and router logits beside plain torch, ``torch.topk`` and the predecessor's
Triton kernel."""

import importlib
from collections.abc import Callable, Iterator

import torch

from colt5_vision.ops import (
    coordinate_descent,
    gather_normalize,
    join,
    route_topk,
    router_logits,
    soft_topk,
)
from colt5_vision.routing import Routing

from .measure import (
    PASSES,
    Sizes,
    Timer,
    agreement,
    attempt,
    both,
    check,
    forward,
    kernels,
    on,
    row,
    rows,
    using,
)


def predecessor(k: int, n_iters: int, training: bool) -> Callable:
    """A call of colt5_attention's kernel, at its best: one segment where nothing is trained, its
    router's own ``n_iters // 5`` where a backward follows (three times as fast there, says its
    author)."""
    kernel = importlib.import_module(
        "colt5_attention.triton_coor_descent"
    )  # may be missing: a row says so
    segments = max(1, n_iters // 5) if training else 1
    return lambda s: kernel.triton_coor_descent(
        s, n_iters=n_iters, k=k, eps=1.0, checkpoint_segments=segments
    )


def gates(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    mine = kernels(device)
    for count, n in sizes.gates:
        torch.manual_seed(0)
        scores, grad = (torch.randn(count, n, device=device) for _ in range(2))
        k = max(1, n // 16)

        # ours, by kernels and in plain torch
        operators = {"soft_topk": lambda s, k=k: soft_topk(s, k)}
        for steps in (20, 50):
            operators[f"coordinate_descent, {steps} iterations"] = lambda s, k=k, steps=steps: (
                coordinate_descent(s, k, n_iters=steps)
            )
        calls = {}
        for name, operator in operators.items():
            for backend, label in ((mine, name), ("eager", f"{name}, plain torch")):
                calls[label] = both(operator, [scores], grad, backend=backend)

        for what in PASSES:
            # they agree
            for name in operators:
                label = f"{name}, {count} x {n}, {what}: {mine} = plain torch"
                plain = calls[f"{name}, plain torch"][what]
                yield agreement(label, calls[name][what], plain, timer, tolerance=1e-3)

            # beside the predecessor's
            makers = {name: lambda call=call[what]: call for name, call in calls.items()}
            for steps in (20, 50):

                def make(steps=steps, what=what, k=k, scores=scores, grad=grad):
                    return both(predecessor(k, steps, what != PASSES[0]), [scores], grad)[what]

                makers[f"colt5_attention's kernel, {steps} iterations"] = make
            found = timer.compare(makers)

            # the times
            label = f"gates, {count} x {n}, k = {k}"
            for peer in (
                "soft_topk, plain torch",
                *(f"colt5_attention's kernel, {t} iterations" for t in (20, 50)),
            ):
                yield row(label, what, found, "soft_topk", peer)
            for steps in (20, 50):
                name = f"coordinate_descent, {steps} iterations"
                yield row(label, what, found, name, f"{name}, plain torch")
                yield row(label, what, found, name, f"colt5_attention's kernel, {steps} iterations")


def same_selection(n: int, k: int, mine: str, scores: torch.Tensor) -> dict:
    def compare():
        found, expected = on(mine, route_topk)(scores, k), on("eager", route_topk)(scores, k)
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    same, why = attempt(compare)
    return check(
        f"route_topk, n = {n}, k = {k}: {mine} = plain torch",
        bool(same),
        why or "indices and order",
    )


def selection(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    mine = kernels(device)
    # many sizes
    for n in sizes.selection:
        torch.manual_seed(0)
        scores, k = torch.randn(1, n, device=device), max(1, min(n // 16, sizes.most_selected))
        yield same_selection(n, k, mine, scores)

        calls = {
            f"route_topk, {mine}": on(mine, lambda s, k=k: route_topk(s, k)),
            "route_topk, plain torch": on("eager", lambda s, k=k: route_topk(s, k)),
            "torch.topk": lambda s, k=k: s.topk(k),
        }
        found = timer.compare(
            {name: lambda f=f, s=scores: forward(f, [s]) for name, f in calls.items()}
        )
        yield from rows(f"selection, n = {n}, k = {k}", PASSES[0], found, f"route_topk, {mine}")

    # one that is over before it can be timed
    n, k = sizes.latency, max(1, sizes.latency // 16)
    scores = torch.randn(1, n, device=device)
    ours = forward(lambda s: route_topk(s, k), [scores])
    peer = forward(lambda s: s.topk(k), [scores])
    makers = {
        "route_topk, launched": lambda: ours,
        "route_topk, graph replayed": lambda: timer.capture(ours)[0],
        "torch.topk, launched": lambda: peer,
        "torch.topk, graph replayed": lambda: timer.capture(peer)[0],
    }

    # logits come fresh from the router, so the L2 stays as it is; many in a row, for one is too
    # short to time
    with using(mine):  # once and for all: a call takes no longer than setting it
        found = timer.compare(makers, calls=20, flush=False)
    for how in ("launched", "graph replayed"):
        yield row(
            f"logits to indices, 1 x {n}, k = {k}",
            how,
            found,
            f"route_topk, {how}",
            f"torch.topk, {how}",
        )


def router(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """What touches the tokens around attention: router logits, and routed rows gathered, normalised
    and added back."""
    mine, size = kernels(device), sizes.maps[0]
    torch.manual_seed(0)
    tokens, dim, count = size.tokens, size.heads * size.head_dim, max(1, size.tokens // size.share)

    # tokens and their gradients
    def random(*shape: int, dtype: torch.dtype = sizes.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, token, weight, rows_back = (
        random(1, tokens, dim),
        random(1, dim),
        random(dim),
        random(1, count, dim),
    )
    gate, indices = random(1, count), torch.rand(1, tokens, device=device).topk(count).indices
    filled, grad = torch.ones_like(indices, dtype=torch.bool), random(1, tokens, dim)

    # the operators
    cases = {
        "router_logits": (router_logits, [x, token], random(1, 1, tokens, dtype=torch.float32)),
        "gather_normalize": (
            lambda x, w: gather_normalize(x, indices, w),
            [x, weight],
            random(1, count, dim),
        ),
        "join": (
            lambda x, r, g, null: join(x, r, Routing(indices, g, g, filled), null),
            [x, rows_back, gate, weight],
            grad,
        ),
    }

    # ours agree, then the times
    for name, (function, inputs, gradient) in cases.items():
        label = f"{name}, (1, {tokens}, {dim}), {count} routed"
        ours, plain = (
            both(function, inputs, gradient, backend=backend) for backend in (mine, "eager")
        )
        for what in PASSES:
            each = [call[what] for call in (ours, plain)]
            yield agreement(f"{label}, {what}: {mine} = plain torch", *each, timer)
            calls = {f"ours, {mine}": ours[what], "plain torch": plain[what]}
            found = timer.compare({key: lambda call=call: call for key, call in calls.items()})
            yield from rows(label, what, found, f"ours, {mine}")
