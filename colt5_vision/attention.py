"""Conditionally routed attention over image maps: every token sees its window, few tokens are seen by all."""

import functools

import torch
from torch import Tensor, nn

from .branches import (
    LightBranch,
    RoutedAttention,
    RoutedBranches,
    merge_heads,
    numbers,
    shared_logits,
    split_heads,
)
from .checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    slots_and_counts,
)
from .ops import routed_window_attention, window_attention
from .positions import axial_rotary
from .predecessor import check_predecessor_options
from .router import gather_tokens

FUSIONS = ("sum", "softmax")


def _rotate(x: Tensor, indices: Tensor, width: int) -> Tensor:
    """Turn x (B, heads, N, head_dim) by the places of its tokens in a map of ``width``, raster indices."""
    return axial_rotary(x, (indices // width, indices % width))


def attend_windows(
    qkv: Tensor, grid_size: tuple[int, int], window_size: tuple[int, int], mask: Tensor | None
) -> Tensor:
    """Attention inside windows, q, k, v (B, N, 3, heads, head_dim) -> (B, N, heads * head_dim)."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return merge_heads(window_attention(q, k, v, grid_size=grid_size, window_size=window_size, key_mask=mask))


class ConditionalRoutedImageAttention(RoutedBranches):
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
        has_light_attn: ``sum`` only: False: the heavy branch alone.
        light_dim_head, light_heads, light_window_size: head width, heads and window side (int or (height, width)) of
            the light branch.
        heavy_dim_head, heavy_heads: of the heavy branch. ``fusion="softmax"`` has one set of heads: both must agree.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm (``log_gradient``);
            False: the soft gates themselves. None: False for ``"sum"`` where every token queries, else True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`.
        multiply_keys_by_score, multiply_queries_by_score: ``sum`` only: gates scale the keys (queries) too, not only
            the values.
        use_triton, use_flash_attn: of the predecessor: None or True, kernels are used wherever they can run.
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

    _light_norm = staticmethod(functools.partial(nn.RMSNorm, eps=1e-6))

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_tokens_kv: TokenCount,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int | tuple[int, int] = 16,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool | None = None,
        use_null_q_tokens: bool | None = None,
        use_flash_attn: bool | None = None,
        channel_first: bool = True,
        fusion: str = "sum",
        rotary_emb: bool = False,
        router: str = "learned",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_predecessor_options(use_triton=use_triton, use_flash_attn=use_flash_attn)
        factory = {"device": device, "dtype": dtype}
        self.dim = check_int("dim", dim)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {FUSIONS}, got {fusion!r}")
        self.fusion, self.channel_first, self.rotary_emb = fusion, channel_first, rotary_emb
        self.heads, q_count = heavy_heads, num_heavy_tokens_q
        check_int("light_heads", light_heads)
        check_int("light_dim_head", light_dim_head)
        multiple = 4 if rotary_emb else None
        self.set_counts(q_count, num_heavy_tokens_kv, heavy_heads, heavy_dim_head, num_routed_kv, multiple)
        self.window_size = check_pair("light_window_size", light_window_size)

        self.make_routers(dim, num_routed_kv, router_kwargs, router_straight_through, router=router, **factory)

        self.null_q_token = None
        if fusion == "softmax":
            if (light_heads, light_dim_head) != (heavy_heads, heavy_dim_head):
                raise ValueError(
                    "light_heads, light_dim_head: fusion='softmax' has one set of heads, expected those of the heavy "
                    f"branch ({heavy_heads} x {heavy_dim_head}), got {light_heads} x {light_dim_head}"
                )
            if multiply_keys_by_score or multiply_queries_by_score or use_null_q_tokens or not has_light_attn:
                raise ValueError(
                    "multiply_keys_by_score, multiply_queries_by_score, use_null_q_tokens, has_light_attn: "
                    "only for fusion='sum'"
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
        self.light_attn = None
        if has_light_attn:
            norm = self._light_norm(dim, **factory)
            self.light_attn = LightBranch(dim, light_heads, light_dim_head, norm, **factory)
        self.heavy_attn = RoutedAttention(dim, heavy_heads, heavy_dim_head, multiply_keys_by_score, **factory)
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
        num_heavy_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_tokens_kv: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, C, H, W), or (B, H, W, C) with ``channel_first=False``; any H and W.
            mask: (B, H, W) bool, True = valid. Masked tokens are not read, not routed, and come out as 0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's. A tensor (B,) is a count of each sample:
                integers, or floats, that share of its valid tokens; at most the module's own count.

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
        if num_heavy_tokens_q is not None and self.q_router is None:
            raise ValueError("num_heavy_tokens_q: the module was made without a query router (num_heavy_tokens_q=None)")
        batch = x.shape[0]
        count_q = slots_and_counts("num_heavy_tokens_q", num_heavy_tokens_q, self.num_heavy_tokens_q, batch)
        count_kv = slots_and_counts("num_heavy_tokens_kv", num_heavy_tokens_kv, self.num_heavy_tokens_kv, batch)

        x = x.flatten(1, 2)
        if mask is not None:
            mask = mask.flatten(1)
            x = torch.where(mask.unsqueeze(-1), x, 0)
        attend = self._softmax if self.fusion == "softmax" else self._sum
        out = attend(x, grid_size, mask, count_q, count_kv)
        if mask is not None:
            out = torch.where(mask.unsqueeze(-1), out, 0)
        out = out.unflatten(1, grid_size)
        return out.permute(0, 3, 1, 2) if self.channel_first else out

    def _sum(
        self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, count_q: tuple, count_kv: tuple
    ) -> Tensor:
        near = functools.partial(attend_windows, grid_size=grid_size, window_size=self.window_size, mask=mask)
        rotate = functools.partial(_rotate, width=grid_size[1]) if self.rotary_emb else None
        return self.sum_of_branches(x, grid_size, mask, count_q, count_kv, near, rotate)

    def _softmax(
        self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None, count_q: tuple, count_kv: tuple
    ) -> Tensor:
        to_q, to_kv = shared_logits(self.q_router, self.kv_router, x)
        routed_q = self.route_queries(x, grid_size, mask, count_q, to_q)
        q, k, v = (split_heads(t, self.heads) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        if self.kv_router.router == "mean_query":
            to_kv = {"query": q, "key": k}
        routed_kv = self.kv_router(x, **numbers(*count_kv), mask=mask, grid_size=grid_size, **to_kv)
        if self.rotary_emb:
            everywhere = torch.arange(x.shape[1], device=x.device)
            q, k = _rotate(q, everywhere, grid_size[1]), _rotate(k, everywhere, grid_size[1])
            if torch.is_grad_enabled():
                v = v.contiguous()  # a view would keep the q and k of before until backward
        call = {"grid_size": grid_size, "window_size": self.window_size, "key_mask": mask}
        routed = {
            "routed_indices": torch.where(routed_kv.mask, routed_kv.indices, -1),
            "log_weights": routed_kv.log_weights,
        }
        if routed_q is None:
            return self.to_out(merge_heads(routed_window_attention(q, k, v, **routed, **call)))
        # a routed query sees window ∪ routed keys, any other its window: its gate blends between the two
        out = merge_heads(window_attention(q, k, v, **call))
        both = merge_heads(routed_window_attention(q, k, v, **routed, **call, query_indices=routed_q.indices))
        gain = (both - gather_tokens(out, routed_q.indices)) * routed_q.gates.to(out.dtype).unsqueeze(-1)
        return self.to_out(out.scatter_add(1, routed_q.indices.unsqueeze(-1).expand_as(gain), gain))
