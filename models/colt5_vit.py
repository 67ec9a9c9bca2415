"""CoLT5 vision transformer: isotropic blocks of routed attention and routed feed-forward.

No position table: attention carries 2-D rotary positions, so any input size runs.
CoLT5: arXiv 2303.09752.
"""

import torch
from timm.layers import ClassifierHead, RmsNorm2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from colt5_vision.checks import TokenCount, check_int, check_pair
from colt5_vision.schedule import CarriedSchedule

from ._backbone import Colt5Block, RoutedBackbone, Stem, pretrained_cfg

__all__ = ["Colt5VisionTransformer"]


class Colt5VisionTransformer(RoutedBackbone):
    """Isotropic vision transformer of conditionally routed blocks.

    Args:
        img_size: input size in pixels, recorded only: any size from one patch on runs.
        patch_size: stride of the tokens in pixels.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"`` or ``""`` (the map itself).
        embed_dim, depth, num_heads: width, blocks, heads.
        stem: ``"patch"`` or ``"conv"``.
        window_size: side of the attention windows in tokens.
        num_heavy_tokens_kv: keys that every token sees, an int (that many) or a float in (0, 1]
            (that share). Where the share is 1 there is no router to learn.
        num_heavy_tokens_q: tokens that query them; None for all.
        num_heavy_ff_tokens: tokens that get the heavy feed-forward.
        light_ff_mult, heavy_ff_mult: hidden width of the feed-forwards over ``embed_dim``.
        fusion: ``"softmax"`` or ``"sum"``, see
            :class:`~colt5_vision.ConditionalRoutedImageAttention`.
        router, router_kwargs: see :class:`~colt5_vision.CoordinateDescentRouter`.
        init_values: initial layer scale, None for none.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, growing linearly
            over the blocks.
        routing_schedule: training forwards in which the attentions go from many keys to their own,
            see :class:`~colt5_vision.schedule.CarriedSchedule`. None: their own from the start.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for bad arguments.

    Source: CoLT5 (arXiv 2303.09752).
    """

    levels = "blocks"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        stem: str = "conv",
        window_size: int | tuple[int, int] = 7,
        num_heavy_tokens_kv: TokenCount = 1 / 8,
        num_heavy_tokens_q: TokenCount | None = None,
        num_heavy_ff_tokens: TokenCount = 1 / 4,
        light_ff_mult: float = 1.0,
        heavy_ff_mult: float = 4.0,
        fusion: str = "softmax",
        router: str = "learned",
        router_kwargs: dict | None = None,
        init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        routing_schedule: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}

        # what timm asks of a model
        self.patch_size = check_int("patch_size", patch_size)
        self.img_size = check_pair("img_size", img_size, minimum=patch_size)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dim
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]

        # blocks
        blocks = nn.Sequential(
            *(
                Colt5Block(
                    embed_dim,
                    num_heads=num_heads,
                    window_size=window_size,
                    num_heavy_tokens_q=num_heavy_tokens_q,
                    num_heavy_tokens_kv=num_heavy_tokens_kv,
                    num_heavy_ff_tokens=num_heavy_ff_tokens,
                    light_ff_mult=light_ff_mult,
                    heavy_ff_mult=heavy_ff_mult,
                    fusion=fusion,
                    router=router,
                    router_kwargs=router_kwargs,
                    init_values=init_values,
                    drop_path=rate,
                    **factory,
                )
                for rate in calculate_drop_path_rates(drop_path_rate, depth)
            )
        )

        # in the order of the data
        schedule = CarriedSchedule(blocks, routing_schedule, device=device)
        self.stem = Stem(in_chans, embed_dim, patch_size, stem, schedule, **factory)
        self.blocks = blocks
        self.norm = RmsNorm2d(embed_dim, **factory)
        self.head = ClassifierHead(embed_dim, num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups in the order of depth: the stem, then block by block (``coarse`` or
        not)."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to normalised features (B, embed_dim, H / patch_size, W /
        patch_size)."""
        return self.norm(self.blocks(self.stem(x)))


default_cfgs = generate_default_cfgs(
    {
        "colt5_vit_tiny_patch16_224": pretrained_cfg(224, 16),
        "colt5_vit_tiny_patch16_512": pretrained_cfg(512, 16),
        "colt5_vit_tiny_patch8_224": pretrained_cfg(224, 8),
        "colt5_vit_tiny_patch8_512": pretrained_cfg(512, 8),
        "colt5_vit_small_patch16_224": pretrained_cfg(224, 16),
        "colt5_vit_small_patch16_512": pretrained_cfg(512, 16),
        "colt5_vit_small_patch8_224": pretrained_cfg(224, 8),
        "colt5_vit_small_patch8_512": pretrained_cfg(512, 8),
        "colt5_vit_base_patch16_224": pretrained_cfg(224, 16),
        "colt5_vit_base_patch16_512": pretrained_cfg(512, 16),
        "colt5_vit_base_patch8_224": pretrained_cfg(224, 8),
        "colt5_vit_base_patch8_512": pretrained_cfg(512, 8),
        "colt5_vit_nano_patch8_192": pretrained_cfg(192, 8),
        "test_colt5_vit": pretrained_cfg(96, 8),
    }
)

_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}


def _create(variant: str, pretrained: bool, args: dict) -> Colt5VisionTransformer:
    # features of the last three blocks unless asked otherwise
    feature_cfg = {
        "out_indices": min(3, args["depth"]),
        "feature_cls": "getter",
        "flatten_sequential": True,
    }
    return build_model_with_cfg(
        Colt5VisionTransformer, variant, pretrained, feature_cfg=feature_cfg, **args
    )


@register_model
def colt5_vit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-tiny, stride 16, for 224 px."""
    args = {**_TINY, "patch_size": 16, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_tiny_patch16_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_tiny_patch16_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-tiny, stride 16, for 512 px."""
    args = {**_TINY, "patch_size": 16, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_tiny_patch16_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_tiny_patch8_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-tiny, stride 8, for 224 px."""
    args = {**_TINY, "patch_size": 8, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_tiny_patch8_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_tiny_patch8_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-tiny, stride 8, for 512 px."""
    args = {**_TINY, "patch_size": 8, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_tiny_patch8_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-small, stride 16, for 224 px."""
    args = {**_SMALL, "patch_size": 16, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_small_patch16_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_small_patch16_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-small, stride 16, for 512 px."""
    args = {**_SMALL, "patch_size": 16, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_small_patch16_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_small_patch8_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-small, stride 8, for 224 px."""
    args = {**_SMALL, "patch_size": 8, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_small_patch8_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_small_patch8_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-small, stride 8, for 512 px."""
    args = {**_SMALL, "patch_size": 8, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_small_patch8_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-base, stride 16, for 224 px."""
    args = {**_BASE, "patch_size": 16, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_base_patch16_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_base_patch16_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-base, stride 16, for 512 px."""
    args = {**_BASE, "patch_size": 16, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_base_patch16_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_base_patch8_224(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-base, stride 8, for 224 px."""
    args = {**_BASE, "patch_size": 8, "img_size": 224, "window_size": 7}
    return _create("colt5_vit_base_patch8_224", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_base_patch8_512(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """CoLT5 ViT-base, stride 8, for 512 px."""
    args = {**_BASE, "patch_size": 8, "img_size": 512, "window_size": 8}
    return _create("colt5_vit_base_patch8_512", pretrained, {**args, **kwargs})


@register_model
def colt5_vit_nano_patch8_192(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """A model small enough to train on two CPU cores in minutes; max pooling, for needles in large
    images."""
    args = {
        "img_size": 192,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "window_size": 8,
    }
    args |= {"global_pool": "max", "num_heavy_tokens_kv": 1 / 16, "num_heavy_ff_tokens": 1 / 16}
    return _create("colt5_vit_nano_patch8_192", pretrained, {**args, **kwargs})


@register_model
def test_colt5_vit(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """For tests: below half a million parameters."""
    args = {
        "img_size": 96,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "window_size": 4,
    }
    return _create("test_colt5_vit", pretrained, {**args, **kwargs})
