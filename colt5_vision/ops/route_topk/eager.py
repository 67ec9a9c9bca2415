"""Hard top-k selection with a total order, in plain torch."""

import torch
from torch import Tensor

from ..._torch_internals import in_onnx_export, is_transformed
from ..grid import cell_slots, slot_of_token


def ordered_keys(scores: Tensor) -> Tensor:
    """int64 keys (..., n) whose order is: higher score first, then lower index. Needs float32
    scores.

    The upper half is the float's bits made monotone as an integer, the lower half counts the index
    down, so a plain ``topk`` on the keys has no ties left to break and costs what it costs on the
    scores.
    """
    bits = scores.contiguous().view(torch.int32)
    sign = bits >> 31  # -1 for a negative float, else 0
    bits = (bits ^ sign.bitwise_and(0x7FFFFFFF)).sub_(
        sign
    )  # minus the magnitude if negative: -0.0 ties 0.0
    n = scores.shape[-1]
    return (
        bits.to(torch.int64).mul_(1 << 32).add_(torch.arange(n - 1, -1, -1, device=scores.device))
    )


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest, in falling order, ties to the lower index. float32 or
    float64 scores."""
    # ONNX cannot read a float's bits; its TopK breaks ties to the lower index itself
    if in_onnx_export(scores):
        return scores.topk(k, dim=-1).indices
    # nor can TorchScript, nor vmap of torch 2.11
    if scores.dtype == torch.float64 or torch.jit.is_tracing() or is_transformed(scores):
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ordered_keys(scores).topk(k, dim=-1).indices


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
