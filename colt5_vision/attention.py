"""Conditionally routed attention over image maps: every token sees its window, few tokens are seen by all."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    check_token_count,
)
from .ops import (
    gated_scatter_add_,
    gather_normalize,
    routed_window_attention,
    window_attention,
)
from .positions import axial_rotary
from .router import (
    CoordinateDescentRouter,
    Routing,
    gather_tokens,
    learned_logits,
    own_output,
    router_options,
)

FUSIONS = ("sum", "softmax")


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _raster_positions(indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return indices // width, indices % width


class _Projection(nn.Linear):
    """``nn.Linear`` that can be given a bias with a call: the matmul adds it, at no pass over the output."""

    output_layer = "self"

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias if bias is None else bias)


class WindowAttention(nn.Module):
    """The light branch: pre-normalised self-attention of every token (B, N, C) inside its window."""

    output_layer = "to_out"

    def __init__(self, dim: int, heads: int, dim_head: int, window_size: tuple[int, int], *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.window_size = heads, window_size
        self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False, **factory)
        self.to_out = _Projection(heads * dim_head, dim, bias=False, **factory)

    def forward(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, null: Tensor | None = None) -> Tensor:
        """``null`` (C,) is added to every token of the output."""
        q, k, v = (_split_heads(t, self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        out = window_attention(q, k, v, grid_size=grid_size, window_size=self.window_size, key_mask=mask)
        out = _merge_heads(out)
        if null is None:
            return self.to_out(out)
        if isinstance(self.to_out, _Projection):
            return self.to_out(out, null.to(self.to_out.weight.dtype))
        out = self.to_out(out)  # an adapter took its place
        return out + null.to(out.dtype)


class RoutedAttention(nn.Module):
    """The heavy branch: routed tokens (B, Q), or all, attend to routed tokens (B, R, K) of each route and one null key.

    The heads are split over the R routes. The null key and value start at 0, so an empty selection gives 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        multiply_keys_by_score: bool,
        rotary_emb: bool,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.heads, self.rotary_emb = heads, rotary_emb
        self.multiply_keys_by_score = multiply_keys_by_score
        self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
        self.null_kv = nn.Parameter(torch.zeros(2, heads, dim_head, **factory))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    def _normalized(self, x: Tensor, indices: Tensor) -> Tensor:
        norm = self.norm
        watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
        if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None or watched:
            return norm(gather_tokens(x, indices))
        return gather_normalize(x, indices, norm.weight, eps=norm.eps)

    def forward(
        self,
        x: Tensor,
        query_index: Tensor | None,
        key_index: Tensor,
        width: int,
        key_gates: Tensor,
        key_mask: Tensor | None,
        query_gates: Tensor | None,
    ) -> Tensor:
        """Tokens x (B, N, C) of a map of ``width``, indices in raster order -> (B, Q, C); no query_index: all ask."""
        routes, group = key_index.shape[1], self.heads // key_index.shape[1]
        queries = self.norm(x) if query_index is None else self._normalized(x, query_index)
        q = _split_heads(self.to_q(queries), self.heads)
        if query_gates is not None:
            q = q * query_gates.to(q.dtype)[:, None, :, None]
        # each route has its own rows of to_kv: (route, head of the route, key and value)
        context = self._normalized(x, key_index)
        kv = torch.stack(
            [nn.functional.linear(context[:, r], w) for r, w in enumerate(self.to_kv.weight.chunk(routes))], 1
        )
        k, v = rearrange(kv, "b r n (h s d) -> s b (r h) n d", h=group, s=2).unbind(0)
        gates = key_gates.to(v.dtype).repeat_interleave(group, 1).unsqueeze(-1)
        v = v * gates
        if self.multiply_keys_by_score:
            k = k * gates
        if self.rotary_emb:
            if query_index is None:
                query_index = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
            q = axial_rotary(q, tuple(p.unsqueeze(1) for p in _raster_positions(query_index, width)))
            positions = _raster_positions(key_index, width)
            k = axial_rotary(k, tuple(p.repeat_interleave(group, 1) for p in positions))
        null_k, null_v = self.null_kv.to(v.dtype).unsqueeze(2).expand(2, self.heads, 1, v.shape[-1])
        k = torch.cat([null_k.expand(k.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([null_v.expand(v.shape[0], -1, -1, -1), v], 2)
        bias = None
        if key_mask is not None:
            bias = nn.functional.pad(key_mask, (1, 0), value=True).repeat_interleave(group, 1).unsqueeze(2)
            bias = bias if routes > 1 else bias[:, :1]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(_merge_heads(out))


class ConditionalRoutedImageAttention(nn.Module):
    """Attention over a map: window attention for every token, full attention to (and by) a few routed ones.

    ``fusion="sum"`` is CoLT5: separate weights, ``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``; a token
    that is not routed gets the learned null token in place of a heavy output. ``fusion="softmax"`` has one set of
    weights and one softmax over window ∪ routed keys (:func:`~colt5_vision.ops.routed_window_attention`): with every
    token routed it *is* full attention. Routing is global over the map. Normalisation is included, the residual is not.

    Args:
        dim: channels C.
        num_heavy_tokens_q: queries of the heavy branch, an int >= 1 (that many) or a float in (0, 1] (that share of
            the map).
            None: every token queries the routed keys, and there is no query router.
        num_heavy_tokens_kv: routed keys and values, likewise.
        num_routed_kv: R sets of routed keys, the heads split over them.
        light_dim_head, light_heads, light_window_size: head width, heads and window side (int or (height, width)) of
            the light branch.
        heavy_dim_head, heavy_heads: of the heavy branch. ``fusion="softmax"`` has one set of heads: both must agree.
        router_straight_through: gates of exactly 1 in forward.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
        multiply_keys_by_score, multiply_queries_by_score: ``sum`` only: gates scale the keys (queries) too, not only
            the values.
        use_null_q_tokens: ``sum`` only: the null token for queries that were not routed; default: where queries are
            routed.
        channel_first: (B, C, H, W); False: (B, H, W, C).
        fusion: ``"sum"`` or ``"softmax"``.
        rotary_emb: 2-D axial rotary positions, of the heavy branch (``sum``) or of all (``softmax``).
        router: kind of both routers: ``"learned"``, ``"mean_query"``, ``"random"``, ``"grid"``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752) section 3.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_tokens_kv: TokenCount,
        num_routed_kv: int = 1,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int | tuple[int, int] = 16,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_null_q_tokens: bool | None = None,
        channel_first: bool = True,
        fusion: str = "sum",
        rotary_emb: bool = False,
        router: str = "learned",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = check_int("dim", dim)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {FUSIONS}, got {fusion!r}")
        self.fusion, self.channel_first, self.rotary_emb = fusion, channel_first, rotary_emb
        q_count, kv_count = num_heavy_tokens_q, num_heavy_tokens_kv
        self.num_heavy_tokens_q = None if q_count is None else check_token_count("num_heavy_tokens_q", q_count)
        self.num_heavy_tokens_kv = check_token_count("num_heavy_tokens_kv", kv_count)
        self.heads = check_int("heavy_heads", heavy_heads)
        check_int("light_heads", light_heads)
        check_int("light_dim_head", light_dim_head)
        if heavy_heads % check_int("num_routed_kv", num_routed_kv):
            raise ValueError(f"num_routed_kv: {heavy_heads} heavy_heads are not divisible by {num_routed_kv} routes")
        if check_int("heavy_dim_head", heavy_dim_head) % 4 and rotary_emb:
            raise ValueError(f"heavy_dim_head: rotary_emb needs a multiple of 4, got {heavy_dim_head}")
        self.window_size = check_pair("light_window_size", light_window_size)

        route = router_options(router_kwargs, "give num_routed_kv instead")
        route.update(straight_through=router_straight_through, router=router, **factory)
        self.q_router = None if q_count is None else CoordinateDescentRouter(dim, **route)
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **route)

        self.null_q_token = None
        if fusion == "softmax":
            if (light_heads, light_dim_head) != (heavy_heads, heavy_dim_head):
                raise ValueError(
                    "light_heads, light_dim_head: fusion='softmax' has one set of heads, expected those of the heavy "
                    f"branch ({heavy_heads} x {heavy_dim_head}), got {light_heads} x {light_dim_head}"
                )
            if multiply_keys_by_score or multiply_queries_by_score or use_null_q_tokens:
                raise ValueError(
                    "multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens: only for fusion='sum'"
                )
            self.norm = nn.RMSNorm(dim, eps=1e-6, **factory)
            self.to_qkv = nn.Linear(dim, 3 * heavy_heads * heavy_dim_head, bias=False, **factory)
            self.to_out = nn.Linear(heavy_heads * heavy_dim_head, dim, bias=False, **factory)
            return
        if multiply_queries_by_score and q_count is None:
            raise ValueError("multiply_queries_by_score: needs num_heavy_tokens_q, every token is a query")
        if use_null_q_tokens and q_count is None:
            raise ValueError("use_null_q_tokens: needs num_heavy_tokens_q, every token is a query")
        self.multiply_queries_by_score = multiply_queries_by_score
        self.light_attn = WindowAttention(dim, light_heads, light_dim_head, self.window_size, **factory)
        self.heavy_attn = RoutedAttention(
            dim, heavy_heads, heavy_dim_head, multiply_keys_by_score, rotary_emb, **factory
        )
        if q_count is not None and use_null_q_tokens is not False:
            self.null_q_token = nn.Parameter(torch.zeros(dim, **factory))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, fusion={self.fusion!r}, num_heavy_tokens_q={self.num_heavy_tokens_q}, "
            f"num_heavy_tokens_kv={self.num_heavy_tokens_kv}, window_size={self.window_size}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_tokens_kv: TokenCount | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, C, H, W), or (B, H, W, C) with ``channel_first=False``; any H and W.
            mask: (B, H, W) bool, True = valid. Masked tokens are not read, not routed, and come out as 0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_float_tensor("x", x, ndim=4)
        x = x.permute(0, 2, 3, 1) if self.channel_first else x
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: expected {self.dim} channels, got {x.shape[-1]} (channel_first={self.channel_first})")
        grid_size = height, width = tuple(x.shape[1:3])
        if height < 1 or width < 1:
            raise ValueError(f"x: expected a map of at least one token, got H = {height}, W = {width}")
        check_mask("mask", mask, x.shape[:3])
        if num_heavy_tokens_q is None:
            num_heavy_tokens_q = self.num_heavy_tokens_q
        elif self.q_router is None:
            raise ValueError("num_heavy_tokens_q: the module was made without a query router (num_heavy_tokens_q=None)")
        else:
            check_token_count("num_heavy_tokens_q", num_heavy_tokens_q)
        if num_heavy_tokens_kv is None:
            num_heavy_tokens_kv = self.num_heavy_tokens_kv
        else:
            check_token_count("num_heavy_tokens_kv", num_heavy_tokens_kv)

        x = x.flatten(1, 2)
        if mask is not None:
            mask = mask.flatten(1)
            x = torch.where(mask.unsqueeze(-1), x, 0)
        attend = self._softmax if self.fusion == "softmax" else self._sum
        out = attend(x, grid_size, mask, num_heavy_tokens_q, num_heavy_tokens_kv)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), out, 0)
        out = out.unflatten(1, grid_size)
        return out.permute(0, 3, 1, 2) if self.channel_first else out

    def _shared_logits(self, x: Tensor) -> tuple[dict, dict]:
        """What the routers of queries and of keys are given: where both are learned, logits from one read of x."""
        routers = (self.q_router, self.kv_router)
        if not all(type(router) is CoordinateDescentRouter and router.routing_token is not None for router in routers):
            return {}, {}
        return tuple({"logits": logits} for logits in learned_logits(routers, x))

    def _route_queries(
        self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, count, given: dict
    ) -> Routing | None:
        if self.q_router is None:
            return None
        routing = self.q_router(x, num_tokens=count, mask=mask, grid_size=grid_size, **given)
        return Routing(*(field.squeeze(1) for field in routing))

    def _sum(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, q_count, kv_count) -> Tensor:
        to_q, to_kv = self._shared_logits(x)
        routed_q = self._route_queries(x, grid_size, mask, q_count, to_q)
        routed_kv = self.kv_router(x, num_tokens=kv_count, mask=mask, grid_size=grid_size, **to_kv)
        light = self.light_attn(x, grid_size, mask, self.null_q_token)
        heavy = self.heavy_attn(
            x,
            None if routed_q is None else routed_q.indices,
            routed_kv.indices,
            grid_size[1],
            routed_kv.gates,
            None if mask is None else routed_kv.mask,
            routed_q.gates if routed_q is not None and self.multiply_queries_by_score else None,
        ).to(light.dtype)
        if routed_q is None:
            return light + heavy
        # the light branch put the null token everywhere; where a token is routed its heavy output takes that place
        out = own_output(light, self.light_attn)
        return gated_scatter_add_(out, heavy, routed_q.indices, gates=routed_q.gates, null=self.null_q_token)

    def _softmax(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, q_count, kv_count) -> Tensor:
        to_q, to_kv = self._shared_logits(x)
        routed_q = self._route_queries(x, grid_size, mask, q_count, to_q)
        q, k, v = (_split_heads(t, self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        if self.kv_router.router == "mean_query":
            to_kv = {"query": q, "key": k}
        routed_kv = self.kv_router(x, num_tokens=kv_count, mask=mask, grid_size=grid_size, **to_kv)
        if self.rotary_emb:
            positions = _raster_positions(torch.arange(x.shape[1], device=x.device), grid_size[1])
            q, k = axial_rotary(q, positions), axial_rotary(k, positions)
        call = {"grid_size": grid_size, "window_size": self.window_size, "key_mask": mask}
        routed = {
            "routed_indices": torch.where(routed_kv.mask, routed_kv.indices, -1),
            "log_weights": routed_kv.log_weights,
        }
        if routed_q is None:
            return self.to_out(_merge_heads(routed_window_attention(q, k, v, **routed, **call)))
        # a routed query sees window ∪ routed keys, any other its window: its gate blends between the two
        out = _merge_heads(window_attention(q, k, v, **call))
        both = _merge_heads(routed_window_attention(q, k, v, **routed, **call, query_indices=routed_q.indices))
        gain = (both - gather_tokens(out, routed_q.indices)) * routed_q.gates.to(out.dtype).unsqueeze(-1)
        return self.to_out(out.scatter_add(1, routed_q.indices.unsqueeze(-1).expand_as(gain), gain))
