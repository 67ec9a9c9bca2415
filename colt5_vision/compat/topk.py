"""``torch.topk`` with a gradient: the values and indices of the k largest, and the gates that make
it trainable."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, check_positive
from ..gates import gate_budget, pass_straight
from ..ops import coordinate_descent, route_topk, soft_topk


class TopkReturn(NamedTuple):
    """What :func:`topk` returns; every field is (..., K), K = min(k, n), in falling order of the
    input.

    Attributes:
        values: the k largest entries times their gates, in the dtype of the input. 0 in empty
            slots.
        indices: int64, where they are. In range even where a slot is empty.
        coor_descent_values: their soft gates, float32 (float64); 0 in empty slots. None if not
            differentiable.
        gates: the same passed straight through: exactly 1 in forward (0 in empty slots), the soft
            gates' gradient in backward. None if not differentiable.
    """

    values: Tensor
    indices: Tensor
    coor_descent_values: Tensor | None
    gates: Tensor | None


def topk(
    x: Tensor,
    k: int,
    *,
    coor_descent_k_ratio: float = 9 / 8,
    n_iters: int | None = None,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    fused: bool | None = None,
    non_differentiable: bool = False,
) -> TopkReturn:
    """The ``k`` largest entries of each row, differentiable in the choice as well as in the values.

    The selection is a top-k on ``x`` itself (ties go to the lower index). The gradient is that of
    ``x * gates`` with gates of 1: the values' own, and that of the soft gates. By the latter,
    entries that were not taken learn too.

    Args:
        x: (..., n), any floating dtype.
        k: entries to take, an int >= 1 (above n: all of them).
        coor_descent_k_ratio: the soft gates sum to ``k`` times this, >= 1 (at most n): those just
            below the k-th learn.
        n_iters: None: the exact gates of :func:`~colt5_vision.ops.soft_topk`; an int: as many
            iterations of :func:`~colt5_vision.ops.coordinate_descent`, as ``colt5_attention.topk``
            (whose default is 20).
        eps: temperature in units of ``x``, > 0.
        eps_init, eps_decay: its schedule, see :func:`~colt5_vision.ops.coordinate_descent`; need
            ``n_iters``.
        mask: (..., n) bool, True = valid. Masked entries are never returned while a valid one is
            left; with fewer valid entries than ``k`` the last slots are empty: value, gate and
            gradient 0.
        fused: kernels for the gates: True, where they can run (``backend="auto"``); False, plain
            torch (``backend="eager"``); None, what the environment variable
            ``COLT5_VISION_BACKEND`` says, else as True.
        non_differentiable: no gates; the gradient is that of the values alone, as that of
            ``torch.topk``.

    Returns:
        :class:`TopkReturn` of ``(values, indices, coor_descent_values, gates)``.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) section 3; names and order of ``colt5_attention.topk``.
    """
    _check_gates(k, coor_descent_k_ratio, n_iters, eps_init, eps_decay, fused)

    # which: the top of x
    try:
        indices, valid = route_topk(x, k, mask=mask)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("scores:", "x:", 1)) from None
    values = torch.where(valid, x.gather(-1, indices), 0)  # never 0 times what lies under the mask
    if non_differentiable:
        return TopkReturn(values, indices, None, None)

    # what makes the choice trainable: a soft top-k, passed straight through
    how = {"eps": eps, "mask": mask, "backend": {True: "auto", False: "eager", None: None}[fused]}
    budget = gate_budget(k, coor_descent_k_ratio, x.shape[-1])
    if n_iters is None:
        soft = soft_topk(x, budget, **how)
    else:
        schedule = {"n_iters": n_iters, "eps_init": eps_init, "eps_decay": eps_decay}
        soft = coordinate_descent(x, budget, **schedule, **how)
    soft = torch.where(valid, soft.gather(-1, indices), 0)
    gates = torch.where(valid, pass_straight(soft), 0)
    return TopkReturn((values * gates).to(x.dtype), indices, soft, gates)


def _check_gates(k, coor_descent_k_ratio, n_iters, eps_init, eps_decay, fused) -> None:
    check_int("k", k)
    if not check_positive("coor_descent_k_ratio", coor_descent_k_ratio) >= 1:
        raise ValueError(
            f"coor_descent_k_ratio: expected a number >= 1, got {coor_descent_k_ratio}"
        )
    if n_iters is None and (eps_init is not None or eps_decay != 1.0):
        raise ValueError("eps_init, eps_decay: a schedule needs n_iters; exact gates have none")
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(
            f"fused: expected True, False or None, got {fused!r} ({type(fused).__name__})"
        )
