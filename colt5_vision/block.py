"""A transformer block of routed attention and routed feed-forward."""

import torch
from torch import Tensor, nn

from ._fx import fx_leaf
from .attention import ConditionalRoutedImageAttention
from .branches import LightBranch
from .checks import TokenCount, check_count, check_float_tensor
from .feedforward import ConditionalRoutedFeedForward
from .init import init_weights
from .sequence import attend_line


class MapOrLineAttention(ConditionalRoutedImageAttention):
    """Image attention that takes sequences (B, N, C), too, with the same weights.

    Near means in the window of a map, and beside in a line. The light branch has the norm of
    :class:`~colt5_vision.ConditionalRoutedAttention`.

    Args:
        dim: channels C.
        light_window_size: of a map (default 16) and of a line (default 128).
        **kwargs: of :class:`ConditionalRoutedImageAttention`.
    """

    def __init__(
        self, dim: int, *, light_window_size: int | tuple[int, int] | None = None, **kwargs
    ):
        self.line_window_size = 128 if light_window_size is None else light_window_size
        given = {} if light_window_size is None else {"light_window_size": light_window_size}
        super().__init__(dim, **given, **kwargs)

    def _light_branch(
        self, heads: int, dim_head: int, window_size: tuple[int, int], **factory
    ) -> LightBranch:
        norm = nn.LayerNorm(self.dim, **factory)
        near = {"window_size": window_size}
        if self._takes_lines():
            near["reach"] = self.line_window_size // 2
        return LightBranch(self.dim, heads, dim_head, norm, **near, **factory)

    def _takes_lines(self) -> bool:
        line = self.line_window_size
        return not isinstance(line, (tuple, list)) and line >= 2

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_tokens_kv: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """A map as :class:`ConditionalRoutedImageAttention`, a sequence (B, N, C) as
        :class:`~colt5_vision.ConditionalRoutedAttention`."""
        counts = (num_heavy_tokens_q, num_heavy_tokens_kv)
        if x.ndim == 4:
            names = ("num_heavy_tokens_q", "num_heavy_tokens_kv")
            return super().forward(x, mask=mask, **dict(zip(names, counts)))
        if self.fusion != "sum":
            raise ValueError(
                f"x: a sequence needs fusion='sum', the block has {self.fusion!r}; "
                f"got {tuple(x.shape)}"
            )
        if self.attend.light_attn is not None and not self._takes_lines():
            raise ValueError(
                "x: a sequence needs a light_window_size that is one number >= 2, the block has "
                f"{self.line_window_size}; got {tuple(x.shape)}"
            )
        return attend_line(self, x, mask, *counts)


class ConditionalRoutedTransformerBlock(nn.Module):
    """``x + attention(x)``, then ``x + feed_forward(x)``, both conditionally routed.

        x ─┬─ attention ─ + ─┬─ feed-forward ─ + ─ out
           └──────────────┘  └─────────────────┘

    Over maps the attention is that of :class:`ConditionalRoutedImageAttention`, over sequences that
    of :class:`ConditionalRoutedAttention`, with the same weights.

    Args:
        dim: channels C.
        num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv: token counts of the attention.
        num_heavy_ff_tokens: token count of the feed-forward, see
            :class:`ConditionalRoutedFeedForward`.
        light_window_size: height and width of the window of the light branch in a map (default 16),
            the tokens that it sees in a sequence (default 128).
        light_ff_mult, heavy_ff_mult: hidden widths of the feed-forward over ``dim``.
        router_straight_through, router, router_kwargs: for both; None for the first: each its own
            default.
        channel_first, device, dtype: for both.
        **attention: further arguments of the attention. ``fusion="softmax"`` is for maps.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) figure 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: TokenCount | None = None,
        num_heavy_attn_tokens_kv: TokenCount,
        num_heavy_ff_tokens: TokenCount,
        light_window_size: int | tuple[int, int] | None = None,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool | None = None,
        router: str = "learned",
        router_kwargs: dict | None = None,
        channel_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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
        self.conditional_attn = MapOrLineAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            light_window_size=light_window_size,
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

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    @fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: TokenCount | Tensor | None = None,
        num_heavy_attn_tokens_kv: TokenCount | Tensor | None = None,
        num_heavy_ff_tokens: TokenCount | Tensor | None = None,
    ) -> Tensor:
        """Map x to the same shape. Masked tokens influence no other and keep their residual.

        Args:
            x: a map (B, C, H, W), or (B, H, W, C), or a sequence (B, N, C).
            mask: (B, H, W), or (B, N), bool, True = valid.
            num_heavy_attn_tokens_q, num_heavy_attn_tokens_kv, num_heavy_ff_tokens: override the
                module's. A tensor (B,) is a count of each sample: integers, or floats, that share
                of its valid tokens; at most the module's own count.

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        check_float_tensor("x", x)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"x: expected a map of 4 dimensions or a sequence of 3, got shape {tuple(x.shape)}"
            )
        counts = {
            "num_heavy_attn_tokens_q": num_heavy_attn_tokens_q,
            "num_heavy_attn_tokens_kv": num_heavy_attn_tokens_kv,
            "num_heavy_ff_tokens": num_heavy_ff_tokens,
        }
        for name, count in counts.items():  # the parts would name arguments of their own
            check_count(name, count, 1, x.shape[0])

        x = x + self.conditional_attn(
            x,
            mask=mask,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
        )
        return x + self.conditional_ff(x, mask=mask, num_heavy_tokens=num_heavy_ff_tokens)
