"""Coordinate descent under the name and the signature of colt5_attention."""

from torch import Tensor

from ..checks import check_float_tensor
from ..ops import coordinate_descent


def coor_descent(
    s: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`~colt5_vision.ops.coordinate_descent` as ``colt5_attention.coor_descent``.

    Args:
        s: (..., n) scores, any floating dtype.
        n_iters: iterations, >= 1.
        k: what the gates of a row sum to in the limit, a number or a tensor (...).
        eps: temperature in units of the scores, > 0.
        eps_init, eps_decay: its schedule.
        mask: (..., n) bool, True = valid.

    Returns:
        Gates (..., n) in [0, 1], float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: Wright 2015 (arXiv 1502.04759); colt5-attention 0.11.2.
    """
    check_float_tensor("s", s)
    if s.ndim < 1 or s.shape[-1] < 1:
        raise ValueError(f"s: expected shape (..., n) with n >= 1, got {tuple(s.shape)}")
    schedule = {"eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
    return coordinate_descent(s, k, n_iters=n_iters, mask=mask, **schedule)
