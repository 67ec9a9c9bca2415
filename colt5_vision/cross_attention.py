"""Conditionally routed cross attention: few queries, or all, read few tokens of a context of any
length."""

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from .branches import HeavyBranch
from .checks import (
    TokenCount,
    check_count,
    check_float_tensor,
    check_heads,
    check_int,
    check_mask,
    check_router_kwargs,
    check_token_count,
)
from .init import init_weights
from .ops import join, router_logits
from .ops.dtypes import wide_dtype
from .router import CoordinateDescentRouter
from .scheduled import ScheduledLayer


class QueriedRoutingTokens(nn.Module):
    """Routing tokens of each sample: learned ones, plus what they read in the sample's source
    tokens.

    Args:
        dim: width C.
        num_tokens: R, how many.
        heads, dim_head: number of heads and width of each of the attention by which they read.
        device, dtype: of the parameters.
    """

    def __init__(
        self, dim: int, num_tokens: int, heads: int, dim_head: int, *, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.tokens = nn.Parameter(torch.empty(num_tokens, dim, **factory))
        self.attn = HeavyBranch(dim, heads, dim_head, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the learned tokens from N(0, 1)."""
        nn.init.normal_(self.tokens)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Source tokens x (B, N, C), masked ones 0, and their mask (B, N) -> (B, R, C)."""
        # a copy: torch's FlopCounterMode stumbles over a view of a parameter without gradients
        tokens = self.tokens.repeat(x.shape[0], 1, 1)
        key_mask = None if mask is None else mask.unsqueeze(1)
        return tokens + self.attn(tokens, None, None, context=x, key_mask=key_mask)


class ConditionalRoutedCrossAttention(ScheduledLayer):
    """Attention of routed tokens of ``x`` to routed tokens of a context; the other tokens get the
    learned null token.

        x ─────── query router ─ routed tokens ─┐
                                                ├─ heavy attention ─ scatter ─ (B, N, C)
        context ─ key router ─── routed keys ───┘

    A context may have a million tokens. It is read twice, for the logits and where it was routed.
    It is copied only where a ``context_mask`` meets gradients, once. Normalisation is included, the
    residual is not.

    Args:
        dim: width C of both.
        num_tokens_q: routed queries, an int >= 1, that many, or a float in (0, 1], that share.
            None: every token queries, and there is no query router.
        num_tokens_kv: routed keys and values of the context, likewise.
        dim_head, heads: head width and heads.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm
            (``log_gradient``); False: the soft gates themselves. None: True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
            A ``cell_size`` (1, c) stratifies: each stretch of c tokens gets its share.
        kv_router_kwargs: the same of the key router alone; they go before ``router_kwargs``.
        kv_routing_tokens: R sets of routed keys, the heads split over them.
        multiply_keys_by_score: gates scale the keys too, not only the values.
        use_null_q_tokens: the null token for queries that were not routed; False: 0. None: where
            queries are routed.
        routing_from_queries: the routing tokens of the context first attend to ``x``, so that what
            is read depends on who asks. For ``router="learned"``.
        router: kind of both routers: ``"learned"``, ``"mean_query"`` (context tokens that the mean
            of ``x`` attends to), ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) section 3, its routing applied across two sequences.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: TokenCount | None = None,
        num_tokens_kv: TokenCount,
        dim_head: int = 64,
        heads: int = 8,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        kv_router_kwargs: dict | None = None,
        kv_routing_tokens: int = 1,
        multiply_keys_by_score: bool = False,
        use_null_q_tokens: bool | None = None,
        routing_from_queries: bool = False,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # checks
        self.dim = check_int("dim", dim)
        check_int("dim_head", dim_head)
        check_heads("heads", heads, "kv_routing_tokens", kv_routing_tokens)
        routes_queries = num_tokens_q is not None
        self.num_tokens_q = None
        if routes_queries:
            self.num_tokens_q = check_token_count("num_tokens_q", num_tokens_q)
        self.num_tokens_kv = check_token_count("num_tokens_kv", num_tokens_kv)
        if not routes_queries and use_null_q_tokens:
            raise ValueError("use_null_q_tokens: needs num_tokens_q, every token is a query")
        if routing_from_queries and router != "learned":
            raise ValueError(
                f"routing_from_queries: only for router='learned', got router={router!r}"
            )

        # routers
        straight = True if router_straight_through is None else router_straight_through
        common = check_router_kwargs(router_kwargs, "give kv_routing_tokens instead")
        of_keys = check_router_kwargs(kv_router_kwargs, "give kv_routing_tokens instead")
        common = {"log_gradient": straight, **common}
        own = {"straight_through": straight, "router": router, **factory}
        self.q_router = CoordinateDescentRouter(dim, **common, **own) if routes_queries else None
        self.kv_router = CoordinateDescentRouter(
            dim,
            num_routing_tokens=kv_routing_tokens,
            learned_routing_tokens=not routing_from_queries,
            **{**common, **of_keys},
            **own,
        )
        self.routing_tokens = None
        if routing_from_queries:
            self.routing_tokens = QueriedRoutingTokens(
                dim, kv_routing_tokens, heads, dim_head, **factory
            )

        # the branch
        self.heavy_attn = HeavyBranch(
            dim,
            heads,
            dim_head,
            routes=kv_routing_tokens,
            multiply_keys_by_score=multiply_keys_by_score,
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
            f"dim={self.dim}, num_tokens_q={self.num_tokens_q}, num_tokens_kv={self.num_tokens_kv}"
        )

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        num_tokens_q: TokenCount | Tensor | None = None,
        num_tokens_kv: TokenCount | Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C), any N >= 1.
            context: (B, M, C), any M >= 1.
            num_tokens_q, num_tokens_kv: override the module's. A tensor (B,) is a count of each
                sample: integers, or floats, that share of its valid tokens; at most the module's
                own count.
            mask: (B, N) bool, True = valid. Masked tokens are not read, not routed, and come out as
                0.
            context_mask: (B, M) bool, True = valid. Masked tokens are neither read nor routed.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        self._check_inputs(x, context, mask, context_mask)
        if num_tokens_q is not None and self.q_router is None:
            raise ValueError(
                "num_tokens_q: the module was made without a query router (num_tokens_q=None)"
            )
        own_q, own_kv = self.queries_now(self.num_tokens_q), self.keys_now(self.num_tokens_kv)
        count_q = check_count("num_tokens_q", num_tokens_q, own_q, x.shape[0])
        count_kv = check_count("num_tokens_kv", num_tokens_kv, own_kv, x.shape[0])
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        if context_mask is not None and torch.is_grad_enabled():
            # a masked token may be NaN: it is never ranked, but the gradient of its logit would be
            context = torch.where(context_mask.unsqueeze(-1), context, 0)

        # what is read
        routed_kv = self.kv_router(
            context,
            num_tokens=count_kv.slots,
            counts=count_kv.filled,
            mask=context_mask,
            grid_size=(1, context.shape[1]),
            **self._compared(x, mask, context),
        )
        full = context_mask is None and count_kv.filled is None
        read = {"context": context, "key_mask": None if full else routed_kv.mask}

        # who reads
        if self.q_router is None:
            out = self.heavy_attn(x, None, routed_kv, **read)
        else:
            place = {"mask": mask, "grid_size": (1, x.shape[1])}
            routed_q = self.q_router(x, num_tokens=count_q.slots, counts=count_q.filled, **place)
            routed_q = routed_q.only_route()
            heavy = self.heavy_attn(x, routed_q, routed_kv, **read)
            nothing = heavy.new_zeros(()).expand(x.shape)
            out = join(nothing, heavy, routed_q, self.null_q_token)
        return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)

    def _check_inputs(self, x, context, mask: Tensor | None, context_mask: Tensor | None) -> None:
        for name, tokens in (("x", x), ("context", context)):
            check_float_tensor(name, tokens, ndim=3)
            if tokens.shape[-1] != self.dim or tokens.shape[1] < 1:
                length = "N" if name == "x" else "M"
                raise ValueError(
                    f"{name}: expected (B, {length}, {self.dim}) of at least one token, "
                    f"got {tuple(tokens.shape)}"
                )
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"context: expected {x.shape[0]} samples, as many as x, got {context.shape[0]}"
            )
        check_mask("mask", mask, x.shape[:2])
        check_mask("context_mask", context_mask, context.shape[:2])

    def _compared(self, x: Tensor, mask: Tensor | None, context: Tensor) -> dict[str, Tensor]:
        """What the key router compares the context with, where it needs to be told."""
        if self.routing_tokens is not None:
            return {"routing_tokens": self.routing_tokens(x, mask)}
        if self.kv_router.kind == "mean_query":
            return {"logits": self._mean_query_logits(x, mask, context)}
        return {}

    def _mean_query_logits(self, x: Tensor, mask: Tensor | None, context: Tensor) -> Tensor:
        """(B, R, M), what the mean of the normalised x attends to."""
        unit = nn.functional.rms_norm(x.to(wide_dtype(x)), (self.dim,), eps=1e-6)
        if mask is None:
            mean = unit.mean(1, keepdim=True)
        else:
            valid = mask.unsqueeze(-1)
            mean = (unit * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        return router_logits(context, mean).expand(-1, self.kv_router.num_routing_tokens, -1)
