"""CoLT5 vision transformer: isotropic blocks of routed attention and routed feed-forward.

No position table: attention carries 2-D rotary positions, so any input size runs. CoLT5: arXiv 2303.09752.
"""

from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from colt5_vision.attention import ConditionalRoutedImageAttention
from colt5_vision.checks import TokenCount
from colt5_vision.feedforward import ConditionalRoutedFeedForward

__all__ = ["Colt5VisionTransformer"]


def patch_stem(in_chans: int, dim: int, patch_size: int) -> nn.Module:
    """One convolution over disjoint patches."""
    return nn.Conv2d(in_chans, dim, patch_size, patch_size)


def conv_stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    """3x3 convolutions of stride 2 up to ``patch_size`` (a power of two), then one of stride 1 to ``dim``."""
    steps = patch_size.bit_length() - 1
    if 2**steps != patch_size:
        raise ValueError(f"patch_size: stem='conv' needs a power of two, got {patch_size}")
    widths = [max(8, dim >> (steps - 1 - i)) for i in range(steps)]
    layers, last = [], in_chans
    for width in widths:
        layers += [nn.Conv2d(last, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        last = width
    return nn.Sequential(*layers, nn.Conv2d(last, dim, 3, 1, 1))


class Colt5Block(nn.Module):
    """Routed attention and routed feed-forward over (B, H, W, C), each with residual, layer scale and drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        num_heavy_tokens_q: TokenCount | None,
        num_heavy_tokens_kv: TokenCount,
        num_heavy_ff_tokens: TokenCount,
        light_ff_mult: float,
        heavy_ff_mult: float,
        fusion: str,
        router: str,
        router_kwargs: dict | None,
        init_values: float | None,
        drop_path: float,
    ):
        super().__init__()
        heads = {"light_heads": num_heads, "heavy_heads": num_heads}
        widths = {"light_dim_head": dim // num_heads, "heavy_dim_head": dim // num_heads}
        self.attn = ConditionalRoutedImageAttention(
            dim,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_window_size=window_size,
            fusion=fusion,
            rotary_emb=True,
            channel_first=False,
            router=router,
            router_kwargs=router_kwargs,
            **heads,
            **widths,
        )
        self.mlp = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            channel_first=False,
            router=router,
            router_kwargs=router_kwargs,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(x)))
        return x + self.drop_path2(self.ls2(self.mlp(x)))


class Colt5VisionTransformer(nn.Module):
    """Isotropic vision transformer of conditionally routed blocks.

    Args:
        img_size: default input size, for information only: any size from one patch on runs.
        patch_size: stride of the tokens in pixels.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"`` or ``""`` (the map itself).
        embed_dim, depth, num_heads: width, blocks, heads.
        stem: ``"patch"`` or ``"conv"``.
        window_size: side of the attention windows in tokens.
        num_heavy_tokens_kv: keys that every token sees, an int (that many) or a float in (0, 1] (that share).
        num_heavy_tokens_q: tokens that query them; None for all.
        num_heavy_ff_tokens: tokens that get the heavy feed-forward.
        light_ff_mult, heavy_ff_mult: hidden width of the feed-forwards over ``embed_dim``.
        fusion: ``"softmax"`` or ``"sum"``, see :class:`~colt5_vision.ConditionalRoutedImageAttention`.
        router, router_kwargs: see :class:`~colt5_vision.CoordinateDescentRouter`.
        init_values: initial layer scale, None for none.
        drop_rate, drop_path_rate: dropout before the classifier; stochastic depth, growing linearly over the blocks.

    Raises:
        ValueError: naming the argument.

    Source: CoLT5 (arXiv 2303.09752).
    """

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
        window_size: int = 7,
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
    ):
        super().__init__()
        if stem not in ("patch", "conv"):
            raise ValueError(f"stem: expected 'patch' or 'conv', got {stem!r}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
        self.img_size, self.patch_size = img_size, patch_size
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, embed_dim, embed_dim
        self.grad_checkpointing = False
        self.stem = (conv_stem if stem == "conv" else patch_stem)(in_chans, embed_dim, patch_size)
        block = partial(
            Colt5Block,
            embed_dim,
            num_heads,
            window_size,
            num_heavy_tokens_q,
            num_heavy_tokens_kv,
            num_heavy_ff_tokens,
            light_ff_mult,
            heavy_ff_mult,
            fusion,
            router,
            router_kwargs,
            init_values,
        )
        self.blocks = nn.ModuleList(block(drop_path_rate * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.RMSNorm(embed_dim, eps=1e-6)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {
            name for name, _ in self.named_parameters() if name.endswith(("routing_token", "null_kv", "null_q_token"))
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` outputs (0: none), and the pooling if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        width = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(self.drop_rate)
        self.head = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()

    def _embed(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(f"x: expected an image of at least {self.patch_size} pixels a side, got {tuple(x.shape)}")
        return self.stem(x).permute(0, 2, 3, 1)

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the blocks ``indices`` (an int: the last so many; None: all), each (B, C, H / patch, W / patch).

        Args:
            x: (B, C, H, W).
            norm: apply the final norm to each.
            stop_early: do not run the blocks behind the last index.
            output_fmt: ``"NCHW"`` only.
            intermediates_only: leave the final features out of the result.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, intermediates = self._embed(x), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._block(block, x)
            if i in take:
                intermediates.append((self.norm(x) if norm else x).permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return intermediates
        return self.norm(x).permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of ``indices``, and on demand norm and classifier."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to normalised features (B, embed_dim, H / patch, W / patch)."""
        x = self._embed(x)
        for block in self.blocks:
            x = self._block(block, x)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to the pooled features with ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**kwargs) -> dict:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"colt5_vit_{size}_patch{patch}_{side}": _cfg(input_size=(3, side, side))
            for size in _SIZES
            for patch in (16, 8)
            for side in (224, 512)
        },
        "colt5_vit_nano_patch8_192": _cfg(input_size=(3, 192, 192)),
        "test_colt5_vit": _cfg(input_size=(3, 96, 96)),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    last = min(3, kwargs.get("depth", 12))  # features of the last three blocks unless asked otherwise
    feature_cfg = {"out_indices": kwargs.pop("out_indices", last), "feature_cls": "getter"}
    return build_model_with_cfg(Colt5VisionTransformer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _sized(variant: str, size: str, patch_size: int, img_size: int):
    """The registered constructor of one of the sizes × strides × resolutions."""
    dim, depth, heads = _SIZES[size]

    def create(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
        args = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
            "window_size": 7 if img_size == 224 else 8,
        }
        return _create(variant, pretrained, **{**args, **kwargs})

    create.__name__ = create.__qualname__ = variant
    create.__module__ = __name__
    create.__doc__ = f"CoLT5 ViT-{size}, stride {patch_size}, for {img_size} px."
    return create


for _size in _SIZES:
    for _patch in (16, 8):
        for _side in (224, 512):
            _name = f"colt5_vit_{_size}_patch{_patch}_{_side}"
            globals()[_name] = register_model(_sized(_name, _size, _patch, _side))


@register_model
def colt5_vit_nano_patch8_192(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """A model small enough to train on two CPU cores in minutes; max pooling, for needles in large images."""
    args = {"img_size": 192, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "window_size": 8}
    args |= {"global_pool": "max", "num_heavy_tokens_kv": 1 / 16, "num_heavy_ff_tokens": 1 / 16}
    return _create("colt5_vit_nano_patch8_192", pretrained, **{**args, **kwargs})


@register_model
def test_colt5_vit(pretrained: bool = False, **kwargs) -> Colt5VisionTransformer:
    """For tests: below half a million parameters."""
    args = {"img_size": 96, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "window_size": 4}
    return _create("test_colt5_vit", pretrained, **{**args, **kwargs})
