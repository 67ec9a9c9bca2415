"""Routing that never looks ahead: keys by a running top-k over windows, queries by a threshold from
the window before.

Windows count from the first token, padding included. Shapes below: B samples, R routes, M windows
of w tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import share_of
from ..ops import route_topk
from ..ops.soft_topk import eps_schedule
from ..positions import fixed_scores
from ..router import CoordinateDescentRouter


class RoutedKeys(NamedTuple):
    """Keys of each window m >= 1, (B, R, M - 1, K), in falling order of their logits.

    Attributes:
        indices: int64 position of the token, in range even where a slot is empty.
        logits: its routing logit.
        valid: bool, False where a slot is empty.
        used: bool, the valid ones up to the number of the sample; the others are kept for later
            windows.
        gates: None for 1, else the gate, 0 where not used.
    """

    indices: Tensor
    logits: Tensor
    valid: Tensor
    used: Tensor
    gates: Tensor | None


class Threshold(NamedTuple):
    """What a window asks of the queries of the next: to exceed ``logit``; ``level`` is what their
    soft gates hang on."""

    logit: Tensor
    level: Tensor | None


class CausalRouter(CoordinateDescentRouter):
    """A router whose choice is made window by window, by the functions of this file.

    Args:
        dim: width C.
        first_row: of ``"random"`` and ``"grid"``: routers with other rows choose other tokens.
        **options: of :class:`~colt5_vision.CoordinateDescentRouter`.
    """

    def __init__(self, dim: int, *, first_row: int = 0, **options):
        super().__init__(dim, **options)
        self.first_row = first_row

    def forward(self, x: Tensor, position: int) -> Tensor:
        """Logits (B, R, n) of tokens x (B, n, C), the first of them at ``position``."""
        if self.kind == "learned":
            return self.logits(x)
        rows = range(self.first_row, self.first_row + self.num_routing_tokens)
        scores = fixed_scores(self.kind, 1, position + x.shape[1], rows, x.device)
        return scores[:, position:].expand(x.shape[0], -1, -1)


def _per_sample(count: Tensor, ndim: int) -> Tensor:
    return count.view(-1, *(1,) * (ndim - 1))


def running_topk(logits: Tensor, valid: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k of every window and all before it, ties to the earlier token.

    Top-k sets nest and merge in any grouping, so windows are joined in log2(M) doubling steps, not
    one by one.

    Args:
        logits, valid: (..., M, w).

    Returns:
        Positions and validity, both (..., M, min(k, M * w)).
    """
    windows, width = logits.shape[-2:]
    total = windows * width
    positions = torch.arange(total, device=logits.device).view(windows, width).expand(logits.shape)
    reach = 1

    def best(scores: Tensor, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taken, valid = route_topk(scores, min(k, total, scores.shape[-1]), mask=valid)
        return scores.gather(-1, taken), positions.gather(-1, taken), valid

    state = best(logits.detach(), positions, valid)
    while reach < windows:
        before = (pad(part[..., :-reach, :], (0, 0, reach, 0)) for part in state)
        state = best(*(torch.cat(both, -1) for both in zip(before, state)))
        reach *= 2
    return state[1], state[2]


def key_limit(count: Tensor | None, past: Tensor, slots: int) -> Tensor | None:
    """How many keys a window uses, of the shape of ``past`` (B, ...), the number of valid tokens
    before it.

    ``count`` (B,) are integers, or shares of ``past``, rounded, at least one; None: every slot.
    """
    if count is None:
        return None
    count = share_of(_per_sample(count.to(past.device), past.ndim), past)
    return count.clamp(1, slots).expand(past.shape)


def best_keys(
    router: CausalRouter,
    logits: Tensor,
    valid: Tensor,
    slots: int,
    kept: int,
    limit: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The top ``slots`` of candidates (B, R, ..., n): their places, validity, which are used, their
    gates.

    The soft gates are those of the candidates, which are the keys of the window before and its own
    tokens: what has dropped out of the top k competes no more. They sum to the budget and cost O(k
        + w) a window.

    Args:
        kept: the first so many candidates are the keys of the window before, in falling order.
        limit: (B, 1, ..., 1), how many are used; what is beyond neither counts nor competes, but
            stays. None: all.
    """
    taken, valid_slot = route_topk(logits, min(slots, logits.shape[-1]), mask=valid)
    used = valid_slot
    if limit is not None:
        used = valid_slot & (torch.arange(taken.shape[-1], device=logits.device) < limit)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        valid = valid & ((rank >= kept) | (rank < limit))
    if not router.wants_soft_gates(logits):
        return taken, valid_slot, used, None
    filled = None if limit is None else limit.squeeze(-1).expand(logits.shape[:-1])
    gates = router.soft_gates(logits, slots, filled=filled, mask=valid).gather(-1, taken)
    return taken, valid_slot, used, torch.where(used, router.straight(gates), 0)


def route_keys(
    router: CausalRouter, logits: Tensor, valid: Tensor, slots: int, count: Tensor | None
) -> RoutedKeys:
    """Keys for windows 1 ... M - 1, each from the tokens of all windows before it.

    Args:
        logits: (B, R, M, w), M >= 2.
        valid: (B, M, w) bool.
        slots: K, for each route.
        count: (B,) how many of the slots a sample uses, see :func:`key_limit`, or None.
    """
    windows, width = logits.shape[2:]
    past = valid.sum(-1).cumsum(-1)[:, :-1]
    limit = key_limit(count, past[:, None, :, None], slots)
    valid = valid.unsqueeze(1).expand(logits.shape)
    positions = (
        torch.arange(windows * width, device=logits.device)
        .view(windows, width)
        .expand(logits.shape)
    )
    candidates, kept = (logits[:, :, :-1], positions[:, :, :-1], valid[:, :, :-1]), 0
    if windows > 2:
        best, ok = running_topk(logits[:, :, :-2], valid[:, :, :-2], slots)
        best_logits, kept = (
            logits.flatten(2).gather(2, best.flatten(2)).view(best.shape),
            best.shape[-1],
        )
        before = (
            pad(part, (0, 0, 1, 0)) for part in (best_logits, best, ok)
        )  # nothing lies before window 0
        candidates = tuple(torch.cat(both, -1) for both in zip(before, candidates))
    taken, ok, used, gates = best_keys(router, candidates[0], candidates[2], slots, kept, limit)
    return RoutedKeys(
        candidates[1].gather(-1, taken), candidates[0].gather(-1, taken), ok, used, gates
    )


def query_threshold(
    router: CausalRouter, logits: Tensor, valid: Tensor, slots: int, count: Tensor | None
) -> Threshold:
    """What windows (B, ..., w) ask of the next: their k-th largest logit (-inf with fewer valid
    tokens), and the level.

    The gates of a soft top-k are ``min(1, exp((s + a) / eps))`` with one number ``a``, the level,
    for the whole row. A level that counted the tokens to come would leak them; that of the window
    before is known, and the same while the logits stay alike.
    ``min(1, exp((s - threshold) / eps))`` would be 1 for every routed query: no gradient at all.
    """
    scores = (
        logits.detach()
        .nan_to_num(nan=torch.finfo(logits.dtype).min)
        .masked_fill(~valid, float("-inf"))
    )
    scores = scores.topk(slots, dim=-1).values

    # the k-th largest logit
    last = slots - 1 if count is None else _per_sample(count, logits.ndim) - 1
    logit = (
        scores[..., last]
        if count is None
        else scores.gather(-1, last.expand(*scores.shape[:-1], 1)).squeeze(-1)
    )
    if not router.wants_soft_gates(logits):
        return Threshold(logit, None)

    # the level, from a gate below 1
    filled = None
    if count is not None:
        filled = _per_sample(count, logits.ndim - 1).expand(logits.shape[:-1])
    gates = router.soft_gates(logits, slots, filled=filled, mask=valid)
    inner = valid & (gates < 1)
    # read off where the gate is largest: there it cannot underflow. All capped: no finite level,
    # every gate is 1
    at = torch.where(inner, gates.detach(), -1).argmax(-1, keepdim=True)
    some = inner.any(-1)
    gate = torch.where(some, gates.gather(-1, at).squeeze(-1), 1)
    level = _final_eps(router) * gate.log() - logits.gather(-1, at).squeeze(-1)
    return Threshold(logit, torch.where(some, level, float("inf")))


def admit_queries(
    router: CausalRouter,
    logits: Tensor,
    valid: Tensor,
    threshold: Threshold,
    room: int | Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Which tokens (B, ..., n) of a window are queries: those above the threshold, first come,
    first served.

    Args:
        room: how many, an int or (B, ..., 1).

    Returns:
        Which are taken (B, ..., n), and their gates, None for 1.
    """
    limit = threshold.logit.unsqueeze(-1)
    # a token like the one that set the threshold stays out whatever the rounding, in a full pass
    # and in a single step
    margin = 1e-5 if logits.dtype == torch.float32 else 1e-12
    above = valid & (logits.detach() > limit + margin * limit.abs().clamp(1, 1e6))
    taken = above & (above.cumsum(-1) <= room)
    if threshold.level is None:
        return taken, None
    gates = ((logits + threshold.level.unsqueeze(-1)) / _final_eps(router)).clamp_max(0).exp()
    return taken, router.straight(gates)


def _final_eps(router: CausalRouter) -> float:
    if router.n_iters is None:
        return router.eps
    return eps_schedule(router.n_iters, router.eps, router.eps_init, router.eps_decay)[-1]


def first_slots(taken: Tensor, slots: int) -> Tensor:
    """Indices (S, slots) of the True entries of (S, n), in order; n where fewer than ``slots`` are
    True."""
    length = taken.shape[-1]
    place = torch.where(taken, taken.cumsum(-1) - 1, slots)
    index = torch.arange(length, device=taken.device).expand(taken.shape)
    empty = torch.full((taken.shape[0], slots + 1), length, dtype=torch.int64, device=taken.device)
    # what is not taken lands in a slot that is cut off
    return empty.scatter(-1, place, index)[:, :slots]
