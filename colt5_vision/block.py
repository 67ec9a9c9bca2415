"""A transformer block of routed attention and routed feed-forward."""

from torch import Tensor, nn

from .attention import ConditionalRoutedImageAttention
from .checks import TokenCount
from .feedforward import ConditionalRoutedFeedForward


class ConditionalRoutedTransformerBlock(nn.Module):
    """``x + attention(x)``, then ``x + feed_forward(x)``, both conditionally routed, over a map.

    Args:
        dim: channels C.
        num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv: token counts of the attention, see
            :class:`ConditionalRoutedImageAttention`.
        num_heavy_ff_tokens: token count of the feed-forward, see :class:`ConditionalRoutedFeedForward`.
        light_ff_mult, heavy_ff_mult: hidden widths of the feed-forward over ``dim``.
        router_straight_through, router, router_kwargs, channel_first, device, dtype: for both.
        **attention: further arguments of :class:`ConditionalRoutedImageAttention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752) figure 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: TokenCount | None = None,
        num_heavy_attn_tokens_kv: TokenCount,
        num_heavy_ff_tokens: TokenCount,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router: str = "learned",
        router_kwargs: dict | None = None,
        channel_first: bool = True,
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        shared = {
            "router_straight_through": router_straight_through,
            "router": router,
            "router_kwargs": router_kwargs,
            "channel_first": channel_first,
            "device": device,
            "dtype": dtype,
        }
        self.conditional_attn = ConditionalRoutedImageAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            **shared,
            **attention,
        )
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            **shared,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: TokenCount | None = None,
        num_heavy_attn_tokens_kv: TokenCount | None = None,
        num_heavy_ff_tokens: TokenCount | None = None,
    ) -> Tensor:
        """Map x (B, C, H, W), or (B, H, W, C), to the same shape; mask (B, H, W) bool; counts override the module's.

        Masked tokens influence no other and keep their residual: only valid tokens are changed.
        """
        x = x + self.conditional_attn(
            x, mask=mask, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv
        )
        return x + self.conditional_ff(x, mask=mask, num_heavy_tokens=num_heavy_ff_tokens)
