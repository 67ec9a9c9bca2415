"""Conditionally routed cross attention: few queries, or all, read few tokens of a context of any length."""

import torch
from torch import Tensor, nn

from .branches import RoutedAttention, add_heavy_, filled_with, numbers
from .checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    check_token_count,
    slots_and_counts,
)
from .ops import router_logits
from .predecessor import check_predecessor_options
from .router import CoordinateDescentRouter, Routing, gather_tokens, router_options


class QueriedRoutingTokens(nn.Module):
    """Routing tokens of each sample: learned ones, plus what they read in the sample's source tokens.

    Args:
        dim: width C.
        num_tokens: R, how many.
        heads, dim_head: number of heads and width of each of the attention by which they read.
        device, dtype: of the parameters.
    """

    def __init__(self, dim: int, num_tokens: int, heads: int, dim_head: int, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.tokens = nn.Parameter(torch.randn(num_tokens, dim, **factory))
        self.attn = RoutedAttention(dim, heads, dim_head, **factory)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Source tokens x (B, N, C), masked ones 0, and their mask (B, N) -> (B, R, C)."""
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        key_mask = None if mask is None else mask.unsqueeze(1)
        return tokens + self.attn(tokens, None, None, context=x, key_mask=key_mask)


class ConditionalRoutedCrossAttention(nn.Module):
    """Attention of routed tokens of ``x`` to routed tokens of a context; the other tokens get the learned null token.

    A context may have a million tokens: it is read twice, for the logits and where it was routed, and not copied, but
    once where a ``context_mask`` meets gradients. Normalisation is included, the residual is not.

    Args:
        dim: width C of both.
        num_tokens_q: routed queries, an int >= 1 (that many) or a float in (0, 1] (that share). None: every token
            queries, and there is no query router.
        num_tokens_kv: routed keys and values of the context, likewise.
        num_sets_kv: of the predecessor, where it had no effect: None or 1, use ``kv_routing_tokens``.
        dim_head, heads: head width and heads.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm (``log_gradient``).
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
        kv_routing_tokens: R sets of routed keys, the heads split over them.
        multiply_keys_by_score: gates scale the keys too, not only the values.
        use_triton, use_flash_attn: of the predecessor: None or True, kernels are used wherever they can run.
        use_null_q_tokens: the null token for queries that were not routed; False: 0.
        route_block_size: stratify: each stretch of this many tokens of the context gets its share of the routed ones,
            the last and shorter one too.
        routing_from_queries: the routing tokens of the context first attend to ``x``, so that what is read depends on
            who asks. For ``router="learned"``.
        router: kind of both routers: ``"learned"``, ``"mean_query"`` (context tokens that the mean of ``x`` attends
            to), ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752) section 3, its routing applied across two sequences.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: TokenCount | None = None,
        num_tokens_kv: TokenCount,
        num_sets_kv: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: dict | None = None,
        kv_routing_tokens: int = 1,
        multiply_keys_by_score: bool = False,
        use_triton: bool | None = None,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool | None = None,
        route_block_size: int | None = None,
        routing_from_queries: bool = False,
        router: str = "learned",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_predecessor_options(use_triton=use_triton, use_flash_attn=use_flash_attn, num_sets_kv=num_sets_kv)
        factory = {"device": device, "dtype": dtype}
        self.dim = check_int("dim", dim)
        self.num_tokens_q = None if num_tokens_q is None else check_token_count("num_tokens_q", num_tokens_q)
        self.num_tokens_kv = check_token_count("num_tokens_kv", num_tokens_kv)
        check_int("dim_head", dim_head)
        if check_int("heads", heads) % check_int("kv_routing_tokens", kv_routing_tokens):
            raise ValueError(f"kv_routing_tokens: {heads} heads are not divisible by {kv_routing_tokens} routes")
        if routing_from_queries and router != "learned":
            raise ValueError(f"routing_from_queries: only for router='learned', got router={router!r}")

        default = {"log_gradient": router_straight_through}
        route = router_options(router_kwargs, "give kv_routing_tokens instead", **default)
        route.update(straight_through=router_straight_through, router=router, **factory)
        self.q_router = None if num_tokens_q is None else CoordinateDescentRouter(dim, **route)
        if route_block_size is not None:
            if "route_block_size" in route:
                raise ValueError("route_block_size: router_kwargs has one already, expected one of the two")
            route["route_block_size"] = route_block_size
        self.kv_router = CoordinateDescentRouter(
            dim, num_routing_tokens=kv_routing_tokens, learned_routing_tokens=not routing_from_queries, **route
        )
        self.routing_tokens = None
        if routing_from_queries:
            self.routing_tokens = QueriedRoutingTokens(dim, kv_routing_tokens, heads, dim_head, **factory)
        self.null_q_token = None
        if num_tokens_q is not None and use_null_q_tokens:
            self.null_q_token = nn.Parameter(torch.zeros(dim, **factory))
        self.heavy_attn = RoutedAttention(dim, heads, dim_head, multiply_keys_by_score, **factory)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_tokens_q={self.num_tokens_q}, num_tokens_kv={self.num_tokens_kv}"

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
            num_tokens_q, num_tokens_kv: override the module's; a tensor (B,), integers or shares of the valid tokens,
                gives each sample its own, up to the module's.
            mask: (B, N) bool, True = valid. Masked tokens are not read, not routed, and come out as 0.
            context_mask: (B, M) bool, True = valid. Masked tokens are neither read nor routed.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        for name, tokens in (("x", x), ("context", context)):
            check_float_tensor(name, tokens, ndim=3)
            if tokens.shape[-1] != self.dim or tokens.shape[1] < 1:
                expected = f"(B, {'N' if name == 'x' else 'M'}, {self.dim}) of at least one token"
                raise ValueError(f"{name}: expected {expected}, got {tuple(tokens.shape)}")
        batch = x.shape[0]
        if context.shape[0] != batch:
            raise ValueError(f"context: expected {batch} samples, as many as x, got {context.shape[0]}")
        check_mask("mask", mask, x.shape[:2])
        check_mask("context_mask", context_mask, context.shape[:2])
        if num_tokens_q is not None and self.q_router is None:
            raise ValueError("num_tokens_q: the module was made without a query router (num_tokens_q=None)")
        count_q = slots_and_counts("num_tokens_q", num_tokens_q, self.num_tokens_q, batch)
        count_kv = slots_and_counts("num_tokens_kv", num_tokens_kv, self.num_tokens_kv, batch)

        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0)
        routed_q = None
        if self.q_router is not None:
            routing = self.q_router(x, **numbers(*count_q), mask=mask, grid_size=(1, x.shape[1]))
            routed_q = Routing(*(field.squeeze(1) for field in routing))
        context, key_index, routed_kv = self._route_context(x, context, mask, context_mask, count_kv)
        heavy = self.heavy_attn(
            x,
            None if routed_q is None else routed_q.indices,
            key_index,
            context=context,
            key_gates=routed_kv.gates,
            key_mask=None if context_mask is None and count_kv[1] is None else routed_kv.mask,
        )
        if routed_q is None:
            out = heavy
        else:
            out = filled_with(self.null_q_token, x, heavy.dtype)
            out = add_heavy_(out, heavy, routed_q, self.null_q_token, counted=count_q[1] is not None)
        return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)

    def _route_context(
        self, x: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None, count
    ) -> tuple[Tensor, Tensor, Routing]:
        """Tokens to read (B, M or R * K, C), the index of those of each route among them (B, R, K), their routing."""
        if context_mask is not None and torch.is_grad_enabled():
            # a masked token may be NaN: ranked it is never, but the gradients of its logit would be NaN
            context = torch.where(context_mask.unsqueeze(-1), context, 0)
        given = {}
        if self.routing_tokens is not None:
            given["routing_tokens"] = self.routing_tokens(x, mask)
        elif self.kv_router.router == "mean_query":
            given["logits"] = self._mean_query_logits(x, mask, context)
        grid_size = (1, context.shape[1])
        routed = self.kv_router(context, **numbers(*count), mask=context_mask, grid_size=grid_size, **given)
        if context_mask is None:
            return context, routed.indices, routed
        rows = torch.where(routed.mask.unsqueeze(-1), gather_tokens(context, routed.indices), 0)
        routes, slots = rows.shape[1:3]
        index = torch.arange(routes * slots, device=x.device).view(1, routes, slots).expand_as(routed.indices)
        return rows.flatten(1, 2), index, routed

    def _mean_query_logits(self, x: Tensor, mask: Tensor | None, context: Tensor) -> Tensor:
        """(B, R, M), what the mean of the normalised x attends to."""
        mean = nn.functional.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (self.dim,), eps=1e-6)
        if mask is None:
            mean = mean.mean(1, keepdim=True)
        else:
            valid = mask.unsqueeze(-1)
            mean = (mean * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        return router_logits(context, mean).expand(-1, self.kv_router.num_routing_tokens, -1)
