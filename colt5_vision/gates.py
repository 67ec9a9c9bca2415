"""The soft gates of a router: which relaxation of top-k, over the whole map or cell by cell."""

import torch
from torch import Tensor

from .ops import coordinate_descent, cumulative_softmax, gumbel_sinkhorn, soft_topk
from .ops.grid import cell_slots, slot_of_token

METHODS = ("coordinate_descent", "cumulative_softmax", "gumbel_sinkhorn")


def soft_gates(
    logits: Tensor,
    k: float | Tensor,
    *,
    max_k: float,
    mask: Tensor | None = None,
    grid_size: tuple[int, int] | None = None,
    cell_size: tuple[int, int] | None = None,
    generator: torch.Generator | None = None,
    method: str = "coordinate_descent",
    n_iters: int | None = None,
    eps: float = 1.0,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
) -> Tensor:
    """Gates (..., N) of checked logits (..., N), in the dtype of the logits.

    Args:
        k: their sum, a number or one of each row (...).
        max_k: a number that no entry of ``k`` exceeds, so that tensors are not sorted whole.
        mask: (..., N), True = valid.
        grid_size, cell_size: with a ``cell_size`` every cell has its own budget, its share of ``k`` by valid tokens.
        generator: noise of ``"gumbel_sinkhorn"``.
        method, n_iters, eps, eps_init, eps_decay: as of the router.
    """

    def relaxed(scores: Tensor, k: float | Tensor, mask: Tensor | None) -> Tensor:
        given = {"eps": eps, "mask": mask}
        if method == "cumulative_softmax":
            return cumulative_softmax(scores, k, **given)
        if method == "gumbel_sinkhorn":
            iterations = {} if n_iters is None else {"n_iters": n_iters}
            return gumbel_sinkhorn(scores, k, generator=generator, **iterations, **given)
        if n_iters is not None:
            return coordinate_descent(scores, k, n_iters=n_iters, eps_init=eps_init, eps_decay=eps_decay, **given)
        return soft_topk(scores, k, max_k=max_k if isinstance(k, Tensor) else None, **given)

    if cell_size is None:
        return relaxed(logits, k, mask)
    index, inside = cell_slots(*grid_size, cell_size, logits.device)
    valid = inside if mask is None else inside & mask[..., index]
    valid = valid.expand(*logits.shape[:-1], *inside.shape)
    count = valid.sum(-1).to(logits.dtype)
    k = k.to(logits.dtype).unsqueeze(-1) if isinstance(k, Tensor) else k
    share = k * count / count.sum(-1, keepdim=True).clamp_min(1)
    # an empty cell has a budget, if none to speak of; a cell that is all there is may be rounded above the bound
    share = share.clamp_min(torch.finfo(logits.dtype).tiny).clamp_max(max_k)
    soft = relaxed(logits[..., index], share, valid).flatten(-2)
    return soft.index_select(-1, slot_of_token(*grid_size, cell_size, logits.device))
