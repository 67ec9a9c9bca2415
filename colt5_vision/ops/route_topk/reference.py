"""Hard top-k selection with a total order, in plain torch."""

import torch
from torch import Tensor


def ordered_keys(scores: Tensor) -> Tensor:
    """int64 keys (..., n) whose order is: higher score first, then lower index. Needs float32 scores.

    The upper half is the float's bits made monotone as an integer, the lower half counts the index down, so a plain
    ``topk`` on the keys has no ties left to break and costs what it costs on the scores.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they tie
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    n = scores.shape[-1]
    return bits.to(torch.int64).mul_(1 << 32).add_(torch.arange(n - 1, -1, -1, device=scores.device))


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest, in falling order, ties to the lower index. float32 or float64 scores."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ordered_keys(scores).topk(k, dim=-1).indices


def stratified_order(scores: Tensor, valid: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """Scores (..., n) replaced by ones whose top-k takes from every cell its share of k, the best of the cell first.

    The r-th best of a cell's v valid tokens asks for a slot when the share (r + 1/2) / v of the map has been taken; the
    global top-k over these shares gives each cell k v / n slots, rounded. Equal shares go to the higher score.
    """
    n = scores.shape[-1]
    cells = torch.where(inside & valid[..., index], scores[..., index], float("-inf"))  # (..., cells, slots)
    member = cells > float("-inf")
    rank = cells.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    share = (rank + 0.5) / member.sum(-1, keepdim=True).clamp_min(1)
    share = torch.where(member, share, float("inf")).flatten(-2)
    by_score = cells.flatten(-2).sort(dim=-1, descending=True, stable=True).indices
    order = by_score.gather(-1, share.gather(-1, by_score).sort(dim=-1, stable=True).indices)
    position = order.argsort(-1)  # 0 for the first token to take
    out = torch.full(scores.shape, float(-n - 1), dtype=scores.dtype, device=scores.device)
    slots = index.flatten().expand(position.shape)
    # slots outside the map share a token with a real one: they carry the latest positions, so amax keeps the real one
    return out.scatter_reduce(-1, slots, -position.to(scores.dtype), "amax")
