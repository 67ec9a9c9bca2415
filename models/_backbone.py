"""What the routed backbones share: stems, the block, and timm's model contract."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale2d, get_device_dtype
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, fx, nn

from colt5_vision._fx import fx_leaf
from colt5_vision.attention import ConditionalRoutedImageAttention
from colt5_vision.branches import LightBranch
from colt5_vision.checks import TokenCount, check_pair
from colt5_vision.feedforward import ConditionalRoutedFeedForward
from colt5_vision.schedule import CarriedSchedule


def check_image(x: Tensor, stride: int) -> Tensor:
    """``x`` as a batch of images of at least one token."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (B, C, H, W), got {x.ndim} dimensions")
    if x.shape[2] < stride or x.shape[3] < stride:
        raise ValueError(
            f"x: expected an image of at least {stride} pixels a side, "
            f"got {x.shape[2]} x {x.shape[3]}"
        )
    return x


fx.wrap("check_image")  # one call in a graph


class Stem(nn.Module):
    """Image (B, C, H, W) to tokens (B, dim, H / stride, W / stride), channels last in memory.

    Args:
        in_chans, dim: channels of the image and of the tokens.
        stride: pixels per token.
        kind: ``"patch"``, one convolution over disjoint patches (pixels beyond the last whole patch
            are not seen); or ``"conv"``, 3x3 convolutions of stride 2 up to ``stride`` (a power of
            two), then one of stride 1; sizes are rounded up.
        schedule: counts the images' way through the model.
        device, dtype: of the parameters.

    Raises:
        ValueError: for bad arguments.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int,
        kind: str,
        schedule: CarriedSchedule,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in _STEMS:
            raise ValueError(f"stem: expected one of {tuple(_STEMS)}, got {kind!r}")
        self.stride, self.schedule = stride, schedule
        self.convs = _STEMS[kind](in_chans, dim, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(self.schedule(check_image(x, self.stride)))
        # a token's channels side by side: the blocks then read the map as tokens without a copy
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _patch_convs(in_chans: int, dim: int, stride: int, **factory) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, dim, stride, stride, **factory))


def _overlapping_convs(in_chans: int, dim: int, stride: int, **factory) -> nn.Sequential:
    steps = stride.bit_length() - 1
    if 2**steps != stride:
        raise ValueError(f"patch_size: stem='conv' needs a power of two, got {stride}")
    layers = []
    for width in (max(8, dim >> (steps - 1 - i)) for i in range(steps)):
        layers.append(nn.Conv2d(in_chans, width, 3, 2, 1, bias=False, **factory))
        layers += [nn.BatchNorm2d(width, **factory), nn.GELU()]
        in_chans = width
    return nn.Sequential(*layers, nn.Conv2d(in_chans, dim, 3, 1, 1, **factory))


_STEMS = {"patch": _patch_convs, "conv": _overlapping_convs}


def routes_all(*counts: TokenCount | None) -> bool:
    """Every token is routed whatever the size of the map: there is nothing to learn about which."""
    return all(count is None or (isinstance(count, float) and count == 1) for count in counts)


class Colt5Block(nn.Module):
    """Routed attention and routed feed-forward over (B, C, H, W), each with residual, layer scale
    and drop path.

        x ─┬─ attn ─ ls1 ─ drop_path1 ─ + ─┬─ mlp ─ ls2 ─ drop_path2 ─ + ─ out
           └────────────────────────────┘  └───────────────────────────┘

    Args:
        dim: channels C.
        num_heads: heads of both branches of the attention.
        window_size: side of the attention windows in tokens.
        num_heavy_tokens_kv, num_heavy_tokens_q, num_heavy_ff_tokens: token counts, of the attention
            and of the feed-forward.
        light_ff_mult, heavy_ff_mult: hidden width of the feed-forwards over ``dim``.
        fusion: of the attention.
        router, router_kwargs: of both, where not all tokens are routed.
        init_values: initial layer scale; None or 0: none.
        drop_path: probability that a sample skips a branch.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for bad arguments.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={dim}, got {num_heads}")
        factory = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False

        # a router only where there is something to choose
        learned = {"router": router, "router_kwargs": router_kwargs}
        routing = (
            {"router": "grid"} if routes_all(num_heavy_tokens_q, num_heavy_tokens_kv) else learned
        )
        ff_routing = {"router": "grid"} if routes_all(num_heavy_ff_tokens) else learned

        # attention, both branches of the same heads
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
            **routing,
            **factory,
        )

        # feed-forward
        self.mlp = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            **ff_routing,
            **factory,
        )

        # residual connections
        self.ls1 = LayerScale2d(dim, init_values, **factory) if init_values else nn.Identity()
        self.ls2 = LayerScale2d(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return self._forward(x)
        # backward may come after a schedule's next step, and must run the same counts again
        queries = self.attn.queries_now(self.attn.num_heavy_tokens_q)
        keys = self.attn.keys_now(self.attn.num_heavy_tokens_kv)
        return checkpoint(self._forward, x, queries, keys)

    def _forward(
        self, x: Tensor, queries: TokenCount | None = None, keys: TokenCount | None = None
    ) -> Tensor:
        attended = self.attn(x, num_heavy_tokens_q=queries, num_heavy_tokens_kv=keys)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(x)))


class RoutedBackbone(nn.Module):
    """timm's contract for stem → feature levels → norm → head; everything is (B, C, H, W).

    A subclass makes ``stem``, its feature levels, ``norm`` and ``head``, in this order. It sets
    ``feature_info``, ``img_size``, ``in_chans``, ``num_classes``, ``num_features`` and
    ``head_hidden_size``. Its constructor ends with :meth:`init_weights`.

    Attributes:
        levels: name of the ``nn.Sequential`` of the feature levels.
    """

    levels: str

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor did: Linears from a normal of 0.02, cut off.

        After ``to_empty`` nothing is left uninitialised. A schedule starts anew, too.
        """
        _init_weights(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the learned tokens: routing tokens, null keys, values and queries."""
        suffixes = ("routing_token", "null_key.kv", "null_q_token")
        return {name for name, _ in self.named_parameters() if name.endswith(suffixes)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward and run the blocks again."""
        for module in self.modules():
            if isinstance(module, Colt5Block):
                module.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer from pooled features to logits; an identity if there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` outputs (0: none), and the
        pooling if given."""
        self.num_classes = num_classes
        factory = get_device_dtype(self)
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, **factory
        )
        self.head_hidden_size = self.head.num_features

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Record the size (side, or (height, width), in pixels) the model is used at. Any size runs
        without it.

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
        """Features of the levels ``indices`` (an int: the last so many; None: all), each (B, C, H /
        r, W / r) with C and r of ``feature_info``.

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

        # level by level
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
        """Drop the levels behind the last of ``indices``; norm and classifier on demand, or where
        they no longer fit.

        Returns:
            The indices as numbers from the first level on.
        """
        levels = getattr(self, self.levels)
        take, last = feature_take_indices(len(levels), indices)
        del levels[last + 1 :]
        self.stem.schedule.follow(levels)

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
    """Children first, for a light branch scales what its Linears drew."""
    for child in module.children():
        _init_weights(child)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LightBranch):
        module.start_small()
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


def pretrained_cfg(side: int, reduction: int) -> dict:
    """timm's description of a model for images of ``side`` pixels whose features are ``reduction``
    times smaller."""
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
