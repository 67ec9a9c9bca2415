"""A transformer block of routed attention and routed feed-forward."""

from torch import Tensor, nn

from .attention import ConditionalRoutedImageAttention
from .checks import TokenCount, check_float_tensor, slots_and_counts
from .feedforward import ConditionalRoutedFeedForward
from .predecessor import check_predecessor_options
from .sequence import ConditionalRoutedAttention


class ConditionalRoutedTransformerBlock(nn.Module):
    """``x + attention(x)``, then ``x + feed_forward(x)``, both conditionally routed, over a map or a sequence.

    Args:
        dim: channels C.
        sequence: False: for maps, ``conditional_attn`` is a :class:`ConditionalRoutedImageAttention`. True: for
            sequences (B, N, C), it is a :class:`ConditionalRoutedAttention`; the predecessor's block is this one. Their
            light branches differ in weights, so that it cannot wait for the input.
        num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv: token counts of the attention.
        num_heavy_ff_tokens: token count of the feed-forward, see :class:`ConditionalRoutedFeedForward`.
        light_ff_mult, heavy_ff_mult: hidden widths of the feed-forward over ``dim``.
        router_straight_through, router, router_kwargs, device, dtype: for both.
        channel_first: maps come as (B, C, H, W); False: (B, H, W, C).
        use_triton, use_flash_attn: of the predecessor: None or True, kernels are used wherever they can run.
        **attention: further arguments of the attention.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: CoLT5 (arXiv 2303.09752) figure 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        sequence: bool = False,
        num_heavy_attn_tokens_q: TokenCount | None = None,
        num_heavy_attn_tokens_kv: TokenCount,
        num_heavy_ff_tokens: TokenCount,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router: str = "learned",
        router_kwargs: dict | None = None,
        channel_first: bool = True,
        use_triton: bool | None = None,
        use_flash_attn: bool | None = None,
        device=None,
        dtype=None,
        **attention,
    ):
        super().__init__()
        check_predecessor_options(use_triton=use_triton, use_flash_attn=use_flash_attn)
        if sequence and not channel_first:
            raise ValueError("channel_first: only for maps, the block was made with sequence=True, got False")
        self.sequence = sequence
        shared = {
            "router_straight_through": router_straight_through,
            "router": router,
            "router_kwargs": router_kwargs,
            "device": device,
            "dtype": dtype,
        }
        make = ConditionalRoutedAttention if sequence else ConditionalRoutedImageAttention
        layout = {} if sequence else {"channel_first": channel_first}
        self.conditional_attn = make(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            **layout,
            **shared,
            **attention,
        )
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            **layout,
            **shared,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_attn_tokens_kv: TokenCount | Tensor | None = None,
        num_heavy_ff_tokens: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """Map x (B, C, H, W), or (B, H, W, C), to the same shape, with ``sequence`` x (B, N, C).

        Masked tokens influence no other and keep their residual: only valid tokens are changed.

        Args:
            x: as above.
            mask: (B, H, W), or (B, N), bool, True = valid.
            num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens: override the module's; a tensor
                (B,), integers or shares of the valid tokens, gives each sample its own, up to the module's.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_float_tensor("x", x)
        expected = 3 if self.sequence else 4
        if x.ndim != expected:
            raise ValueError(
                f"x: expected {expected} dimensions, the block was made with sequence={self.sequence}, "
                f"got shape {tuple(x.shape)}"
            )
        counts = {
            "num_heavy_attn_tokens_q": num_heavy_attn_tokens_q,
            "num_heavy_attn_tokens_kv": num_heavy_attn_tokens_kv,
            "num_heavy_ff_tokens": num_heavy_ff_tokens,
        }
        for name, count in counts.items():  # the parts would name arguments of their own
            slots_and_counts(name, count, 1, x.shape[0])
        x = x + self.conditional_attn(
            x, mask=mask, num_heavy_tokens_q=num_heavy_attn_tokens_q, num_heavy_tokens_kv=num_heavy_attn_tokens_kv
        )
        return x + self.conditional_ff(x, mask=mask, num_heavy_tokens=num_heavy_ff_tokens)
