"""CoLT5 pyramid: four stages at strides 4, 8, 16 and 32, a high-resolution backbone for dense
prediction.

At strides 4, 8 and 16 attention and feed-forward are routed. The key budgets 1/64, 1/16 and 1/4 are
one rule: every token sees its window and as many keys of the whole map as the stride-32 map has
tokens. That last map is small, so there every token is routed, which *is* full attention (and a
full feed-forward), computed without an N x N matrix.
"""

import torch
from timm.layers import ClassifierHead, RmsNorm2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from colt5_vision.checks import TokenCount, check_pair
from colt5_vision.schedule import CarriedSchedule

from ._backbone import Colt5Block, RoutedBackbone, Stem, pretrained_cfg

__all__ = ["Colt5Pyramid"]


def _per_stage(name: str, value, stages: int) -> tuple:
    """``value`` once for each stage; one value that is not a sequence holds for all."""
    if not isinstance(value, (tuple, list)):
        return (value,) * stages
    if len(value) != stages:
        raise ValueError(f"{name}: expected one value for each of {stages} stages, got {value!r}")
    return tuple(value)


class Colt5Stage(nn.Module):
    """Halve the map (all stages but the first) and run the blocks, (B, C, H, W) to (B, dim, H / 2,
    W / 2).

    Args:
        in_dim: channels that come; None: the map comes with ``dim`` channels and keeps its size.
        dim: channels of the stage.
        drop_path_rates: one a block.
        **block: of :class:`Colt5Block`.
    """

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        drop_path_rates: list[float],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.downsample = nn.Identity()
        if in_dim is not None:  # sizes are rounded up: an odd row or column is not lost
            self.downsample = nn.Sequential(
                RmsNorm2d(in_dim, **factory),
                nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **factory),
            )
        self.blocks = nn.Sequential(
            *(Colt5Block(dim, drop_path=rate, **block, **factory) for rate in drop_path_rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Colt5Pyramid(RoutedBackbone):
    """Hierarchical backbone of conditionally routed blocks, at strides 4, 8, 16, 32 (with four
    stages).

    Arguments of four values hold one for each stage; one value holds for all.

    Args:
        img_size: input size in pixels, recorded only: any size from 4 pixels a side on runs, sizes
            are rounded up.
        in_chans: input channels.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``"avg"``, ``"max"``, ``"avgmax"``, ``"catavgmax"`` or ``""`` (the map itself).
        embed_dims, depths, num_heads: widths, blocks and heads of the stages; their number is that
            of ``depths``.
        stem: ``"patch"`` or ``"conv"``, of stride 4.
        window_size: side of the attention windows in tokens.
        num_heavy_tokens_kv: keys that every token sees, an int (that many) or a float in (0, 1]
            (that share). Where the share is 1 attention is full and there is no router to learn.
        num_heavy_ff_tokens: tokens that get the heavy feed-forward, likewise.
        light_ff_mult, heavy_ff_mult: hidden width of the feed-forwards over the stage's.
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

    Source: CoLT5 (arXiv 2303.09752); stages as in Swin (arXiv 2103.14030), keys by stage as in PVT
        (arXiv 2102.12122).
    """

    levels = "stages"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: int | tuple[int, ...] = (2, 4, 8, 16),
        stem: str = "conv",
        window_size: int | tuple[int, ...] = 7,
        num_heavy_tokens_kv: TokenCount | tuple[TokenCount, ...] = (1 / 64, 1 / 16, 1 / 4, 1.0),
        num_heavy_ff_tokens: TokenCount | tuple[TokenCount, ...] = (1 / 16, 1 / 8, 1 / 4, 1.0),
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

        # what differs from stage to stage
        stages, stride = len(depths), 4
        varying = {
            "dim": _per_stage("embed_dims", embed_dims, stages),
            "num_heads": _per_stage("num_heads", num_heads, stages),
            "window_size": _per_stage("window_size", window_size, stages),
            "num_heavy_tokens_kv": _per_stage("num_heavy_tokens_kv", num_heavy_tokens_kv, stages),
            "num_heavy_ff_tokens": _per_stage("num_heavy_ff_tokens", num_heavy_ff_tokens, stages),
            "drop_path_rates": calculate_drop_path_rates(
                drop_path_rate, list(depths), stagewise=True
            ),
        }

        # what timm asks of a model
        dims = varying["dim"]
        self.img_size = check_pair("img_size", img_size, minimum=stride)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": stride * 2**i}
            for i, dim in enumerate(dims)
        ]

        # stages
        levels = nn.Sequential(
            *(
                Colt5Stage(
                    in_dim=dims[i - 1] if i else None,
                    light_ff_mult=light_ff_mult,
                    heavy_ff_mult=heavy_ff_mult,
                    fusion=fusion,
                    router=router,
                    router_kwargs=router_kwargs,
                    init_values=init_values,
                    **{name: values[i] for name, values in varying.items()},
                    **factory,
                )
                for i in range(stages)
            )
        )

        # in the order of the data
        schedule = CarriedSchedule(levels, routing_schedule, device=device)
        self.stem = Stem(in_chans, dims[0], stride, stem, schedule, **factory)
        self.stages = levels
        self.norm = RmsNorm2d(dims[-1], **factory)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups in the order of depth: the stem, then stage by stage (``coarse``) or
        block by block."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))] if coarse else fine,
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to normalised features (B, embed_dims[-1], H / 32, W / 32)."""
        return self.norm(self.stages(self.stem(x)))


default_cfgs = generate_default_cfgs(
    {
        "colt5_pyramid_tiny": pretrained_cfg(224, 32),
        "colt5_pyramid_small": pretrained_cfg(224, 32),
        "colt5_pyramid_base": pretrained_cfg(224, 32),
        "test_colt5_pyramid": pretrained_cfg(96, 32),
    }
)


def _create(variant: str, pretrained: bool, args: dict) -> Colt5Pyramid:
    feature_cfg = {"out_indices": tuple(range(len(args["depths"]))), "flatten_sequential": True}
    return build_model_with_cfg(Colt5Pyramid, variant, pretrained, feature_cfg=feature_cfg, **args)


@register_model
def colt5_pyramid_tiny(pretrained: bool = False, **kwargs) -> Colt5Pyramid:
    """CoLT5 pyramid-tiny."""
    args = {
        "img_size": 224,
        "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 8, 16),
    }
    return _create("colt5_pyramid_tiny", pretrained, {**args, **kwargs})


@register_model
def colt5_pyramid_small(pretrained: bool = False, **kwargs) -> Colt5Pyramid:
    """CoLT5 pyramid-small."""
    args = {
        "img_size": 224,
        "embed_dims": (96, 192, 384, 768),
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
    }
    return _create("colt5_pyramid_small", pretrained, {**args, **kwargs})


@register_model
def colt5_pyramid_base(pretrained: bool = False, **kwargs) -> Colt5Pyramid:
    """CoLT5 pyramid-base."""
    args = {
        "img_size": 224,
        "embed_dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
    }
    return _create("colt5_pyramid_base", pretrained, {**args, **kwargs})


@register_model
def test_colt5_pyramid(pretrained: bool = False, **kwargs) -> Colt5Pyramid:
    """For tests: below half a million parameters."""
    args = {
        "img_size": 96,
        "embed_dims": (16, 32, 64, 96),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 6),
    }
    return _create("test_colt5_pyramid", pretrained, {**args, "window_size": 4, **kwargs})
