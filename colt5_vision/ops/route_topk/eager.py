"""Hard top-k selection with a total order, in plain torch."""

import torch
from torch import Tensor

from ..._torch_internals import has_values, in_onnx_export, is_transformed
from ..grid import cell_slots, slot_of_token


def _ordered_bits(scores: Tensor) -> Tensor:
    """int32 (..., n) in the order of the float32 scores."""
    bits = scores.contiguous().view(torch.int32)
    sign = bits >> 31  # -1 for a negative float, else 0
    # minus the magnitude if negative: -0.0 ties 0.0
    return (bits ^ sign.bitwise_and(0x7FFFFFFF)).sub_(sign)


def ordered_keys(scores: Tensor) -> Tensor:
    """int64 keys (..., n) whose order is: higher score first, then lower index. Needs float32
    scores.

    The upper half is the float's bits made monotone as an integer, the lower half counts the index
    down, so a plain ``topk`` on the keys has no ties left to break and costs what it costs on the
    scores.
    """
    n = scores.shape[-1]
    down = torch.arange(n - 1, -1, -1, device=scores.device)
    return _ordered_bits(scores).to(torch.int64).mul_(1 << 32).add_(down)


# Rows from this length on, and groups from this size on, are worth two looks
_LONG, _GROUP = 1 << 15, 8


def _top_of_long_rows(scores: Tensor, k: int) -> Tensor | None:
    """The k largest of rows that are much longer than k, in two looks; None if that is no gain.

    k groups of scores have a maximum of at least the k-th largest maximum. So whatever is smaller
    is not among the k largest, and few others are left to sort.
    """
    *shape, n = scores.shape
    group = 1 << max(0, (n // (3 * k)).bit_length() - 1)
    if n < _LONG or group < _GROUP or scores.numel() == 0:
        return None

    # what cannot be ruled out; groups lie across the row, where a maximum is fastest
    rows, even = scores.reshape(-1, n), n // group * group
    maxima = rows[:, :even].unflatten(-1, (group, -1)).amax(-2)
    maxima = torch.cat([maxima, rows[:, even:]], -1)
    if bool(maxima.isnan().any()):
        return None
    least = maxima.topk(k, sorted=False).values.amin(-1, keepdim=True)
    row, column = (rows >= least).nonzero(as_tuple=True)
    counts = row.bincount(minlength=len(rows))
    width = int(counts.max())
    if width > 4 * k:  # many equal scores
        return None

    # their keys, as in ordered_keys, side by side
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys = row.new_full((len(rows), width), torch.iinfo(torch.int64).min)
    bits = _ordered_bits(rows[row, column])
    keys[row, place] = (bits.to(torch.int64) << 32) | (n - 1 - column)
    taken = keys.topk(k, dim=-1).values
    return (n - 1 - taken.bitwise_and_(0xFFFFFFFF)).view(*shape, k)


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest, in falling order, ties to the lower index. float32 or
    float64 scores."""
    # ONNX cannot read a float's bits; its TopK breaks ties to the lower index itself
    if in_onnx_export(scores):
        return scores.topk(k, dim=-1).indices
    # nor can TorchScript, nor vmap of torch 2.11
    if scores.dtype == torch.float64 or torch.jit.is_tracing() or is_transformed(scores):
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    taken = _top_of_long_rows(scores, k) if has_values(scores) else None
    return ordered_keys(scores).topk(k, dim=-1).indices if taken is None else taken


def _falling(x: Tensor) -> Tensor:
    """Indices of each row in falling order, ties to the lower index."""
    if in_onnx_export(x):  # which has no stable sort, but a TopK that is one
        return x.topk(x.shape[-1], dim=-1).indices
    return x.sort(dim=-1, descending=True, stable=True).indices


def stratified_scores(
    scores: Tensor, k: int | Tensor, grid_size: tuple[int, int], cell: tuple[int, int]
) -> Tensor:
    """Scores (..., n) with everything at -inf but the tokens that a stratified selection takes.

    A cell of v_c of the v valid tokens gets k v_c / v of the k slots, rounded down; the slots left
    over go one each to the cells with the largest remainders. In integers, so that equal cells get
    equal shares. A cell takes its best tokens.

    Args:
        scores: (..., n), -inf exactly in the masked tokens, no NaN.
        k: an int, or (..., 1).
        grid_size, cell: (H, W) of the map and of a cell.
    """
    index, inside = cell_slots(*grid_size, cell, scores.device)
    cells = torch.where(inside, scores[..., index], float("-inf"))  # (..., cells, slots)
    member = cells > float("-inf")
    count = member.sum(-1)
    total = count.sum(-1, keepdim=True)
    k = torch.minimum(k, total) if isinstance(k, Tensor) else total.clamp_max(k)
    quota = k * count // total.clamp_min(1)
    remainder = k * count % total.clamp_min(1)
    left = k - quota.sum(-1, keepdim=True)
    place = _falling(remainder).argsort(-1)
    quota = quota + (place < left)
    rank = _falling(cells).argsort(-1)
    taken = (member & (rank < quota.unsqueeze(-1))).flatten(-2)
    taken = taken.index_select(-1, slot_of_token(*grid_size, cell, scores.device))
    return scores.masked_fill(~taken, float("-inf"))
