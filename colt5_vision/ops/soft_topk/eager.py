"""Soft top-k in plain torch: the exact projection, and coordinate descent for parity with CoLT5.

Both work on rows, scores (rows, n) in float32 or float64, masked entries already at the dtype's
minimum.
"""

import math

import torch
from torch import Tensor

from ..._torch_internals import has_values, in_onnx_export
from ..dtypes import double_dtype


def _logcumsumexp(x: Tensor) -> Tensor:
    """Along the last dimension, for rows that grow; ONNX has no operator for it, there it is
    written out."""
    if not in_onnx_export(x):
        return x.logcumsumexp(-1)
    highest = x[..., -1:]
    return (x - highest).exp().cumsum(-1).log() + highest


def _exp_(x: Tensor) -> Tensor:
    """exp in place; 0 for what is below all normal numbers, where a CPU takes ten times as long."""
    if not has_values(x):
        return x.exp_()
    lowest = math.log(torch.finfo(x.dtype).tiny) + 1
    return torch.threshold_(x.clamp_min_(lowest).exp_(), 1.001 * math.exp(lowest), 0)


def soft_topk_forward(
    scores: Tensor, k: Tensor, num_valid: Tensor, eps: float, head_size: int
) -> Tensor:
    """Gates y = min(1, exp((s + a) / eps)) with sum k: the KL projection on the capped simplex.

    Args:
        scores: (rows, n).
        k: (rows, 1), the sum wanted.
        num_valid: (rows, 1), entries that are not masked.
        head_size: static, at least ceil(k) of every row (or n): all capped entries lie in this
            head.

    Returns:
        Gates (rows, n).
    """
    head, head_indices = scores.topk(head_size, dim=-1)
    lowest = head.gather(-1, (num_valid - 1).clamp(0, head_size - 1))  # of the head's valid entries
    tail = scores.scatter(-1, head_indices, float("-inf")).sub_(lowest).div_(eps)
    tail = _exp_(tail).sum(-1, keepdim=True)

    # suffix_j = logsumexp of (s_i - lowest) / eps over the sorted entries i >= j and the tail. Sums
    # only grow here: nothing is ever subtracted from a sum of exponentials, and float64 keeps s /
    # eps exact for eps = .003.
    wide = double_dtype(scores.device)
    offset = (head.to(wide) - lowest) / eps
    suffix = _logcumsumexp(torch.cat([offset, tail.to(wide).log()], -1).flip(-1)).flip(-1)[:, :-1]
    log_mass = suffix - offset  # logsumexp of (s_i - s_j) / eps over i >= j, and the tail

    # Entry j is capped if, with the j above it capped, its own gate (k - j) / mass_j would exceed
    # 1. The test is monotone in j, so the number of capped entries is the number of failures.
    room = k.to(wide) - torch.arange(head_size, device=scores.device, dtype=wide)
    capped = (room > 1) & (room.clamp_min(1).log() > log_mass)
    num_capped = capped.sum(-1, keepdim=True).clamp_max(head_size - 1)
    threshold = head.gather(-1, num_capped)  # the largest uncapped score
    level = log_mass.gather(-1, num_capped) - room.gather(-1, num_capped).log()

    # (s - threshold) is exact in float32 where it matters, (s / eps + a / eps) would not be.
    gates = _exp_((scores - threshold).div_(eps).sub_(level.to(scores.dtype)).clamp_max_(0))
    return gates.masked_fill_(k >= num_valid, 1)


def soft_topk_by_softmax(
    scores: Tensor, k: Tensor, num_valid: Tensor, eps: float, head_size: int
) -> Tensor:
    """The gates once more, by autograd's own operators: derivatives of any kind and order.

    Over the uncapped entries U the gates are ``(k - m) softmax_U(scores / eps)``, with m capped
    ones. Which entries are capped is found without derivatives.
    """
    solved = soft_topk_forward(scores.detach(), k.detach(), num_valid, eps, head_size)
    capped = solved >= 1
    rest = k - capped.sum(-1, keepdim=True)

    lowest = torch.finfo(scores.dtype).min  # not -inf: a row with all of them capped has no NaN
    uncapped = torch.where(capped, lowest, scores)
    shifted = uncapped - uncapped.detach().amax(-1, keepdim=True)
    return torch.where(capped, 1, rest * (shifted / eps).softmax(-1))


def soft_topk_backward(grad: Tensor, gates: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Implicit-function gradient for scores (rows, n) and k (rows, 1); plain torch, so twice
    differentiable."""
    uncapped = gates.masked_fill(gates >= 1, 0)
    total = uncapped.sum(-1, keepdim=True)
    mean = torch.linalg.vecdot(uncapped, grad).unsqueeze(-1) / torch.where(total > 0, total, 1)
    return (uncapped * (grad - mean)).mul_(1 / eps), mean


def coordinate_descent_forward(
    scores: Tensor, k: Tensor, num_valid: Tensor, schedule: list[float]
) -> tuple[Tensor, Tensor]:
    """Gates (rows, n) and the iterates a_t (rows, n_iters), the whole state of the descent.

    With s + b = min(s, -a) the two-vector iteration of CoLT5 is a scalar one:
    a_1 = eps log(k / n), a_{t+1} = eps (log k - logsumexp(min(s, -a_t) / eps)).
    """
    log_k, highest = k.log(), scores.amax(-1, keepdim=True)
    a = schedule[0] * (log_k - num_valid.clamp_min(1).to(scores.dtype).log())
    iterates, buffer = [a], torch.empty_like(scores)
    base, base_eps, weights = None, None, None
    for eps in schedule[1:-1]:
        top = torch.minimum(highest, -a)
        # exp(min(s, -a) / eps) is min(exp(s / eps), exp(-a / eps)): one exp of the map serves all
        # iterations at one eps, as long as the bound stays within float32's range of the base
        if (
            base is None
            or eps != base_eps
            or not has_values(scores)
            or bool(((top - base).abs() > 40 * eps).any())
        ):
            base, base_eps = top, eps
            weights = _exp_(torch.sub(scores, base).div_(eps))
        mass = torch.minimum(weights, ((-a - base) / eps).exp(), out=buffer).sum(-1, keepdim=True)
        a = eps * (log_k - mass.log()) - base
        iterates.append(a)
    gates = _exp_(torch.add(scores, a, out=buffer).clamp_max_(0).mul_(1 / schedule[-1]))
    return gates, torch.cat(iterates, -1)


def coordinate_descent(
    scores: Tensor, k: Tensor, num_valid: Tensor, schedule: list[float]
) -> Tensor:
    """The gates by autograd's own operators: derivatives of any kind, a map an iteration kept."""
    log_k = k.log()
    a = schedule[0] * (log_k - num_valid.clamp_min(1).to(scores.dtype).log())
    for eps in schedule[1:-1]:
        a = eps * (log_k - (torch.minimum(scores, -a) / eps).logsumexp(-1, keepdim=True))
    return ((scores + a).clamp_max(0) / schedule[-1]).exp()


def coordinate_descent_backward(
    grad: Tensor,
    scores: Tensor,
    gates: Tensor,
    iterates: Tensor,
    k: Tensor,
    num_valid: Tensor,
    schedule: list[float],
) -> tuple[Tensor, Tensor]:
    """Exactly autograd's gradient through all iterations, from the scalars a_t alone, in O(n log T)
    per distinct eps.

    With g_t = dL/da_t: dL/da_{t-1} = g_t q_t and dL/ds_i = -g_t exp((s_i + a_t) / eps_t) / k for
    s_i <= -a_{t-1}, where q_t = #{s_i > -a_{t-1}} exp((a_t - a_{t-1}) / eps_t) / k >= 0. So all g_t
    have one sign, and what reaches s_i is exp(s_i / eps) times a step function of s_i with one step
    an iteration: one bucket search, one gather.
    """
    wide = double_dtype(scores.device)
    a, log_k = iterates.to(wide), k.to(wide).log()
    direct = grad * torch.where(scores + iterates[:, -1:] <= 0, gates, 0) / schedule[-1]
    grad_last = direct.sum(-1, keepdim=True)

    # How many scores lie above each -a_{t-1}; masked entries sit at the minimum and are never
    # above.
    steps, order = (-iterates[:, :-1]).sort(-1)
    slots = torch.searchsorted(steps, scores)  # the lowest step with s <= step
    below = torch.zeros(*steps.shape[:-1], steps.shape[-1] + 1, dtype=wide, device=scores.device)
    below.scatter_add_(
        -1, slots, torch.ones((), dtype=wide, device=scores.device).expand(slots.shape)
    )
    above = (scores.shape[-1] - below.cumsum(-1)[:, :-1]).gather(-1, order.argsort(-1))

    # q_t, by its logarithm, and with it g_t
    eps = torch.tensor(schedule[1:-1], dtype=wide, device=scores.device)
    log_q = above.log() + (a[:, 1:] - a[:, :-1]) / eps - log_k
    # log of g_t / g_T for t = 1..T
    log_g = torch.cat([log_q.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(log_k)], -1)
    weights = torch.tensor(schedule[:-1], dtype=wide, device=scores.device)
    grad_k = (log_g.exp() * weights).sum(-1, keepdim=True).to(k.dtype) * grad_last / k

    # what reaches the scores, iterations of one eps at a time
    through = torch.zeros_like(scores)
    for value in dict.fromkeys(schedule[1:-1]):
        group = [t for t, e in enumerate(schedule[1:-1]) if e == value]
        bound, rank = (-a[:, group]).sort(-1)  # this group's -a_{t-1}, ascending
        log_w = (
            log_g[:, [t + 1 for t in group]] + a[:, [t + 1 for t in group]] / value - log_k
        ).gather(-1, rank)

        # a score belongs to every iteration whose bound is not below it: a suffix sum over the
        # sorted bounds
        log_w = log_w.flip(-1).logcumsumexp(-1).flip(-1) + bound / value
        end = torch.full_like(log_w[:, :1], float("-inf"))

        # each score's sum, at its slot
        slot = (
            slots
            if len(group) == steps.shape[-1]
            else torch.searchsorted(bound.to(scores.dtype), scores)
        )
        bound, log_w = torch.cat([bound, bound[:, -1:]], -1), torch.cat([log_w, end], -1)
        exponent = (scores - bound.to(scores.dtype).gather(-1, slot)).div_(value)
        through += exponent.add_(log_w.to(scores.dtype).gather(-1, slot)).exp_()
    return direct - grad_last * through, grad_k
