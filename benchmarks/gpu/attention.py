"""Window ∪ routed attention, attention of groups, and the whole layer, beside full attention,
FlexAttention and window attention alone."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from colt5_vision import ConditionalRoutedImageAttention
from colt5_vision.ops import grouped_attention, routed_window_attention
from colt5_vision.softmax_fusion import SoftmaxFusion
from colt5_vision.swap.tiles import tiles_of

from .measure import (
    PASSES,
    Map,
    Sizes,
    Timer,
    agreement,
    both,
    forward,
    kernels,
    on,
    row,
    rows,
)

# the backward recomputes the logits and has four more products
FLOPS = {"forward": 1.0, "forward + backward": 3.5}


def inputs(
    size: Map, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v and an output's gradient (B, heads, N, head_dim), laid out as a projection leaves
    them; routed (B, K)."""
    torch.manual_seed(0)
    shape = (size.batch, size.tokens, size.heads, size.head_dim)
    q, k, v, grad = (
        torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    count = max(1, size.tokens // size.share)
    routed = torch.rand(size.batch, size.tokens, device=device).topk(count).indices
    return [q, k, v], grad, routed


def pairs(size: Map, routed: Tensor) -> dict[str, int]:
    """Query-key pairs, over the batch: of full attention, of windows alone, and of windows ∪ routed
    keys."""
    token = torch.arange(size.tokens, device=routed.device)
    windows = -(-size.side // size.window)
    window_of = token // size.side // size.window * windows + token % size.side // size.window
    members = window_of.bincount(minlength=windows**2)
    inside = torch.stack([window_of[some].bincount(minlength=windows**2) for some in routed])
    window = int(members.square().sum()) * size.batch
    union = int((members * (members + routed.shape[1] - inside)).sum())
    return {"full": size.batch * size.tokens**2, "window": window, "union": union}


def ours(size: Map, routed: Tensor) -> Callable:
    def attend(q, k, v):
        options = {
            "grid_size": (size.side, size.side),
            "window_size": size.window,
            "routed_indices": routed,
        }
        return routed_window_attention(q, k, v, **options)

    return attend


def full(backend: SDPBackend) -> Callable:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return attend


def to_windows(x: Tensor, size: Map) -> Tensor:
    """(B, heads, N, D) -> (B, heads, rows of windows, columns of windows, window², D), a view as
    far as it goes."""
    count, window = size.side // size.window, size.window
    return x.unflatten(2, (count, window, count, window)).transpose(3, 4).flatten(4, 5)


def from_windows(x: Tensor, size: Map) -> Tensor:
    return x.unflatten(4, (size.window, size.window)).transpose(3, 4).flatten(2, 5)


def partitioned(size: Map) -> Callable:
    """Window attention alone, as it is usually written."""

    def attend(q, k, v):
        q, k, v = (to_windows(x, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for x in (q, k, v))
        out = full(SDPBackend.FLASH_ATTENTION)(q, k, v)
        count = size.side // size.window
        return from_windows(
            out.unflatten(0, (size.batch, count, count)).permute(0, 3, 1, 2, 4, 5), size
        )

    return attend


def attention(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    for size in sizes.maps:
        x, grad, routed = inputs(size, device, sizes.dtype)
        count = pairs(size, routed)
        peers = {
            "full, SDPA flash": (full(SDPBackend.FLASH_ATTENTION), count["full"]),
            "full, SDPA cuDNN": (full(SDPBackend.CUDNN_ATTENTION), count["full"]),
            "window alone, partition + SDPA flash": (partitioned(size), count["window"]),
        }
        label, mine = f"window ∪ routed attention, {size}", (ours(size, routed), count["union"])
        yield from _beside(label, mine, peers, x, grad, timer)


def grouped(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """Tiles of the map with keys of their own, as a swap with ``router="grouped"`` has them."""
    # tiles, and keys drawn for each
    size = sizes.maps[0]
    x, grad, _ = inputs(size, device, sizes.dtype)
    tiles = tiles_of((size.side, size.side), (size.window, size.window), device)[None, None]
    count = max(1, size.tokens // size.share)
    shape = (size.batch, 1, tiles.shape[2], size.tokens)
    keys = torch.rand(shape, device=device).topk(count).indices

    # beside full attention
    queries = size.batch * size.tokens
    mine = (lambda q, k, v: grouped_attention(q, k, v, tiles, keys)), queries * count
    peers = {"full, SDPA flash": (full(SDPBackend.FLASH_ATTENTION), queries * size.tokens)}
    yield from _beside(f"attention of {tiles.shape[2]} tiles, {size}", mine, peers, x, grad, timer)


def _beside(
    label: str,
    ours: tuple[Callable, int],
    peers: dict[str, tuple[Callable, int]],
    x: list[Tensor],
    grad: Tensor,
    timer: Timer,
) -> Iterator[dict]:
    """Ours by its kernels, by plain torch, and the peers: each a function of q, k, v and its
    query-key pairs."""
    # calls of all
    mine = kernels(grad.device)
    first, second = f"ours, {mine}", "ours, plain torch"
    backends = {first: mine, second: "eager"}  # the peers have none
    functions = dict.fromkeys(backends, ours) | peers
    calls = {
        name: both(function, x, grad, backend=backends.get(name))
        for name, (function, _) in functions.items()
    }

    # ours agree, then the times
    for what in PASSES:
        check = f"{label}, {what}: {mine} = plain torch"
        yield agreement(check, calls[first][what], calls[second][what], timer)
        found = timer.compare({name: lambda call=call[what]: call for name, call in calls.items()})
        per_pair = 4 * x[0].shape[1] * x[0].shape[3] * FLOPS[what]
        flops = {name: pairs * per_pair for name, (_, pairs) in functions.items()}
        yield from rows(label, what, found, first, flops)


def _flex(sizes: Sizes) -> Callable:
    # every shape is compiled for itself: dynamic shapes would be unfair to it
    return torch.compile(
        flex_attention.flex_attention, dynamic=False, backend=sizes.compile_backend
    )


def _block_mask(
    mask_mod: Callable, batch: int, queries: int, keys: int, device: torch.device, sizes: Sizes
):
    # compiled, as torch advises: uncompiled it holds all N² entries, several times
    make = torch.compile(
        flex_attention.create_block_mask, dynamic=False, backend=sizes.compile_backend
    )
    return make(mask_mod, batch, None, queries, keys, device=str(device))


def flex_raster(size: Map, routed: Tensor, sizes: Sizes) -> tuple[Callable, Callable]:
    """FlexAttention with the mask as it is defined, tokens in raster order: (how to make the block
    mask, attention)."""
    side, window = size.side, size.window
    is_routed = torch.zeros(
        size.batch, size.tokens, dtype=torch.bool, device=routed.device
    ).scatter(1, routed, True)

    def mask_mod(b, h, q, kv):
        rows_agree = q // side // window == kv // side // window
        columns_agree = q % side // window == kv % side // window
        return (rows_agree & columns_agree) | is_routed[b, kv]

    attend = _flex(sizes)
    return (
        lambda: _block_mask(mask_mod, size.batch, size.tokens, size.tokens, routed.device, sizes),
        lambda mask: lambda q, k, v: attend(q, k, v, block_mask=mask),
    )


def flex_windows(size: Map, routed: Tensor, sizes: Sizes) -> tuple[Callable, Callable]:
    """FlexAttention at its best: tokens put in window order and routed keys gathered behind them,
    so that blocks of the mask are dense. Putting in order and back is timed with it, as its user
    would pay for it."""
    # which keys of a window are routed, and stand behind already
    tokens, area = size.tokens, size.window**2
    is_routed = torch.zeros(size.batch, 1, tokens, 1, dtype=torch.bool, device=routed.device)
    is_routed = is_routed.scatter(2, routed[:, None, :, None], True)
    in_order = to_windows(is_routed, size).flatten(1)
    # as long as the keys: a mask is asked about gathered ones too
    hidden = torch.nn.functional.pad(in_order, (0, routed.shape[1]))

    def mask_mod(b, h, q, kv):
        return (kv >= tokens) | ((q // area == kv // area) & ~hidden[b, kv])

    # attention in that order
    compiled = _flex(sizes)
    index = routed[:, None, :, None].expand(-1, size.heads, -1, size.head_dim)
    count = size.side // size.window

    def keys(x: Tensor) -> Tensor:
        return torch.cat([to_windows(x, size).flatten(2, 4), x.gather(2, index)], 2)

    def attend(mask):
        def run(q, k, v):
            out = compiled(to_windows(q, size).flatten(2, 4), keys(k), keys(v), block_mask=mask)
            return from_windows(out.unflatten(2, (count, count, area)), size)

        return run

    length = tokens + routed.shape[1]
    return lambda: _block_mask(mask_mod, size.batch, tokens, length, routed.device, sizes), attend


def flex(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """In a step of its own: its compilation takes longer than all else."""
    mine = kernels(device)
    for size in sizes.maps:
        # past a few shapes dynamo would give up compiling, and flex would hold all logits
        torch.compiler.reset()
        x, grad, routed = inputs(size, device, sizes.dtype)
        label = f"window ∪ routed attention, {size}"
        peers = {
            "FlexAttention, raster order": flex_raster,
            "FlexAttention, window order": flex_windows,
        }

        # masks, made once
        attend = {f"ours, {mine}": ours(size, routed)}
        for name, prepare in peers.items():
            make_mask, with_mask = prepare(size, routed, sizes)
            # the mask hangs on the routed keys, so a layer would make it in every call
            mask_name = f"block mask for {name}"
            built = timer.compare({mask_name: lambda make=make_mask: make})
            yield {**row(label, "once per set of routed keys", built, mask_name), "failed": False}
            if not isinstance(built[mask_name], str):
                attend[name] = with_mask(make_mask())

        # the same results, then the times
        per_pair = 4 * size.heads * size.head_dim * pairs(size, routed)["union"]
        for name in list(attend)[1:]:
            # a peer with another result would be a peer of something else
            mine_now, theirs = (
                on(mine, forward(attend[f"ours, {mine}"], x)),
                forward(attend[name], x),
            )
            yield agreement(f"{label}: {name} gives the same", mine_now, theirs, timer)
        for what in PASSES:
            calls = {
                name: both(function, x, grad, backend=mine)[what]
                for name, function in attend.items()
            }
            found = timer.compare({name: lambda call=call: call for name, call in calls.items()})
            flops = dict.fromkeys(attend, per_pair * FLOPS[what])
            yield from rows(label, what, found, f"ours, {mine}", flops)


def routed_layer(
    size: Map, fusion: str, device: torch.device, dtype: torch.dtype
) -> ConditionalRoutedImageAttention:
    """Of a map's heads; ``sum`` routes queries too, as CoLT5 does."""
    width = {"dim_head": size.head_dim, "heads": size.heads}
    return ConditionalRoutedImageAttention(
        size.heads * size.head_dim,
        num_heavy_tokens_kv=1 / size.share,
        num_heavy_tokens_q=1 / size.share if fusion == "sum" else None,
        light_window_size=size.window,
        fusion=fusion,
        channel_first=False,
        device=device,
        dtype=dtype,
        **{
            f"{branch}_{key}": value
            for branch in ("light", "heavy")
            for key, value in width.items()
        },
    )


def dense_layer(layer: SoftmaxFusion, attend: Callable | None = None) -> Callable:
    """Full attention, or another one of q, k, v, with the norm and projections of a layer with
    ``fusion="softmax"``."""
    attend = attend or full(SDPBackend.FLASH_ATTENTION)

    def run(x):
        q, k, v = (
            layer.to_qkv(layer.norm(x.flatten(1, 2))).unflatten(-1, (3, layer.heads, -1)).unbind(2)
        )
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return layer.to_out(out.transpose(1, 2).flatten(2)).view_as(x)

    return run


def layer(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    # layers, and the dense one of the same weights
    mine, size = kernels(device), sizes.maps[0]
    torch.manual_seed(0)
    layers = {
        fusion: routed_layer(size, fusion, device, sizes.dtype) for fusion in ("softmax", "sum")
    }
    shape = (size.batch, size.side, size.side, size.heads * size.head_dim)
    x, grad = (torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
    dense, router = layers["softmax"].attend, layers["softmax"].attend.kv_router
    shared = tuple(p for name, p in dense.named_parameters() if "router" not in name)

    # the routing alone, with its gradient
    def log_weights(x):
        routing = router(
            x.flatten(1, 2), num_tokens=1 / size.share, grid_size=(size.side, size.side)
        )
        return routing.log_weights

    grad_log_weights = torch.randn_like(on(mine, log_weights)(x).detach())

    # calls of all
    calls = {
        f"layer, fusion {name}": both(f, [x], grad, tuple(f.parameters()), mine)
        for name, f in layers.items()
    }
    calls["dense layer, SDPA flash"] = both(dense_layer(dense), [x], grad, shared)
    calls["routing alone"] = both(
        log_weights, [x], grad_log_weights, tuple(router.parameters()), mine
    )

    # the layers against the dense one, the routing against the layer
    for what in PASSES:
        found = timer.compare({name: lambda call=call[what]: call for name, call in calls.items()})
        for name in ("softmax", "sum"):
            yield row(
                f"whole layer, {size}",
                what,
                found,
                f"layer, fusion {name}",
                "dense layer, SDPA flash",
            )
        yield row(
            f"routing in the layer, {size}", what, found, "routing alone", "layer, fusion softmax"
        )


def ceilings(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """What this very GPU reaches: a large copy, and a large matrix product on random data."""
    n = max(sizes.maps[0].tokens // 8, 64)
    a, b = (torch.randn(n, n, device=device, dtype=sizes.dtype) for _ in range(2))
    source = torch.randn(4 * n * n, device=device)
    target = torch.empty_like(source)
    calls = {"matrix product": lambda: lambda: a @ b, "copy": lambda: lambda: target.copy_(source)}
    found = timer.compare(calls)
    yield row(
        f"matrix product of {n} x {n}",
        str(sizes.dtype),
        found,
        "matrix product",
        flops={"matrix product": 2 * n**3},
    )
    record = row(f"copy of {source.nbytes / 2**30:.1f} GiB", "read and written", found, "copy")
    if record["ours_timing"]:
        record["bytes_per_s"] = 2 * source.nbytes / record["ours_timing"]["median_ms"] * 1e3
    yield record
