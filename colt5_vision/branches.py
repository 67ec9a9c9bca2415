"""What the routed attentions of maps, of sequences and across two sequences share: their branches, and how they join."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import TokenCount, check_int, check_token_count
from .ops import gated_scatter_add_, gather_normalize
from .router import (
    CoordinateDescentRouter,
    Routing,
    gather_tokens,
    learned_logits,
    router_options,
)

Rotation = Callable[[Tensor, Tensor], Tensor]
"""Turns queries or keys (B, heads, N, head_dim) by the positions of their tokens, int64 that broadcast to (B, heads, N)."""

Near = Callable[[Tensor], Tensor]
"""Attention of every token to those near it: q, k, v (B, N, 3, heads, head_dim) -> (B, N, heads * head_dim)."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, head_dim) -> (B, N, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


class Projection(nn.Linear):
    """``nn.Linear`` that can be given a bias with a call: the matmul adds it, at no pass over the output."""

    output_layer = "self"

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias if bias is None else bias)


def project_out(to_out: nn.Module, x: Tensor, null: Tensor | None) -> Tensor:
    """``to_out(x)``, plus ``null`` (C,) in every token."""
    if null is None:
        return to_out(x)
    if isinstance(to_out, Projection):
        return to_out(x, null.to(to_out.weight.dtype))
    out = to_out(x)  # an adapter took its place
    return out + null.to(out.dtype)


def _is_fresh(module: nn.Module) -> bool:
    """Whether what a module returns is the output of a Linear, unchanged, and nobody else has seen it.

    Exactly these types: a subclass or a wrapper may go on from there. A module of ours says by ``output_layer`` in which
    of its layers it ends, or that it is such a Linear itself.
    """
    if module._forward_hooks or torch.nn.modules.module._global_forward_hooks:
        return False
    kind = type(module)
    if kind is nn.Sequential:
        return len(module) > 0 and _is_fresh(module[-1])
    layer = vars(kind).get("output_layer")
    return kind is nn.Linear or layer == "self" or (layer is not None and _is_fresh(getattr(module, layer)))


def own_output(out: Tensor, module: nn.Module) -> Tensor:
    """``out`` of ``module`` for changing in place: the same memory where a Linear made it, else a copy.

    A Linear's autograd does not need its output. Other layers' may; what a hook sees should stay as it saw it; and a
    dispatch mode, that of selective checkpointing, may keep what an operator returned.
    """
    watched = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    if watched or not _is_fresh(module):
        return out.clone()
    # not a view for autograd: in place on a view would copy the gradient of the whole map
    return torch.ops.aten._unsafe_view.default(out, out.shape)


class LightBranch(nn.Module):
    """The light branch: pre-normalised attention of every token to those near it; which those are comes with the call.

    Args:
        dim: width C.
        heads, dim_head: number of heads and width of each.
        norm: applied first, to (..., C).
        device, dtype: of the parameters.
    """

    output_layer = "to_out"

    def __init__(self, dim: int, heads: int, dim_head: int, norm: nn.Module, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.norm = heads, norm
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = Projection(heads * dim_head, dim, bias=False, **factory)
        self.start_small()

    @torch.no_grad()
    def start_small(self) -> None:
        """Scale freshly initialised outputs down, once; for who initialises a model anew.

        At first both branches are means of random values. What is near a token, and differs from token to token, would
        drown what a few routed tokens tell all of them, and the heavy branch and its router would learn nothing.
        """
        self.to_out.weight.mul_(0.2)

    def forward(self, x: Tensor, near: Near, null: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) to (B, N, C); ``null`` (C,) is added to every one."""
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        return project_out(self.to_out, near(qkv), null)


class RoutedAttention(nn.Module):
    """The heavy branch: routed tokens, or all, attend to the routed tokens of each route and to one null key.

    The heads are split over the R routes. The null key and value start at 0, so an empty selection gives 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        multiply_keys_by_score: bool = False,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.multiply_keys_by_score = heads, multiply_keys_by_score
        self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
        self.null_kv = nn.Parameter(torch.zeros(2, heads, dim_head, **factory))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    def _normalized(self, x: Tensor, indices: Tensor | None) -> Tensor:
        if indices is None:
            return self.norm(x)
        norm = self.norm
        watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
        if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None or watched:
            return norm(gather_tokens(x, indices))
        return gather_normalize(x, indices, norm.weight, eps=norm.eps)

    def forward(
        self,
        x: Tensor,
        query_index: Tensor | None,
        key_index: Tensor | None,
        *,
        context: Tensor | None = None,
        key_gates: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_gates: Tensor | None = None,
        rotate: Rotation | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C), what asks.
            query_index: (B, Q) int64 into the N tokens of x; None: all of them ask.
            key_index: (B, R, K) int64 into the tokens of ``context``; None: all of them are read, by every head.
            context: (B, M, C), what is read; default x.
            key_gates: (B, R, K), scale the values.
            key_mask: (B, R, K) bool, False where a key must not be read.
            query_gates: (B, Q), scale the queries.
            rotate: positions, see ``Rotation``; None: without.

        Returns:
            (B, Q, C).
        """
        context = x if context is None else context
        q = split_heads(self.to_q(self._normalized(x, query_index)), self.heads)
        if query_gates is not None:
            q = q * query_gates.to(q.dtype)[:, None, :, None]
        routes = 1 if key_index is None else key_index.shape[1]
        group = self.heads // routes
        # each route has its own rows of to_kv: (route, head of the route, key and value)
        rows = self._normalized(context, key_index)
        rows = rows.unsqueeze(1) if key_index is None else rows
        kv = torch.stack(
            [nn.functional.linear(rows[:, r], w) for r, w in enumerate(self.to_kv.weight.chunk(routes))], 1
        )
        k, v = rearrange(kv, "b r n (h s d) -> s b (r h) n d", h=group, s=2).unbind(0)
        if key_gates is not None:
            gates = key_gates.to(v.dtype).repeat_interleave(group, 1).unsqueeze(-1)
            v = v * gates
            if self.multiply_keys_by_score:
                k = k * gates
        if rotate is not None:
            if query_index is None:
                query_index = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
            if key_index is None:
                key_index = torch.arange(context.shape[1], device=x.device).view(1, 1, -1)
            q = rotate(q, query_index.unsqueeze(1))
            k = rotate(k, key_index.repeat_interleave(group, 1))
        null_k, null_v = self.null_kv.to(v.dtype).unsqueeze(2).expand(2, self.heads, 1, v.shape[-1])
        k = torch.cat([null_k.expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([null_v.expand(v.shape[0], -1, -1, -1), v], 2)
        bias = None
        if key_mask is not None:
            bias = nn.functional.pad(key_mask, (1, 0), value=True).repeat_interleave(group, 1).unsqueeze(2)
            bias = bias if routes > 1 else bias[:, :1]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(merge_heads(out))


def shared_logits(q_router: CoordinateDescentRouter | None, kv_router: CoordinateDescentRouter, x: Tensor):
    """What the routers of queries and of keys are given: where both are learned alike, logits from one read of x."""
    routers = (q_router, kv_router)
    if not all(type(router) is CoordinateDescentRouter and router.routing_token is not None for router in routers):
        return {}, {}
    if q_router.normalize != kv_router.normalize:
        return {}, {}
    return tuple({"logits": logits} for logits in learned_logits(routers, x))


def add_heavy_(out: Tensor, heavy: Tensor, routing: Routing, null: Tensor | None, counted: bool = False) -> Tensor:
    """Add the gated ``heavy`` (B, Q, C) of routed tokens to ``out`` (B, N, C), in place, where it replaces ``null``.

    Args:
        routing: of one route, its fields (B, Q).
        null: (C,), what every token of ``out`` was given; None: nothing.
        counted: the samples have token counts of their own: an empty slot may point at a valid token, which keeps
            what it was given. Without, it points at a masked one.
    """
    gates = routing.gates
    if counted:
        heavy = torch.where(routing.mask.unsqueeze(-1), heavy, 0 if null is None else null.to(heavy.dtype))
        gates = torch.where(routing.mask, gates, 1)
    return gated_scatter_add_(out, heavy, routing.indices, gates=gates, null=null)


def filled_with(null: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of ``x`` with ``null`` (C,), or 0, in every token, for changing in place."""
    if null is None:
        return x.new_zeros(x.shape, dtype=dtype)
    return null.to(dtype).expand(x.shape).clone()


def numbers(num_tokens: TokenCount, counts: Tensor | None) -> dict:
    """What a router is given to say how many: the slots, and where samples have their own counts those."""
    return {"num_tokens": num_tokens} if counts is None else {"num_tokens": num_tokens, "counts": counts}


class RoutedBranches(nn.Module):
    """A light branch, or none, plus the heavy branch of routed tokens: CoLT5's sum. What modules of it share.

    Attributes:
        q_router: None: every token is a query of the heavy branch.
        kv_router: of the keys.
        light_attn: :class:`LightBranch` or None.
        heavy_attn: :class:`RoutedAttention`.
        null_q_token: (C,), what a token that is not routed gets in place of a heavy output; None: 0.
        multiply_queries_by_score: gates scale the queries.
    """

    def set_counts(
        self,
        num_heavy_tokens_q: TokenCount | None,
        num_heavy_tokens_kv: TokenCount,
        heavy_heads: int,
        heavy_dim_head: int,
        num_routed_kv: int,
        rotary_multiple: int | None,
    ) -> None:
        """Check and keep the token counts; check that heads divide over routes and features over rotary positions."""
        count = num_heavy_tokens_q
        self.num_heavy_tokens_q = None if count is None else check_token_count("num_heavy_tokens_q", count)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)
        if check_int("heavy_heads", heavy_heads) % check_int("num_routed_kv", num_routed_kv):
            raise ValueError(f"num_routed_kv: {heavy_heads} heavy_heads are not divisible by {num_routed_kv} routes")
        if check_int("heavy_dim_head", heavy_dim_head) % (rotary_multiple or 1):
            raise ValueError(f"heavy_dim_head: rotary_emb needs a multiple of {rotary_multiple}, got {heavy_dim_head}")

    def make_routers(
        self, dim: int, num_routed_kv: int, router_kwargs: dict | None, straight_through: bool | None, **own
    ) -> None:
        """The router of queries, where their number is given, and that of keys; ``own`` goes before ``router_kwargs``."""
        if straight_through is None:
            # measured over maps, see docs/results.md: straight through, one training of "sum" in six forgot what it
            # knew; where queries are routed, too, soft gates may fail in a short training
            straight_through = self.num_heavy_tokens_q is not None or getattr(self, "fusion", "sum") == "softmax"
        default = {"log_gradient": straight_through}
        options = router_options(router_kwargs, "give num_routed_kv instead", **default)
        route = {**options, **own, "straight_through": straight_through}
        self.q_router = None if self.num_heavy_tokens_q is None else CoordinateDescentRouter(dim, **route)
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **route)

    def route_queries(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, count, given) -> Routing | None:
        """Routing of one route, its fields (B, Q); None where every token is a query."""
        if self.q_router is None:
            return None
        routing = self.q_router(x, **numbers(*count), mask=mask, grid_size=grid_size, **given)
        return Routing(*(field.squeeze(1) for field in routing))

    def sum_of_branches(
        self,
        x: Tensor,
        grid_size: tuple[int, int],
        mask: Tensor | None,
        count_q: tuple,
        count_kv: tuple,
        near: Near,
        rotate: Rotation | None,
    ) -> Tensor:
        """``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``.

        Args:
            x: (B, N, C), masked tokens 0.
            grid_size: (H, W) of the N tokens.
            mask: (B, N) bool, True = valid.
            count_q, count_kv: slots and counts, see :func:`~colt5_vision.checks.slots_and_counts`.
            near: what the light branch sees.
            rotate: positions of the heavy branch.

        Returns:
            (B, N, C).
        """
        to_q, to_kv = shared_logits(self.q_router, self.kv_router, x)
        routed_q = self.route_queries(x, grid_size, mask, count_q, to_q)
        routed_kv = self.kv_router(x, **numbers(*count_kv), mask=mask, grid_size=grid_size, **to_kv)
        heavy = self.heavy_attn(
            x,
            None if routed_q is None else routed_q.indices,
            routed_kv.indices,
            key_gates=routed_kv.gates,
            # without a mask and counts every slot is filled
            key_mask=None if mask is None and count_kv[1] is None else routed_kv.mask,
            query_gates=routed_q.gates if self.multiply_queries_by_score else None,
            rotate=rotate,
        )
        null = self.null_q_token
        if self.light_attn is None:
            if routed_q is None:
                return heavy
            out = filled_with(null, x, heavy.dtype)
        else:
            light = self.light_attn(x, near, null)
            heavy = heavy.to(light.dtype)
            if routed_q is None:
                return light + heavy
            # the light branch put the null token everywhere; where a token is routed its heavy output takes that place
            out = own_output(light, self.light_attn)
        return add_heavy_(out, heavy, routed_q, null, counted=count_q[1] is not None)
