"""Conditionally routed attention over sequences: every token sees its neighbours, few tokens are seen by all."""

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .branches import LightBranch, RoutedAttention, RoutedBranches, merge_heads
from .checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    slots_and_counts,
)
from .positions import rotary
from .predecessor import check_predecessor_options


def local_attention(qkv: Tensor, reach: int, mask: Tensor | None) -> Tensor:
    """Attention of token i to the tokens j with ``|i - j| <= reach``, in O(N · reach).

    Args:
        qkv: (B, N, 3, heads, head_dim), finite also where masked.
        reach: tokens seen on either side.
        mask: (B, N) bool, True = valid. A masked token is seen by itself only.

    Returns:
        (B, N, heads * head_dim).
    """
    batch, num_tokens, _, heads, dim_head = qkv.shape
    # a graph of any length must not ask which of the two is smaller, nor whether a view does without a copy
    traced = torch.compiler.is_compiling()
    size = reach if traced else min(reach, num_tokens)  # of a block: the band lies in three of them
    blocks = num_tokens // size + 1
    q, k, v = pad(qkv, (0,) * 6 + (size, 2 * size)).unbind(2)
    # views (B, blocks, heads, tokens, head_dim): keys of a block and of its neighbours
    q = q.unfold(1, size, size).mT[:, 1:-1]
    k, v = (t.unfold(1, 3 * size, size).mT for t in (k, v))
    if traced:
        q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))

    ahead = torch.arange(-size, 2 * size, device=qkv.device)  # of the first token of a block: the keys of the block
    place = torch.arange(blocks, device=qkv.device).unsqueeze(1) * size + ahead
    valid = (place >= 0) & (place < num_tokens)
    valid = valid.unsqueeze(0) if mask is None else valid & mask[:, place.clamp(0, num_tokens - 1)]
    ahead = ahead - torch.arange(size, device=qkv.device).unsqueeze(1)
    seen = (ahead.abs() <= size) & valid.unsqueeze(2) | (ahead == 0)  # itself: no row is empty
    seen = seen.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)

    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    out = merge_heads(out).reshape(batch, blocks * size, heads * dim_head)
    # Linear would copy a slice; whether it is one is not for a graph of any length to know
    return out.index_select(1, torch.arange(num_tokens, device=qkv.device))


def attend_sequence(
    module: RoutedBranches,
    x: Tensor,
    reach: int | None,
    mask: Tensor | None,
    num_heavy_tokens_q: TokenCount | Tensor | None,
    num_heavy_tokens_kv: TokenCount | Tensor | None,
) -> Tensor:
    """The branches of ``module`` over a sequence x (B, N, C); arguments as of :class:`ConditionalRoutedAttention`."""
    check_float_tensor("x", x, ndim=3)
    batch, num_tokens, dim = x.shape
    if dim != module.dim or num_tokens < 1:
        raise ValueError(f"x: expected (B, N, {module.dim}) with N >= 1, got {tuple(x.shape)}")
    check_mask("mask", mask, (batch, num_tokens))
    if num_heavy_tokens_q is not None and module.q_router is None:
        raise ValueError("num_heavy_tokens_q: the module was made without a query router (num_heavy_tokens_q=None)")
    count_q = slots_and_counts("num_heavy_tokens_q", num_heavy_tokens_q, module.num_heavy_tokens_q, batch)
    count_kv = slots_and_counts("num_heavy_tokens_kv", num_heavy_tokens_kv, module.num_heavy_tokens_kv, batch)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0)
    near = functools.partial(local_attention, reach=reach, mask=mask)
    rotate = rotary if module.rotary_emb else None
    out = module.sum_of_branches(x, (1, num_tokens), mask, count_q, count_kv, near, rotate)
    return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0)


class ConditionalRoutedAttention(RoutedBranches):
    """Attention over a sequence: local attention for every token, full attention to (and by) a few routed ones.

    ``light(x) + scatter(gate_q · heavy(x_q, gate_kv · x_kv))``; a token that is not routed gets the learned null token
    in place of a heavy output. Normalisation is included, the residual is not.

    Args:
        dim: width C.
        num_heavy_tokens_q: queries of the heavy branch, an int >= 1 (that many) or a float in (0, 1] (that share of
            the sequence). None: every token queries the routed keys, and there is no query router.
        num_heavy_tokens_kv: routed keys and values, likewise.
        num_routed_kv: R sets of routed keys, the heads split over them.
        has_light_attn: False: the heavy branch alone.
        light_dim_head, light_heads: head width and heads of the light branch.
        light_window_size: tokens that the light branch sees, half of them on either side.
        heavy_dim_head, heavy_heads: of the heavy branch.
        router_straight_through: gates of exactly 1 in forward, with the gradient of their logarithm (``log_gradient``);
            False: the soft gates themselves. None: False where every token queries, else True.
        router_kwargs: further arguments of both routers, see :class:`CoordinateDescentRouter`; ``cell_size`` (1, c)
            stratifies over stretches of c tokens.
        multiply_keys_by_score, multiply_queries_by_score: gates scale the keys (queries) too, not only the values.
        use_triton, use_flash_attn: of the predecessor: None or True, kernels are used wherever they can run.
        use_null_q_tokens: the null token for queries that were not routed; default: where queries are routed.
        rotary_emb: rotary positions in the heavy branch.
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
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool | None = None,
        use_null_q_tokens: bool | None = None,
        use_flash_attn: bool | None = None,
        rotary_emb: bool = False,
        router: str = "learned",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_predecessor_options(use_triton=use_triton, use_flash_attn=use_flash_attn)
        factory = {"device": device, "dtype": dtype}
        self.dim = check_int("dim", dim)
        q_count, multiple = num_heavy_tokens_q, 2 if rotary_emb else None
        self.set_counts(q_count, num_heavy_tokens_kv, heavy_heads, heavy_dim_head, num_routed_kv, multiple)
        if q_count is None and (multiply_queries_by_score or use_null_q_tokens):
            raise ValueError(
                "multiply_queries_by_score, use_null_q_tokens: need num_heavy_tokens_q, every token is a query"
            )
        self.rotary_emb, self.multiply_queries_by_score = rotary_emb, multiply_queries_by_score

        self.light_attn = self.reach = None
        if has_light_attn:
            check_int("light_heads", light_heads)
            check_int("light_dim_head", light_dim_head)
            self.reach = check_int("light_window_size", light_window_size, minimum=2) // 2
            norm = nn.LayerNorm(dim, **factory)
            self.light_attn = LightBranch(dim, light_heads, light_dim_head, norm, **factory)
        self.null_q_token = None
        if q_count is not None and use_null_q_tokens is not False:
            self.null_q_token = nn.Parameter(torch.zeros(dim, **factory))
        self.make_routers(dim, num_routed_kv, router_kwargs, router_straight_through, router=router, **factory)
        self.heavy_attn = RoutedAttention(dim, heavy_heads, heavy_dim_head, multiply_keys_by_score, **factory)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heavy_tokens_q={self.num_heavy_tokens_q}, "
            f"num_heavy_tokens_kv={self.num_heavy_tokens_kv}, reach={self.reach}"
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
            x: (B, N, C), any N >= 1.
            mask: (B, N) bool, True = valid. Masked tokens are not read, not routed, and come out as 0.
            num_heavy_tokens_q, num_heavy_tokens_kv: override the module's; a tensor (B,), integers or shares of the
                valid tokens, gives each sample its own, up to the module's.

        Returns:
            The shape of ``x``.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        return attend_sequence(self, x, self.reach, mask, num_heavy_tokens_q, num_heavy_tokens_kv)
