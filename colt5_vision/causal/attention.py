"""Conditionally routed attention for sequences that are made one token at a time: nothing depends
on what follows."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .._fx import fx_leaf
from ..checks import (
    Count,
    TokenCount,
    check_float_tensor,
    check_heads,
    check_int,
    check_mask,
    check_rotary,
    check_router,
)
from ..init import init_weights
from ..ops import join
from ..routing import Routing, gather_tokens
from ..scheduled import ScheduledLayer
from .branches import CausalWindowAttention, PastKeysBranch
from .cache import AutoregressiveCache, check_cache, rolled_over
from .checks import (
    check_causal_options,
    check_key_count,
    check_query_count,
    check_windows,
    count_keys,
    count_queries,
)
from .routing import (
    CausalRouter,
    Threshold,
    admit_queries,
    first_slots,
    query_threshold,
    route_keys,
)

KINDS = ("learned", "random", "grid")
"""Kinds of routing that do not look ahead; the mean query is a mean over the future."""


class ConditionalRoutedAutoregressiveAttention(ScheduledLayer):
    """Strictly causal attention: near tokens by windows, a few routed tokens of all the past for
    the rest.

        x ─┬─ windows of each token ─ light attention ──────────────────────────────┐
           ├─ query router ─ above the last window's threshold ─┐                   │
           └─ key router ─── top K of all windows before ───────┴─ heavy attention ─┴─ (B, N, C)

    ``light(x) + heavy(x)`` with separate weights. The light branch is causal attention to a token's
    window and the one before. The heavy branch sees the sequence in windows, too: a token attends
    to the top K routing logits among the tokens of all windows before its own, and a learned null
    key. Window 0 has nothing before it and no heavy output. Time and memory are O(N (w + K)).
    Normalisation is included, the residual is not.

    Queries are routed causally: a token is a query if its logit exceeds the k-th largest of the
    window before, first come, first served up to k a window (a top-k of its own window would let
    later tokens push it out). Tokens that are not routed get the learned null token.

    Windows count from the first token, be it padding. Token by token with a cache gives what the
    whole sequence gives:

        out, cache = attention(prompt, return_cache=True)
        out, cache = attention(next_token, cache=cache)

    Args:
        dim: width C.
        num_heavy_tokens_q: queries of the heavy branch in each window, an int >= 1 (that many) or a
            float in (0, 1] (that share of the window). None, or as many as a window has: every
            token, and there is no query router.
        num_heavy_tokens_kv: K, routed keys and values, an int >= 1; fewer while fewer lie before
            the window.
        num_routed_kv: R sets of routed keys, the heads split over them.
        light_dim_head, light_heads: head width and heads of the light branch.
        light_window_size: tokens of a window of the light branch.
        heavy_window_size: w, of the heavy branch; default that of the light one. At most that, or
            twice that: any other larger window would hold tokens that neither branch shows to the
                last ones of the window.
        heavy_dim_head, heavy_heads: of the heavy branch.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm
            (``log_gradient``); False: the soft gates themselves. None: True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
        multiply_keys_by_score, multiply_queries_by_score: gates scale the keys (queries) too, not
            only the values (outputs).
        use_null_q_tokens: where queries are routed, the learned null token for the others; False:
            0.
        rotary_emb: rotary positions in the heavy branch.
        router: kind of both routers: ``"learned"``, ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for an argument that does not fit.

    Source: CoLT5 (arXiv 2303.09752) section 3; the windows of colt5-attention 0.11.2.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_window_size: int | None = None,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_null_q_tokens: bool | None = None,
        rotary_emb: bool = False,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # checks
        self.dim = check_int("dim", dim)
        check_router(router, KINDS)
        options = check_causal_options(router_kwargs)
        check_int("light_heads", light_heads)
        check_int("light_dim_head", light_dim_head)
        check_heads("heavy_heads", heavy_heads, "num_routed_kv", num_routed_kv)
        check_rotary("heavy_dim_head", heavy_dim_head, 2, rotary_emb)
        light, width = check_windows(light_window_size, heavy_window_size)

        # how many, in windows of how many
        self.heavy_window_size = width
        self.num_heavy_tokens_kv = check_key_count(num_heavy_tokens_kv)
        self.num_heavy_tokens_q = check_query_count(
            num_heavy_tokens_q, width, multiply_queries_by_score
        )
        routes_queries = self.num_heavy_tokens_q is not None

        # the light branch
        self.light_attn = CausalWindowAttention(dim, light_heads, light_dim_head, light, **factory)

        # the routers
        straight = True if router_straight_through is None else router_straight_through
        options = {"log_gradient": straight, **options}
        options |= {"straight_through": straight, "router": router, **factory}
        self.q_router = None
        if routes_queries:
            self.q_router = CausalRouter(dim, first_row=num_routed_kv, **options)
        self.kv_router = CausalRouter(dim, num_routing_tokens=num_routed_kv, **options)

        # the heavy branch
        self.heavy_attn = PastKeysBranch(
            dim,
            heavy_heads,
            heavy_dim_head,
            routes=num_routed_kv,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            rotary_emb=rotary_emb,
            **factory,
        )
        self.null_q_token = None
        if routes_queries and use_null_q_tokens is not False:
            self.null_q_token = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The null token starts at 0."""
        if self.null_q_token is not None:
            nn.init.zeros_(self.null_q_token)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heavy_tokens_q={self.num_heavy_tokens_q}, "
            f"num_heavy_tokens_kv={self.num_heavy_tokens_kv}, "
            f"heavy_window_size={self.heavy_window_size}"
        )

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_tokens_kv: int | Tensor | None = None,
        cache: AutoregressiveCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, AutoregressiveCache]:
        """Attend.

        Args:
            x: (B, N, C), any N >= 1.
            mask: (B, N) bool, True = valid. Masked tokens are not read, not routed, and come out as
                0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's; a tensor (B,) gives each
                sample its own, up to the module's: integers, or shares, for queries of the window,
                for keys of the valid tokens before it. A cache keeps what it began with.
            cache: of the tokens so far; ``x`` are those that follow, one or several.
            return_cache: also return the cache to go on with; always with ``cache``.

        Returns:
            The shape of ``x``; with a cache, a pair (output, cache).

        Raises:
            TypeError, ValueError: for an argument that does not fit.
        """
        check_float_tensor("x", x, ndim=3)
        batch, num_tokens, dim = x.shape
        if dim != self.dim or num_tokens < 1:
            raise ValueError(f"x: expected (B, N, {self.dim}) with N >= 1, got {tuple(x.shape)}")
        check_mask("mask", mask, (batch, num_tokens))
        if cache is not None:
            check_cache(cache, self, batch, (num_heavy_tokens_q, num_heavy_tokens_kv))
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        if cache is None:
            count_q = self._count_queries(num_heavy_tokens_q, batch)
            own = self.keys_now(self.num_heavy_tokens_kv)
            count_kv = count_keys(num_heavy_tokens_kv, own, batch)
            out, cache = self._whole(x, mask, count_q, count_kv, return_cache)
        else:
            out, cache, return_cache = *self._continued(x, mask, cache), True
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), out, 0)
        return (out, cache) if return_cache else out

    def _count_queries(self, value, batch: int) -> Count | None:
        """None where all tokens of a window are queries."""
        if self.q_router is not None:
            own = self.queries_now(self.num_heavy_tokens_q)
            return count_queries(value, own, self.heavy_window_size, batch)
        if value is not None:
            raise ValueError(
                "num_heavy_tokens_q: the module was made without a query router, "
                "every token is a query"
            )
        return None

    def _logits(self, x: Tensor, position: int) -> tuple[Tensor | None, Tensor]:
        """Routing logits of queries (B, N), None where all are, and of keys (B, R, N); tokens from
        ``position`` on."""
        keys = self.kv_router(x, position)
        return None if self.q_router is None else self.q_router(x, position).squeeze(1), keys

    def _heavy(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Tensor,
        key_gates: Tensor | None,
        key_mask: Tensor | None,
        taken: Tensor | None,
        query_gates: Tensor | None,
        slots: int | None,
    ) -> Tensor:
        """The heavy branch of S windows: tokens (S, n, C), positions (S or 1, n), kv with its null
        key in front.

        ``taken`` (S, n), of which at most ``slots`` are True, and ``query_gates`` are None where
        all are queries.
        """
        if taken is None:
            return self.heavy_attn(tokens, positions, kv, key_gates, key_mask, None)

        # which tokens ask: those taken, in the first slots; all in place where that spares none
        length = tokens.shape[1]
        index, filled = torch.arange(length, device=tokens.device).expand(taken.shape), taken
        asking, places = tokens, positions
        if slots < length:
            index = first_slots(taken, slots)
            filled, index = index < length, index.clamp_max(length - 1)
            asking, places = gather_tokens(tokens, index), positions.expand(taken.shape)
            places = places.gather(1, index)
            query_gates = None if query_gates is None else query_gates.gather(1, index)

        # they attend, and their rows go back to their places
        heavy = self.heavy_attn(asking, places, kv, key_gates, key_mask, query_gates)
        gates = torch.ones_like(index, dtype=heavy.dtype) if query_gates is None else query_gates
        routing = Routing(index, torch.where(filled, gates, 0), gates, filled)
        nothing = heavy.new_zeros(()).expand(tokens.shape)
        return join(nothing, heavy, routing, self.null_q_token)

    def _whole(
        self, x: Tensor, mask: Tensor | None, count_q: Count | None, count_kv: Count, keep: bool
    ) -> tuple[Tensor, AutoregressiveCache | None]:
        """A sequence from its first token on."""
        # every token to its window and the one before
        light, light_kv = self.light_attn(x, mask)

        # windows, the last filled up; a cache is for the window of the next token; the second
        # window gives every parameter a gradient, if 0
        batch, length, width = *x.shape[:2], self.heavy_window_size
        windows = max(2, length // width + 1 if keep else (length + width - 1) // width)
        spare = windows * width - length
        x = pad(x, (0, 0, 0, spare))
        valid = x.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        valid = pad(valid, (0, spare)).unflatten(1, (windows, width))

        # what each window but the first reads
        logits_q, logits_kv = self._logits(x, 0)
        keys = route_keys(
            self.kv_router, logits_kv.unflatten(2, (windows, width)), valid, *count_kv
        )
        tokens, positions = self.heavy_attn.norm(x), torch.arange(windows * width, device=x.device)
        kv = self.heavy_attn.key_values(tokens, positions)

        # slot 0 of each window is the null key; (B, windows - 1, 1 + K, R), so that no copy is
        # needed after the gather
        index = pad(keys.indices + 1, (1, 0)).permute(0, 2, 3, 1).flatten(1, 2)
        source = self.heavy_attn.with_null(kv)
        index = index.view(*index.shape, 1, 1, 1).expand(-1, -1, -1, *source.shape[3:])
        routed = source.gather(1, index).unflatten(1, (windows - 1, -1))

        # which of its tokens ask
        taken = query_gates = threshold = None
        if count_q is not None:
            scores = logits_q.unflatten(1, (windows, width))
            threshold = query_threshold(self.q_router, scores[:, :-1], valid[:, :-1], *count_q)
            room = count_q.slots if count_q.filled is None else count_q.filled.view(-1, 1, 1)
            taken, query_gates = admit_queries(
                self.q_router, scores[:, 1:], valid[:, 1:], threshold, room
            )

        # the heavy branch, a window a row of the batch
        def rows(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.flatten(0, 1)

        def per_window(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.transpose(1, 2).flatten(0, 1)

        # where tokens and counts are whole, one window before fills every slot
        every_slot_full = mask is None and count_kv.filled is None and count_kv.slots <= width
        heavy = self._heavy(
            tokens.unflatten(1, (windows, width))[:, 1:].flatten(0, 1),
            positions.view(windows, width)[1:].repeat(batch, 1),
            rows(routed),
            per_window(keys.gates),
            None if every_slot_full else per_window(keys.used),
            rows(taken),
            rows(query_gates),
            count_q and count_q.slots,
        )

        # both branches; nothing heavy in the first window
        heavy = heavy.unflatten(0, (batch, windows - 1)).flatten(1, 2)
        out = light + pad(heavy, (0, 0, width, 0))[:, :length].to(light.dtype)
        if not keep:
            return out, None

        # what the next token needs: of both branches, of the window before, of its own so far
        window = length // width  # of the next token
        begin, row, number = window * width, max(window - 1, 0), min(count_kv.slots, window * width)
        first = self.light_attn.first_seen(length)

        # copies, or the cache would keep the whole sequence
        cache = AutoregressiveCache(
            position=length,
            light=light_kv[:, :, first:].clone(),
            light_valid=valid.flatten(1)[:, first:length].clone(),
            routed=routed[:, row, 1 : 1 + number].clone(),
            routed_logits=keys.logits[:, :, row, :number].clone(),
            routed_valid=keys.valid[:, :, row, :number].clone(),
            routed_used=keys.used[:, :, row, :number].clone(),
            routed_gates=None if keys.gates is None else keys.gates[:, :, row, :number].clone(),
            past=valid.flatten(1)[:, :begin].sum(1),
            pending=kv[:, begin:length].clone(),
            pending_logits=logits_kv[:, :, begin:length].clone(),
            pending_queries=None if count_q is None else logits_q[:, begin:length].clone(),
            pending_valid=valid.flatten(1)[:, begin:length].clone(),
            threshold=threshold
            and Threshold(*(None if part is None else part[:, row] for part in threshold)),
            used=None if taken is None else taken[:, row, : length - begin].sum(1) * (window > 0),
            count_q=count_q,
            count_kv=count_kv,
        )
        return out, cache

    def _continued(
        self, x: Tensor, mask: Tensor | None, cache: AutoregressiveCache
    ) -> tuple[Tensor, AutoregressiveCache]:
        """Tokens after those of a cache, up to the end of a window of the heavy branch at a
        time."""
        outs, done, width = [], 0, self.heavy_window_size
        while done < x.shape[1]:
            part = slice(done, done + width - cache.position % width)
            out, cache = self._step(x[:, part], None if mask is None else mask[:, part], cache)
            outs.append(out)
            done = part.stop
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0], cache

    def _step(
        self, x: Tensor, mask: Tensor | None, cache: AutoregressiveCache
    ) -> tuple[Tensor, AutoregressiveCache]:
        """Tokens x (B, n, C) of one window."""
        start, width, count_q = cache.position, self.heavy_window_size, cache.count_q
        end = start + x.shape[1]
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask

        # the light branch, and what the heavy one will need of these tokens
        out, light, light_valid = self.light_attn.step(
            x, valid, start, cache.light, cache.light_valid
        )
        logits_q, logits_kv = self._logits(x, start)
        tokens, positions = self.heavy_attn.norm(x), torch.arange(start, end, device=x.device)
        kv, used = self.heavy_attn.key_values(tokens, positions), cache.used

        # past the first window: routed keys, and queries above the threshold of the window before
        if start >= width:
            taken = query_gates = None
            if count_q is not None:
                room = (count_q.slots if count_q.filled is None else count_q.filled) - used
                taken, query_gates = admit_queries(
                    self.q_router, logits_q, valid, cache.threshold, room.unsqueeze(1)
                )
                used = used + taken.sum(1)
            heavy = self._heavy(
                tokens,
                positions.unsqueeze(0),
                self.heavy_attn.with_null(cache.routed),
                cache.routed_gates,
                cache.routed_used,
                taken,
                query_gates,
                count_q and count_q.slots,
            )
            out = out + heavy.to(out.dtype)

        # what the next step reads
        joined = {
            "position": end,
            "light": light,
            "light_valid": light_valid,
            "pending": torch.cat([cache.pending, kv], 1),
            "pending_logits": torch.cat([cache.pending_logits, logits_kv], 2),
            "pending_queries": None
            if count_q is None
            else torch.cat([cache.pending_queries, logits_q], 1),
            "pending_valid": torch.cat([cache.pending_valid, valid], 1),
            "used": used,
        }
        cache = replace(cache, **joined)
        return out, cache if end % width else rolled_over(cache, self.q_router, self.kv_router)
