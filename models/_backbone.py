"""What the routed backbones share: stems, the block, and timm's model contract."""

from weakref import WeakValueDictionary

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerScale2d, get_device_dtype
from timm.models import (
    checkpoint,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from colt5_vision.attention import ConditionalRoutedImageAttention
from colt5_vision.branches import LightBranch
from colt5_vision.checks import TokenCount, check_pair
from colt5_vision.feedforward import ConditionalRoutedFeedForward


@register_notrace_function
def check_image(x: Tensor, stride: int) -> Tensor:
    """``x`` as a batch of images of at least one token. One call in an FX graph, compiled by TorchScript."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (B, C, H, W), got {x.ndim} dimensions")
    if x.shape[2] < stride or x.shape[3] < stride:
        raise ValueError(f"x: expected an image of at least {stride} pixels a side, got {x.shape[2]} x {x.shape[3]}")
    return x


class Stem(nn.Module):
    """Image (B, C, H, W) to tokens (B, dim, H / stride, W / stride), channels last in memory.

    Args:
        in_chans, dim: channels of the image and of the tokens.
        stride: pixels per token.
        kind: ``"patch"``, one convolution over disjoint patches (pixels beyond the last whole patch are not seen); or
            ``"conv"``, 3x3 convolutions of stride 2 up to ``stride`` (a power of two), then one of stride 1; sizes are
            rounded up.
        device, dtype: of the parameters.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, kind: str, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if kind not in ("patch", "conv"):
            raise ValueError(f"stem: expected 'patch' or 'conv', got {kind!r}")
        self.stride = stride
        if kind == "patch":
            self.convs = nn.Sequential(nn.Conv2d(in_chans, dim, stride, stride, **factory))
            return
        steps = stride.bit_length() - 1
        if 2**steps != stride:
            raise ValueError(f"patch_size: stem='conv' needs a power of two, got {stride}")
        layers = []
        for width in (max(8, dim >> (steps - 1 - i)) for i in range(steps)):
            layers.append(nn.Conv2d(in_chans, width, 3, 2, 1, bias=False, **factory))
            layers += [nn.BatchNorm2d(width, **factory), nn.GELU()]
            in_chans = width
        self.convs = nn.Sequential(*layers, nn.Conv2d(in_chans, dim, 3, 1, 1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        # a token's channels side by side: the blocks then read the map as tokens without a copy
        return self.convs(check_image(x, self.stride)).contiguous(memory_format=torch.channels_last)


def routes_all(*counts: TokenCount | None) -> bool:
    """Every token is routed whatever the size of the map: there is nothing to learn about which."""
    return all(count is None or isinstance(count, float) and count == 1 for count in counts)


_PYTHON_MODULES: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


@torch.jit.ignore
def call_python(module_id: int, x: Tensor) -> Tensor:
    """What TorchScript calls in place of a module that it cannot compile."""
    return _PYTHON_MODULES[module_id](x)


@register_notrace_module  # for FX a leaf
class Colt5Block(nn.Module):
    """Routed attention and routed feed-forward over (B, C, H, W), each with residual, layer scale and drop path.

    TorchScript calls the routed modules through Python: a scripted model runs and trains with them, but can be neither
    copied nor saved (``torch.export`` does that).
    """

    # the scripted block holds these as they are; it calls them by id, for an ignored method sees no Python attribute
    __jit_ignored_attributes__ = ("attn", "mlp")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: int | tuple[int, int],
        num_heavy_tokens_kv: TokenCount,
        num_heavy_ff_tokens: TokenCount,
        num_heavy_tokens_q: TokenCount | None = None,
        light_ff_mult: float,
        heavy_ff_mult: float,
        fusion: str,
        router: str,
        router_kwargs: dict | None,
        init_values: float | None,
        drop_path: float,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={dim}, got {num_heads}")
        self.grad_checkpointing = False
        self.attn_id = self.mlp_id = 0  # set when TorchScript asks

        def routing(*counts: TokenCount | None) -> dict:
            return {"router": "grid"} if routes_all(*counts) else {"router": router, "router_kwargs": router_kwargs}

        self.attn = ConditionalRoutedImageAttention(
            dim,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_heads=num_heads,
            light_dim_head=dim // num_heads,
            light_window_size=window_size,
            heavy_heads=num_heads,
            heavy_dim_head=dim // num_heads,
            fusion=fusion,
            rotary_emb=True,
            **routing(num_heavy_tokens_q, num_heavy_tokens_kv),
            **factory,
        )
        self.mlp = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            **routing(num_heavy_ff_tokens),
            **factory,
        )
        self.ls1 = LayerScale2d(dim, init_values, **factory) if init_values else nn.Identity()
        self.ls2 = LayerScale2d(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def __prepare_scriptable__(self) -> "Colt5Block":
        self.attn_id, self.mlp_id = id(self.attn), id(self.mlp)
        _PYTHON_MODULES.update({self.attn_id: self.attn, self.mlp_id: self.mlp})
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        attended = call_python(self.attn_id, x) if torch.jit.is_scripting() else self.attn(x)
        x = x + self.drop_path1(self.ls1(attended))
        fed = call_python(self.mlp_id, x) if torch.jit.is_scripting() else self.mlp(x)
        return x + self.drop_path2(self.ls2(fed))


class RoutedBackbone(nn.Module):
    """timm's contract for stem → feature levels → norm → head; everything is (B, C, H, W).

    A subclass sets ``levels``, the name of the ``nn.Sequential`` of its feature levels, then ``stem``, the levels,
    ``norm``, ``feature_info``, ``num_features``, and calls :meth:`_add_head`.
    """

    levels: str

    def __init__(self, img_size: int | tuple[int, int], stem: Stem, in_chans: int, num_classes: int):
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.stem = stem
        self.img_size = check_pair("img_size", img_size, minimum=stem.stride)

    def _add_head(self, global_pool: str, drop_rate: float) -> None:
        factory = get_device_dtype(self)
        self.head = ClassifierHead(self.num_features, self.num_classes, global_pool, drop_rate, **factory)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, LightBranch):
                module.start_small()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the learned tokens: routing tokens, null keys, values and queries."""
        suffixes = ("routing_token", "null_kv", "null_q_token")
        return {name for name, _ in self.named_parameters() if name.endswith(suffixes)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward and run the blocks again."""
        for module in self.modules():
            if isinstance(module, Colt5Block):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer from pooled features to logits; an identity if there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` outputs (0: none), and the pooling if given."""
        self.num_classes = num_classes
        factory = get_device_dtype(self)
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **factory)
        self.head_hidden_size = self.head.num_features

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Record the size (side, or (height, width), in pixels) the model is used at. Any size runs without it.

        Raises:
            TypeError, ValueError: if it is not one or two integers of at least one token.
        """
        self.img_size = check_pair("img_size", img_size, minimum=self.stem.stride)
        update_model_input_size(self, self.img_size)

    def _fits_norm(self, index: int) -> bool:
        """The final norm is made for the last level; others may be of another width."""
        return self.feature_info[index]["num_chs"] == self.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the levels ``indices`` (an int: the last so many; None: all), each (B, C, H / r, W / r) with C
        and r of ``feature_info``.

        Args:
            x: (B, C, H, W).
            norm: apply the final norm to each level of its width.
            stop_early: do not run the levels behind the last index.
            output_fmt: ``"NCHW"`` only.
            intermediates_only: leave the final features out of the result.

        Raises:
            ValueError: for another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        levels = getattr(self, self.levels)
        take, last = feature_take_indices(len(levels), indices)
        x, intermediates, fits = self.stem(x), [], False
        for i, level in enumerate(levels[: last + 1] if stop_early else levels):
            x, fits = level(x), self._fits_norm(i)
            if i in take:
                intermediates.append((self.norm(x) if norm and fits else x).contiguous())
        if intermediates_only:
            return intermediates
        return self.norm(x) if fits else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the levels behind the last of ``indices``; norm and classifier on demand, or where they no longer fit.

        Returns:
            The indices as numbers from the first level on.
        """
        levels = getattr(self, self.levels)
        take, last = feature_take_indices(len(levels), indices)
        del levels[last + 1 :]
        fits = self._fits_norm(last)
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_norm or not fits:
            self.norm = nn.Identity()
        if prune_head or not fits:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pretrained_cfg(side: int, reduction: int) -> dict:
    """timm's description of a model for images of ``side`` pixels whose features are ``reduction`` times smaller."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // reduction, side // reduction),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.convs.0",
        "classifier": "head.fc",
        "license": "mit",
    }
