"""Two older relaxations of top-k, for comparison with :func:`~colt5_vision.ops.soft_topk` only.

Early versions of ``colt5-attention`` routed with them and dropped them for coordinate descent. Each
docstring says why that was right. Plain torch on every device, once differentiable.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import check_int, check_positive
from ..gates import only_gradient
from ..ops.dtypes import double_dtype, wide_dtype
from ..ops.soft_topk.api import checked_rows

_HALVINGS = 50  # of an interval of a few hundred: to float64's last digits
_SURE = 5.0  # 1 - exp(-exp(5)) is 1 to the last digit, and exp stays finite


def _solvable_rows(
    scores: Tensor, k, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of scores, k, number of valid entries, valid (rows, n), and full (rows, 1): rows whose
    gates are all 1.

    A full row (k >= valid entries, none of them perhaps) is put in place of an easy one, whose
    gradient is finite.
    """
    rows, k, num_valid, _ = checked_rows(scores, k, mask)
    wide, n = double_dtype(scores.device), rows.shape[-1]
    valid = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.reshape(-1, n)
    full = k >= num_valid
    rows, k = torch.where(full, 0, rows.to(wide)), torch.where(full, n / 2, k.to(wide))
    return rows, k, torch.where(full, n, num_valid).to(wide), valid | full, full


def _as_gates(gates: Tensor, full: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
    gates = gates.masked_fill(full, 1).to(wide_dtype(scores)).reshape(scores.shape)
    return gates if mask is None else torch.where(mask, gates, 0)


def cumulative_softmax(
    scores: Tensor, k: float | Tensor, *, eps: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Top-k gates as the sum of softmaxes, each damped by what the ones before it took; for
    comparison only.

    A softmax hands out a mass of 1. To hand out k it is taken again and again over what is left of
    every entry, ``dy = softmax(scores / eps + log(1 - y)) dm``, while the mass ``m`` goes from 0 to
    k. In k steps of mass 1 entries overshoot 1 and k = n does not give ones; in ever smaller steps
    neither happens, and the sum of them all is in closed form ``1 - exp(-t exp(scores / eps))``
    with ``t`` such that the gates sum to k. That limit is computed here.

    Why not route with it: no gate reaches 1 unless all do. The first softmax gives even the least
    entry its share, and later ones never take it back. At one eps the best entries get less than
    from :func:`~colt5_vision.ops.soft_topk`; what they lack goes to the rest. The gradient keeps
    pushing tokens that are routed for certain. And step by step, as it was run once, it costs k
    passes over the map and keeps k copies for backward.

    Args:
        scores: (..., n) logits, any floating dtype.
        k: the sum of the gates, a positive number or a tensor (...), fractional allowed,
            differentiable. At least the number of valid entries: gates of 1.
        eps: temperature in units of the scores, > 0.
        mask: (..., n) bool, True = valid. Masked entries get gate 0 and gradient 0.

    Returns:
        Gates (..., n) in [0, 1], float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: iterated softmax as in Plötz and Roth 2018 (arXiv 1810.12575); as a router, early
        ``colt5-attention``.
    """
    eps = check_positive("eps", eps)
    rows, k, num_valid, valid, full = _solvable_rows(scores, k, mask)
    z = torch.where(valid, rows / eps, float("-inf"))

    def gates(log_t: Tensor) -> Tensor:
        return -torch.expm1(-(z + log_t).clamp_max(_SURE).exp())

    # log t by halving an interval
    with torch.no_grad():
        # 1 - exp(-x) <= x bounds log t from below; that even the least entry gets k / n bounds it
        # from above
        least = torch.where(valid, z, float("inf")).amin(-1, keepdim=True)
        share = (k / num_valid).clamp_max(1 - torch.finfo(k.dtype).eps)
        low = k.log() - z.logsumexp(-1, keepdim=True)
        high = (-torch.log1p(-share)).log() - least
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = gates(middle).sum(-1, keepdim=True) >= k
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        x = (z + high).clamp_max(_SURE)
        slope = (x - x.exp()).exp().sum(-1, keepdim=True).clamp_min(torch.finfo(k.dtype).tiny)

    # implicit function theorem: the gradient of one Newton step, the value of the interval
    step = (k - gates(high).sum(-1, keepdim=True)) / slope
    return _as_gates(gates(high + only_gradient(step)), full, scores, mask)


def gumbel_sinkhorn(
    scores: Tensor,
    k: float | Tensor,
    *,
    n_iters: int = 50,
    eps: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Top-k gates as a transport plan of n entries to "taken" (k) and "left" (n - k); for
    comparison only.

    Sinkhorn's iteration on the n x 2 matrix ``exp([scores, 0] / eps)``: its columns are scaled to
    sums k and n - k, then its rows to 1, ``n_iters`` times. With two columns the row-normalised
    plan is ``sigmoid(scores / eps + c)``: one ``c`` a row is all there is to iterate. A
    ``generator`` adds Gumbel noise to both columns first.

    Why not route with it: it converges linearly, the slower the harder its gates, so that at small
    eps they do not sum to k (:func:`~colt5_vision.ops.soft_topk` is exact at any eps). No gate
    reaches 1 unless all do: the gradient keeps pushing tokens that are routed for certain. Noise
    explores, but then the gates of routed tokens are not those of the logits that routed them.
    Backward keeps a few copies of the scores for each iteration.

    Args:
        scores: (..., n) logits, any floating dtype.
        k: the sum of the gates (in the limit), a positive number or a tensor (...), fractional
            allowed, differentiable. At least the number of valid entries: gates of 1.
        n_iters: iterations, >= 1.
        eps: temperature in units of the scores, > 0.
        mask: (..., n) bool, True = valid. Masked entries get gate 0 and gradient 0.
        generator: where the noise comes from; None: no noise, the same gates for the same scores.

    Returns:
        Gates (..., n) in [0, 1], float32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: Mena et al. 2018 (arXiv 1802.08665); top-k as transport to two columns, Xie et al. 2020
        (arXiv 2002.06504).
    """
    n_iters, eps = check_int("n_iters", n_iters), check_positive("eps", eps)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    rows, k, num_valid, valid, full = _solvable_rows(scores, k, mask)

    # noise: the difference of two Gumbel variables is logistic
    if generator is not None:
        place = {"device": generator.device, "dtype": torch.float32}
        uniform = torch.rand(rows.shape, generator=generator, **place).clamp(1e-7, 1 - 1e-7)
        rows = rows + uniform.logit().to(rows)

    # scale the columns to k and n - k, the rows to 1
    z = torch.where(valid, rows / eps, float("-inf"))
    rest = num_valid - k
    c = (k.log() - z.logsumexp(-1, keepdim=True)) - (rest.log() - num_valid.log())
    for _ in range(n_iters - 1):
        taken = logsigmoid(z + c).logsumexp(-1, keepdim=True)
        left = torch.where(valid, logsigmoid(-z - c), float("-inf")).logsumexp(-1, keepdim=True)
        c = c + (k.log() - taken) - (rest.log() - left)
    return _as_gates(torch.sigmoid(z + c), full, scores, mask)
