"""Heads of one layer that lie in several processes, as Ulysses and tensor parallelism spread them.

Which keys are routed is asked of all heads together, so the processes add up what theirs say.

Ulysses gives a layer a part of the sequence in each process. Parts of all heads are exchanged for
the whole sequence of some heads, which attend, and back:

    (B, heads, own tokens, D) -> gather_tokens -> (B, own heads, tokens, D) -> return_tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

Group = distributed.ProcessGroup | None if distributed.is_available() else None


class Shards(NamedTuple):
    """Ulysses: how a sequence is cut among the processes of a group.

    Attributes:
        apart: what stands in front of the map was cut by itself. The whole sequence is then a part
            of that and a part of the rest, of each process in turn.
        uneven: parts may differ in length, by one token.
    """

    apart: bool
    uneven: bool


def over_heads(x: Tensor, group: Group = None) -> Tensor:
    """The sum of (B, heads, ...) over the heads of all processes.

    Args:
        group: of the processes; None: this one has all heads.
    """
    total = x.sum(1)
    if group is not None:
        distributed.all_reduce(total, group=group)
    return total


def all_heads(features: Tensor, channels: int, group: Group) -> Tensor:
    """(B, N, channels), the channels of all heads, in the order of the processes.

    Args:
        features: (B, N, C) of this process; the last process may have fewer.
    """
    if group is None:
        return features
    count, own = group.size(), features.shape[-1]
    most = max(own, (channels - own) // (count - 1))
    padded = nn.functional.pad(features, (0, most - own)).contiguous()
    parts = [torch.empty_like(padded) for _ in range(count)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat(parts, -1)[..., :channels]


def shard_order(first: int, rest: int, count: int, device: torch.device) -> Tensor:
    """(first + rest,), which token of a sequence each one is after :func:`gather_tokens`, if
    ``first`` tokens and ``rest`` behind them were cut among ``count`` processes by themselves."""
    place = torch.arange(first + rest, device=device)
    parts = (x.tensor_split(count) for x in (place[:first], place[first:]))
    return torch.cat([part for pair in zip(*parts) for part in pair])


def part_lengths(own: int, uneven: bool, group: Group, device: torch.device) -> list[int]:
    """Tokens of each process, this one's ``own``."""
    if not uneven:
        return [own] * group.size()
    lengths = torch.empty(group.size(), dtype=torch.long, device=device)
    parts = list(lengths.split(1))
    distributed.all_gather(parts, torch.tensor([own], device=device), group=group)
    return torch.cat(parts).tolist()


def gather_tokens(x: Tensor, lengths: list[int], group: Group) -> Tensor:
    """(B, heads, own tokens, D) to (B, own heads, tokens, D).

    Args:
        lengths: of the processes' parts.

    Raises:
        ValueError: if a process would get no head.
    """
    heads, count = x.shape[1], group.size()
    each = -(-heads // count)
    if each * (count - 1) >= heads:
        raise ValueError(f"heads: expected some for each of {count} processes, got {heads}")
    x = nn.functional.pad(x, (0, 0, 0, 0, 0, each * count - heads))
    rows = x.unflatten(1, (count, each)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    rows = _Exchange.apply(rows, [x.shape[2]] * count, lengths, group)
    return rows.permute(1, 2, 0, 3)[:, : heads - each * group.rank()]


@torch.compiler.disable
def return_tokens(x: Tensor, heads: int, lengths: list[int], group: Group) -> Tensor:
    """(B, own heads, tokens, D) to (B, heads, own tokens, D)."""
    own, count = lengths[group.rank()], group.size()
    x = nn.functional.pad(x, (0, 0, 0, 0, 0, -(-heads // count) - x.shape[1]))
    rows = _Exchange.apply(x.permute(2, 0, 1, 3), lengths, [own] * count, group)
    x = rows.unflatten(0, (count, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    return x[:, :heads]


def gather_mask(mask: Tensor, lengths: list[int], group: Group) -> Tensor:
    """(..., own keys) to (..., keys)."""
    padded = nn.functional.pad(mask, (0, max(lengths) - mask.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[..., :own] for part, own in zip(parts, lengths)], -1)


class _Exchange(torch.autograd.Function):
    """Rows for each process, ``given`` of them, against ``taken`` of each."""

    @staticmethod
    def forward(ctx, rows: Tensor, given: list[int], taken: list[int], group: Group) -> Tensor:
        ctx.back = taken, given, group
        out = rows.new_empty(sum(taken), *rows.shape[1:])
        distributed.all_to_all_single(out, rows.contiguous(), taken, given, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient, *ctx.back), None, None, None
