"""What attention over a sequence must remember to go on token by token."""

import dataclasses

import torch
from torch import Tensor

from ..checks import Count
from ..router import CoordinateDescentRouter
from .routing import Threshold, best_keys, key_limit, query_threshold


@dataclasses.dataclass(frozen=True)
class AutoregressiveCache:
    """What :class:`ConditionalRoutedAutoregressiveAttention` must know of the tokens so far to go
    on.

    Its size depends on the windows and the number of routed keys, not on the number of tokens so
    far. It is never changed in place: one cache may be continued in several ways.

    Attributes:
        position: tokens so far, padding included.
        light: (2, B, P, heads, head_dim) keys and values of the light branch, of at most two
            windows; ``light_valid`` (B, P) bool.
        routed: (B, K, R, heads / R, 2, head_dim) keys and values that the window in progress
            attends to, of each route, with ``routed_logits``, ``routed_valid``, ``routed_used``
            (see :class:`RoutedKeys`) and ``routed_gates`` (None: 1), all (B, R, K). ``past`` (B,):
            valid tokens before that window.
        pending: (B, o, R, heads / R, 2, head_dim) keys and values of the window in progress, with
            ``pending_logits`` (B, R, o), ``pending_queries`` (B, o) (logits; None: every token is a
            query) and ``pending_valid`` (B, o).
        threshold: of the window before, for queries. ``used`` (B,): queries routed in the window in
            progress.
        count_q: the number of routed queries that the sequence was begun with.
        count_kv: the same of routed keys.
    """

    position: int
    light: Tensor
    light_valid: Tensor
    routed: Tensor
    routed_logits: Tensor
    routed_valid: Tensor
    routed_used: Tensor
    routed_gates: Tensor | None
    past: Tensor
    pending: Tensor
    pending_logits: Tensor
    pending_queries: Tensor | None
    pending_valid: Tensor
    threshold: Threshold | None
    used: Tensor | None
    count_q: Count | None
    count_kv: Count

    def select(self, samples: Tensor) -> "AutoregressiveCache":
        """The cache of ``samples``, int64 indices of any number: for beam search, or to drop what
        is finished."""

        def pick(name: str, value):
            if isinstance(value, Threshold):
                return Threshold(*(pick(name, part) for part in value))
            if isinstance(value, tuple):
                return Count(*(pick(name, part) for part in value))
            return (
                value.index_select(int(name == "light"), samples)
                if isinstance(value, Tensor)
                else value
            )

        return type(self)(
            **{f.name: pick(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        )


def check_cache(cache, module, batch: int, counts: tuple) -> None:
    """``cache`` fits the module and a batch of that many samples; ``counts`` given with the call
    are none."""
    # what came
    if not isinstance(cache, AutoregressiveCache):
        raise TypeError(
            "cache: expected an AutoregressiveCache, as the module returns, got "
            f"{type(cache).__name__}"
        )
    if any(count is not None for count in counts):
        raise ValueError(
            "num_heavy_tokens_q, num_heavy_tokens_kv: a cache keeps those that it began with"
        )

    # its shapes are those of this module
    heavy, light = module.heavy_attn, module.light_attn
    expected = [
        (batch, heavy.routes, heavy.heads // heavy.routes, 2, heavy.null_key.kv.shape[-1]),
        (2, batch, light.heads, light.dim_head),
        (module.q_router is not None and cache.count_q is not None,),
    ]
    got = [
        (cache.pending.shape[0], *cache.pending.shape[2:]),
        (*cache.light.shape[:2], *cache.light.shape[3:]),
        (cache.count_q is not None,),
    ]
    if got != expected:
        raise ValueError(
            "cache: expected one of this module and batch, (samples, routes, heads of a route, 2, "
            "head_dim) = "
            f"{expected[0]}, light (2, samples, heads, head_dim) = {expected[1]}, got {got[0]} "
            f"and {got[1]}"
        )


def rolled_over(
    cache: AutoregressiveCache,
    q_router: CoordinateDescentRouter | None,
    kv_router: CoordinateDescentRouter,
) -> AutoregressiveCache:
    """The window in progress is full: its tokens become candidates for keys, its logits the next
    threshold."""
    # the candidates: keys routed so far, then the window's
    logits = torch.cat([cache.routed_logits, cache.pending_logits], 2)
    valid = cache.pending_valid.unsqueeze(1).expand(cache.pending_logits.shape)
    valid = torch.cat([cache.routed_valid, valid], 2)

    # the best keys so far
    slots, count = cache.count_kv
    past = cache.past + cache.pending_valid.sum(1)
    kept, limit = cache.routed_logits.shape[2], key_limit(count, past.view(-1, 1, 1), slots)
    chosen, ok, used, gates = best_keys(kv_router, logits, valid, slots, kept, limit)

    # they, and nothing pending; of fresh memory, or a step compiled for one window would be
    # compiled anew for the next
    def none(x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, 0, 0).clone(memory_format=torch.contiguous_format)

    kv, index = torch.cat([cache.routed, cache.pending], 1), chosen.mT
    fresh = {
        "routed": kv.gather(1, index.view(*index.shape, 1, 1, 1).expand(-1, -1, -1, *kv.shape[3:])),
        "routed_logits": logits.gather(2, chosen),
        "routed_valid": ok,
        "routed_used": used.clone(),
        "past": past,
        "routed_gates": gates,
        "pending": none(cache.pending, 1),
        "pending_logits": none(cache.pending_logits, 2),
        "pending_valid": none(cache.pending_valid, 1),
    }

    # what a query of the next window must exceed
    if cache.count_q is not None:
        threshold = query_threshold(
            q_router, cache.pending_queries, cache.pending_valid, *cache.count_q
        )
        used = torch.zeros_like(cache.used)
        fresh.update(
            threshold=threshold,
            used=used,
            pending_queries=none(cache.pending_queries, 1),
        )
    return dataclasses.replace(cache, **fresh)
