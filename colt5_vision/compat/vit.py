"""A plain vision transformer of routed layers, with colt5_attention's arguments.

For timm's backbones see :mod:`colt5_vision.models`.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from ..checks import (
    TokenCount,
    check_float_tensor,
    check_int,
    check_mask,
    check_pair,
    hint_at_converter,
)
from ..init import init_weights
from ..positions import sincos_2d
from .switches import check_switches
from .transformer_block import ConditionalRoutedFeedForward, ConditionalRoutedImageAttention


class ConditionalRoutedViT(nn.Module):
    """Image classifier: patches, ``depth`` routed layers, mean, linear head.

        img ─ patches ─ to_patch_embedding ─ + positions ─┐
            ┌─────────────────────────────────────────────┘
            └─ depth × (+ routed attention, + routed feed-forward) ─ mean ─ linear_head ─ logits

    For people who come from colt5_attention, and for its weights. For a new network take timm's
    ``timm.create_model("colt5_vit_...")``, see :mod:`colt5_vision.models`.

    Args:
        image_size: side, or (height, width), of the images that it is made for. Others are taken,
            too.
        patch_size: side, or (height, width), of a patch; divides ``image_size``.
        num_classes: outputs.
        dim: width C of the tokens, divisible by 4.
        depth: number of layers.
        attn_num_heavy_tokens_q, attn_num_heavy_tokens_kv: token counts of the attention, an int or
            a share: of the whole map, not of each window as in colt5_attention. None for the first:
            every token queries.
        attn_heavy_dim_head, attn_heavy_heads, attn_light_dim_head, attn_light_heads,
            attn_light_window_size: of the attention, see
            :class:`~colt5_vision.ConditionalRoutedImageAttention`.
        ff_num_heavy_tokens, ff_heavy_mult, ff_light_mult: of the feed-forward, see
            :class:`~colt5_vision.ConditionalRoutedFeedForward`.
        channels: of the images.
        router_straight_through, router, router_kwargs: of all routers, see
            :class:`~colt5_vision.compat.CoordinateDescentRouter`. None for the first: each its
            module's default.
        router_use_triton, flash_attn: None or True, kernels are used wherever they can run.
        attn_num_routed_kv: sets of routed keys, the heads split over them.
        default_coor_descent_eps: temperature of the gates unless ``router_kwargs`` has an ``eps``.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752) in the simple ViT of arXiv 2205.01580.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        attn_num_heavy_tokens_q: TokenCount | None,
        attn_num_heavy_tokens_kv: TokenCount,
        attn_heavy_dim_head: int,
        attn_heavy_heads: int,
        attn_light_dim_head: int,
        attn_light_heads: int,
        attn_light_window_size: int | tuple[int, int],
        ff_num_heavy_tokens: TokenCount,
        ff_heavy_mult: float,
        ff_light_mult: float,
        channels: int = 3,
        router_straight_through: bool | None = None,
        router_kwargs: dict | None = None,
        router_use_triton: bool | None = None,
        flash_attn: bool | None = None,
        attn_num_routed_kv: int = 1,
        default_coor_descent_eps: float = 1.0,
        router: str = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.register_load_state_dict_pre_hook(hint_at_converter)

        # checks
        check_switches(router_use_triton=router_use_triton, flash_attn=flash_attn)
        self.image_size, self.patch_size = _check_sizes(image_size, patch_size)
        self.channels = check_int("channels", channels)
        if check_int("dim", dim) % 4:
            raise ValueError(f"dim: expected a multiple of 4, got {dim}")

        # patches
        patch_dim = channels * self.patch_size[0] * self.patch_size[1]
        self.to_patch_embedding = nn.Sequential(
            nn.LayerNorm(patch_dim, **factory),
            nn.Linear(patch_dim, dim, **factory),
            nn.LayerNorm(dim, **factory),
        )

        # what attention and feed-forward have in common
        shared = {
            "router_straight_through": router_straight_through,
            "router": router,
            "router_kwargs": {"eps": default_coor_descent_eps, **(router_kwargs or {})},
            "channel_first": False,
            **factory,
        }

        # layers
        self.layers = nn.ModuleList()
        for _ in range(check_int("depth", depth)):
            attention = ConditionalRoutedImageAttention(
                dim,
                num_heavy_tokens_q=attn_num_heavy_tokens_q,
                num_heavy_tokens_kv=attn_num_heavy_tokens_kv,
                num_routed_kv=attn_num_routed_kv,
                light_dim_head=attn_light_dim_head,
                light_heads=attn_light_heads,
                light_window_size=attn_light_window_size,
                heavy_dim_head=attn_heavy_dim_head,
                heavy_heads=attn_heavy_heads,
                **shared,
            )

            feed_forward = ConditionalRoutedFeedForward(
                dim,
                num_heavy_tokens=ff_num_heavy_tokens,
                light_ff_mult=ff_light_mult,
                heavy_ff_mult=ff_heavy_mult,
                **shared,
            )
            self.layers.append(nn.ModuleList([attention, feed_forward]))

        # head
        self.linear_head = nn.Sequential(
            nn.LayerNorm(dim, **factory),
            nn.Linear(dim, check_int("num_classes", num_classes), **factory),
        )

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did."""
        init_weights(self)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, patch_size={self.patch_size}"

    def forward(self, img: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify.

        Args:
            img: (B, channels, H, W), any H and W; what a last patch lacks is filled with 0.
            mask: (B, H, W) bool, True = valid pixel. A patch with a valid pixel is valid, and its
                masked pixels count as 0. The others are not read and not in the mean.

        Returns:
            Logits (B, num_classes).

        Raises:
            TypeError, ValueError: for bad arguments.
        """
        self._check_image(img, mask)
        patches, mask = self._patches(img, mask)

        x = self.to_patch_embedding(patches)  # (B, h, w, C)
        x = x + sincos_2d(*x.shape[1:], x.device).to(x.dtype)
        for attention, feed_forward in self.layers:
            x = x + attention(x, mask=mask)
            x = x + feed_forward(x, mask=mask)
        return self.linear_head(_mean(x, mask))

    def _check_image(self, img: Tensor, mask: Tensor | None) -> None:
        check_float_tensor("img", img, ndim=4)
        batch, channels, height, width = img.shape
        if channels != self.channels or height < 1 or width < 1:
            raise ValueError(
                f"img: expected (B, {self.channels}, H, W) of at least one pixel, "
                f"got {tuple(img.shape)}"
            )
        check_mask("mask", mask, (batch, height, width))

    def _patches(self, img: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches (B, h, w, values of a patch), and which of them are valid (B, h, w)."""
        (height, width), (p, q) = img.shape[2:], self.patch_size
        missing = (0, -width % q, 0, -height % p)
        if mask is not None:
            img = torch.where(mask.unsqueeze(1), img, 0)
            pixels = pad(mask.to(torch.float32).unsqueeze(1), missing)
            mask = max_pool2d(pixels, self.patch_size).squeeze(1) > 0
        return rearrange(pad(img, missing), "b c (h p) (w q) -> b h w (p q c)", p=p, q=q), mask


def _check_sizes(image_size, patch_size) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both as (height, width)."""
    image, patch = check_pair("image_size", image_size), check_pair("patch_size", patch_size)
    if any(side % part for side, part in zip(image, patch)):
        raise ValueError(f"image_size: expected multiples of patch_size = {patch}, got {image}")
    return image, patch


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (B, C) of the valid tokens of x (B, h, w, C), 0 of none."""
    if mask is None:
        return x.mean((1, 2))
    # divided before the sum: half precision would overflow
    share = mask.to(x.dtype) / mask.sum((1, 2), keepdim=True).clamp_min(1)
    return (torch.where(mask.unsqueeze(-1), x, 0) * share.unsqueeze(-1)).sum((1, 2))
