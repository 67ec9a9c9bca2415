"""Every operator forward and backward at odd sizes, small: for compute-sanitizer and
``torch.library.opcheck``.

``python -m benchmarks.gpu.every_operator`` runs them on the GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from colt5_vision import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention
from colt5_vision.ops import (
    PooledKeys,
    coordinate_descent,
    gather_normalize,
    grouped_attention,
    join,
    route_topk,
    routed_window_attention,
    router_logits,
    soft_topk,
    window_attention,
)
from colt5_vision.routing import Routing

from .measure import kernels, using


def _attention_case(device: torch.device, dtype: torch.dtype, head_dim: int):
    height, width, prefix, batch, heads = 7, 9, 3, 2, 4
    shape = (batch, heads, prefix + height * width, head_dim)
    x = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    routed = torch.rand(batch, 2, height * width, device=device).topk(11).indices
    routed[0, 1, 4:] = -1  # empty slots
    weights = torch.randn(routed.shape, device=device).clamp(max=0).requires_grad_()
    mask = torch.rand(batch, height * width, device=device) > 0.2
    options = {
        "grid_size": (height, width),
        "window_size": (4, 5),
        "key_mask": mask,
        "num_prefix_tokens": prefix,
    }
    return x, routed, weights, options


def _gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def _grouped_call(x: list[Tensor], mask: Tensor) -> Callable[[], list[Tensor]]:
    """Of 63 tokens behind 3 others: 8 groups, the last with an empty place; their own keys, and 2
    pooled ones."""
    # groups and their keys
    batch, heads, _, head_dim = x[0].shape
    token = torch.arange(64, device=mask.device)
    groups = torch.where(token < 63, token, -1).view(1, 1, 8, 8).expand(batch, -1, -1, -1)
    keys = torch.rand(batch, 1, 8, 63, device=mask.device).topk(5).indices

    # weights and pooled keys, which get gradients
    weights, mass = (
        torch.randn(shape, device=mask.device, requires_grad=True)
        for shape in (keys.shape, (batch, heads, 8, 2))
    )
    pooled = [
        torch.randn(
            batch, heads, 8, 2, head_dim, device=mask.device, dtype=x[0].dtype
        ).requires_grad_()
        for _ in range(2)
    ]

    def call():
        out = grouped_attention(
            *x,
            groups,
            keys,
            PooledKeys(*pooled, mass),
            log_weights=weights,
            key_mask=mask,
            num_prefix_tokens=3,
        )
        return _gradients(out, [*x, weights, *pooled, mass])

    return call


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Calls that return every output and gradient."""
    torch.manual_seed(0)

    # gates and selection
    scores = torch.randn(3, 77, device=device, requires_grad=True)
    wide = torch.randn(2, 5003, device=device, requires_grad=True)
    valid = torch.rand(3, 77, device=device) > 0.3
    some = torch.tensor([3.5, 9.0, 1.25], device=device, requires_grad=True)
    found = {
        "soft_topk": lambda: _gradients(soft_topk(scores, 5.5, eps=0.3, mask=valid), [scores]),
        "soft_topk, wide": lambda: _gradients(soft_topk(wide, 301), [wide]),
        "soft_topk, k per row": lambda: _gradients(soft_topk(scores, some), [scores, some]),
        "coordinate_descent": lambda: _gradients(
            coordinate_descent(
                scores, 5, n_iters=7, eps=0.1, eps_init=4.0, eps_decay=0.7, mask=valid
            ),
            [scores],
        ),
        "coordinate_descent, wide": lambda: _gradients(
            coordinate_descent(wide, 301, n_iters=5), [wide]
        ),
        "route_topk": lambda: list(route_topk(scores, 13, mask=valid)),
        "route_topk, wide": lambda: list(route_topk(wide, 601)),
    }

    # attention
    for head_dim in (40, 64):
        x, routed, weights, options = _attention_case(device, dtype, head_dim)
        queries = torch.rand(2, 63, device=device).topk(17).indices

        def routed_call(x=x, routed=routed, weights=weights, options=options, **more):
            out = routed_window_attention(
                *x, routed_indices=routed, log_weights=weights, **options, **more
            )
            return _gradients(out, [*x, weights])

        found[f"routed_window_attention, {head_dim}"] = routed_call
        found[f"routed_window_attention, {head_dim}, some queries"] = (
            lambda f=routed_call, i=queries: f(query_indices=i)
        )
        found[f"routed_window_attention, {head_dim}, weights elsewhere"] = lambda f=routed_call: f(
            weight_own_window=False
        )
        found[f"window_attention, {head_dim}"] = lambda x=x, options=options: _gradients(
            window_attention(*x, **options), x
        )
        found[f"grouped_attention, {head_dim}"] = _grouped_call(x, mask=options["key_mask"])

    # what touches the tokens around it
    tokens = torch.randn(2, 63, 24, device=device, dtype=dtype, requires_grad=True)
    chosen = torch.rand(2, 2, 63, device=device).topk(11).indices
    routing, weight = (
        torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 24), (24,))
    )
    weight = weight.detach().to(dtype).requires_grad_()
    parts = [
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        for shape in ((2, 11, 24), (2, 11), (24,))
    ]

    found["router_logits"] = lambda: _gradients(router_logits(tokens, routing), [tokens, routing])
    found["gather_normalize"] = lambda: _gradients(
        gather_normalize(tokens, chosen, weight), [tokens, weight]
    )
    filled = torch.ones(2, 11, dtype=torch.bool, device=device)
    found["join"] = lambda: _gradients(
        join(tokens, parts[0], Routing(chosen[:, 0], parts[1], parts[1], filled), parts[2]),
        [tokens, *parts],
    )

    # layers
    image = torch.randn(2, 7, 9, 24, device=device, dtype=dtype, requires_grad=True)
    settings = {"channel_first": False, "device": device, "dtype": dtype}
    width = {
        "light_dim_head": 16,
        "light_heads": 2,
        "heavy_dim_head": 16,
        "heavy_heads": 2,
        "light_window_size": 4,
    }
    for fusion in ("sum", "softmax"):
        layer = ConditionalRoutedImageAttention(
            24, num_heavy_tokens_q=9, num_heavy_tokens_kv=11, fusion=fusion, **width, **settings
        )
        found[f"layer, fusion {fusion}"] = lambda layer=layer: _gradients(layer(image), [image])
    feed_forward = ConditionalRoutedFeedForward(24, num_heavy_tokens=11, **settings)
    found["feed-forward"] = lambda: _gradients(feed_forward(image), [image])
    return found


def main(kind: str = "cuda") -> None:
    device = torch.device(kind)
    with using(kernels(device)):
        for name, call in cases(device, torch.bfloat16).items():
            outputs = call()
            torch.cuda.synchronize()
            bad = [
                i for i, x in enumerate(outputs) if x.is_floating_point() and not x.isfinite().all()
            ]
            print(f"{name}: " + (f"outputs {bad} are not finite" if bad else "ran"), flush=True)
            if bad:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
