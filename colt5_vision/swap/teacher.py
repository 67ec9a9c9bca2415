"""What trains routers: full attention in place of the routed one, and what its outputs would lose
without each key."""

import torch
from torch import Tensor

from ..checks import TokenCount, token_count
from ..ops.autocast import without_autocast
from ..ops.dtypes import wide_dtype
from .full import full_attention
from .grouped import GROUPED, GroupedAttention, log_importance
from .heads import Group, over_heads
from .reroute import RoutedLayer
from .sampled import SampledAttention
from .sampling import inclusion_gates
from .tiles import group_of_token, tiles_of
from .volume import window_of_token
from .window import Grid, check_window, window_of_grid


def sampling_error(
    logits: Tensor, cost: Tensor, count: TokenCount, *, mask: Tensor | None = None
) -> Tensor:
    """(B,) expected squared error of the attention output when ``count`` keys are sampled by
    ``logits``, up to a factor.

    A key sampled with probability π_j and weighted 1/π_j adds a variance of
    ``(1/π_j - 1) · cost_j``, where ``cost_j`` is what a query's output loses without the key,
    squared and summed over queries (delta method of the ratio of sums).

    Args:
        logits, cost: (B, N).
        mask: (B, N) bool, True = valid.
    """
    slots = token_count("num_heavy_tokens_kv", count, logits.shape[-1])
    gates = inclusion_gates(logits, slots, mask).clamp_min(1e-12)
    return ((1 / gates - 1) * cost).sum(-1)


class Teacher:
    """Stands in for the routed attention of a layer: gives the full attention's output and trains
    the router on it."""

    def __init__(self, num_queries: int):
        self.num_queries = num_queries
        self.generator = torch.Generator()
        self.errors: dict[RoutedLayer, tuple[float, float]] = {}

    def __call__(
        self,
        layer: RoutedLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid_size: Grid,
        num_prefix_tokens: int,
        features: Tensor,
        key_mask: Tensor | None,
        pair_bias,
        scale: float | None,
        group: Group,
        window_size: int | tuple[int, ...] | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
        num_heavy_tokens_q: TokenCount | None = None,  # every query tells what it needs
    ) -> Tensor:
        attention = layer.attention
        window = attention.window_size if window_size is None else window_size
        window = window_of_grid(check_window("window_size", window), grid_size)
        count = (
            attention.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        )
        how = {"num_prefix_tokens": num_prefix_tokens, "pair_bias": pair_bias, "scale": scale}
        how |= {"key_mask": key_mask, "grid_size": grid_size, "window_size": window}

        # what full attention gives, and what some of its queries would lose without each key
        out = full_attention(q, k, v, **how)
        tokens = q.shape[2] - num_prefix_tokens
        rows = torch.randperm(tokens, generator=self.generator)[: self.num_queries].to(q.device)
        mask = None if key_mask is None else key_mask[:, num_prefix_tokens:]
        if mask is not None:  # what is not read has no gradient
            features = features.masked_fill(~mask.unsqueeze(-1), 0)
        ask = _ask_tiles if attention.router in GROUPED else _ask_map
        with torch.enable_grad(), without_autocast(q.device.type):
            asked = ask(attention, q, k, v, out, rows, features=features, group=group, **how)

            # the router's error, over that of the router as it began
            if mask is not None:
                mask = mask.repeat_interleave(asked[0].shape[1], 0)
            logits, correction, cost = (x.flatten(0, 1) for x in asked)
            error = sampling_error(logits + correction, cost, count, mask=mask).mean()
            reference = sampling_error(logits, cost, count, mask=mask).mean()
            (error / reference.clamp_min(1e-30)).backward()
        self.errors[layer] = (error.item(), reference.item())
        return out


def _ask_map(
    attention: SampledAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rows: Tensor,
    *,
    features: Tensor,
    group: Group,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    pair_bias,
    scale: float | None,
    grid_size: Grid,
    window_size: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a choice of keys for the whole map: logits, what training adds, and the cost of each key,
    all (B, 1, N).

    The cost is the sum of ``(p_ij |v_j - o_i|)²`` over sampled queries i outside key j's window.
    """
    how = {"num_prefix_tokens": num_prefix_tokens, "pair_bias": pair_bias, "scale": scale}
    how |= {"key_mask": key_mask}
    share, value, output = _attention_of(rows, q, k, v, out, **how)
    squares = value.square().sum(-1).unsqueeze(2) + output.square().sum(-1, keepdim=True)
    distance = (squares - 2 * output @ value.mT).clamp_min(0)

    # of keys outside the query's window alone
    window = window_of_token(grid_size, window_size, q.device)
    outside = window[rows].unsqueeze(-1) != window
    cost = over_heads((share.square() * distance * outside).sum(2), group)

    how |= {"grid_size": grid_size, "window_size": window_size}
    logits = attention.importance(q, k, v, **how, group=group)
    return tuple(x.unsqueeze(1) for x in (logits, attention.correct(features), cost))


def _ask_tiles(
    attention: GroupedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rows: Tensor,
    *,
    features: Tensor,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    scale: float | None,
    grid_size: Grid,
    window_size: tuple[int, ...],
    pair_bias: None,
    group: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a choice of keys for each tile, as :func:`_ask_map`: all (B, tiles, N).

    What a query loses, its probe loses too, and is corrected by that: the cost is the sum of
    ``|p_ij (v_j - o_i) - p_gj (v_j - o_g)|²`` over sampled queries i of the tile and their probes.
    """
    prefix, heads, dim = num_prefix_tokens, q.shape[1], q.shape[-1]
    how = {"num_prefix_tokens": prefix, "pair_bias": None, "scale": scale, "key_mask": key_mask}
    share, value, output = _attention_of(rows, q, k, v, out, **how)
    tiles = tiles_of(grid_size, window_size, q.device)
    with torch.no_grad():
        probes = attention.probe(q, k, v, tiles, grid_size, prefix, key_mask, scale)
        logits = log_importance(probes)

    # the queries' probes
    asked = group_of_token(probes.groups, value.shape[2])[:, rows]  # (B, Q)
    at = asked[:, None, :, None].expand(-1, heads, -1, -1)
    mean = probes.out.gather(2, at.expand(-1, -1, -1, dim))
    attended = torch.cat(probes.attention, 2)[..., prefix:]
    attended = attended.gather(2, at.expand(-1, -1, -1, value.shape[2]))
    if key_mask is not None:
        attended = attended.masked_fill(~key_mask[:, None, rows + prefix, None], 0)

    # (p_i - p_g) v - (p_i o_i - p_g o_g), squared
    both = share.square() * output.square().sum(-1, keepdim=True)
    both = both + attended.square() * mean.square().sum(-1, keepdim=True)
    both = both - 2 * share * attended * (output * mean).sum(-1, keepdim=True)
    apart, shift = share - attended, share * (output @ value.mT) - attended * (mean @ value.mT)
    square = value.square().sum(-1).unsqueeze(2)
    loss = (apart.square() * square - 2 * apart * shift + both).clamp_min(0).sum(1)  # (B, Q, N)

    # summed by tile
    tile = asked // (probes.groups.shape[1] // tiles.shape[0])
    cost = torch.zeros_like(logits).scatter_add(1, tile.unsqueeze(-1).expand_as(loss), loss)
    return logits, attention.correct(logits, tiles, grid_size, features), cost


def _attention_of(
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    num_prefix_tokens: int,
    pair_bias,
    scale: float | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What queries ``rows`` (Q,) of the map give its keys of their attention, (B, heads, Q, N), the
    values (B, heads, N, head_dim), and their outputs (B, heads, Q, head_dim); of masked tokens
    0."""
    # half precision overflows unscaled
    prefix, at, wide = num_prefix_tokens, rows + num_prefix_tokens, wide_dtype(q)
    query = q[:, :, at].to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = query @ k.to(wide).mT
    if pair_bias is not None:
        every = torch.arange(k.shape[2], device=q.device)
        bias = pair_bias(at.view(1, 1, 1, -1, 1), every.view(1, 1, 1, 1, -1))
        logits = logits + bias.squeeze(2)
    value, output = v[:, :, prefix:].to(wide), out[:, :, at].to(wide)
    if key_mask is None:
        return logits.softmax(-1)[..., prefix:], value, output

    # a masked token is not read, and asks for nothing
    off, silent = ~key_mask[:, None, None], ~key_mask[:, None, at, None]
    share = logits.masked_fill(off, torch.finfo(wide).min).softmax(-1)[..., prefix:]
    value = value.masked_fill(off[..., prefix:].mT, 0)
    return share.masked_fill(silent, 0), value, output.masked_fill(silent, 0)
