"""The size of the map behind a sequence of tokens: what the model itself was given, never a guess from their number."""

import inspect

import torch
from diffusers.models import (
    DiTTransformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    Transformer2DModel,
)
from torch import Tensor, nn

from colt5_vision.reroute import MapSize

_LATENTS = (
    Transformer2DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    SD3ControlNetModel,
)
_PACKED = (FluxTransformer2DModel, FluxControlNetModel)
PARENTS = _LATENTS + _PACKED
"""Models whose forward gets the map as latents (B, C, H, W), or as packed tokens with their positions."""


class _Arguments:
    """Arguments of a module's forward by name, in a pre-hook."""

    def __init__(self, module: nn.Module):
        # of the class: offloading puts another forward on the instance
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.place = {name: i for i, name in enumerate(names)}

    def get(self, name: str, args: tuple, kwargs: dict):
        place = self.place[name]
        return args[place] if place < len(args) else kwargs.get(name)

    def first(self, args: tuple, kwargs: dict):
        return self.get(next(iter(self.place)), args, kwargs)


class Timestep:
    """The timestep of the forward in progress, for schedules; None before the first."""

    def __init__(self):
        self.value: float | None = None


class MapSizeHook:
    """A forward pre-hook (``with_kwargs``) of :func:`entrance`, which begins a pass.

    Attributes:
        map_size: that the attention layers of ``parent`` read.
        told: (H, W) in tokens for packed models under ``torch.compile``, where positions cannot be looked at.
    """

    def __init__(self, parent: nn.Module, told: tuple[int, int] | None = None, timestep: Timestep | None = None):
        self.arguments, self.told = _Arguments(entrance(parent)), told
        self.map_size = MapSize(apart=False)  # the blocks follow in the same forward
        self.packed, self.patch = isinstance(parent, _PACKED), patch_size(parent)
        self.modes = int(getattr(parent, "union", False))  # tokens that a ControlNet puts before the text
        self.timestep = timestep

    def __call__(self, module: nn.Module, args, kwargs) -> None:
        timestep = None if self.timestep is None else self.timestep.value
        if self.packed:
            text = self.arguments.get("encoder_hidden_states", args, kwargs)
            self.map_size.begin(self._packed(args, kwargs), text.shape[1] + self.modes, timestep)
            return
        x = self.arguments.first(args, kwargs)
        size = None
        if isinstance(x, Tensor) and x.ndim == 4:
            size = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        self.map_size.begin(size, timestep=timestep)

    def _packed(self, args, kwargs) -> tuple[int, int] | None:
        """Size of the map whose tokens lie at ``img_ids`` (N, 3) = (_, row, column); None unless all are there in
        raster order."""
        if torch.compiler.is_compiling():
            if self.told is None:
                raise ValueError(
                    "sample_size: Flux gets its map packed, and a compiled graph cannot look at img_ids; compile its "
                    "blocks (compile_repeated_blocks), or tell enable_routed_attention(..., sample_size=(H, W))"
                )
            tokens = self.arguments.get("hidden_states", args, kwargs).shape[1]
            if tokens != self.told[0] * self.told[1]:
                raise ValueError(
                    f"sample_size: expected the {self.told[0]} x {self.told[1]} tokens told to enable_routed_attention, "
                    f"got {tokens}; a Flux model that is compiled as a whole runs at that size only"
                )
            return self.told
        ids = self.arguments.get("img_ids", args, kwargs)
        if not isinstance(ids, Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] != 3:
            return None
        ids = (ids[0] if ids.ndim == 3 else ids)[:, 1:].long()
        height, width = (ids.amax(0) + 1).tolist() if len(ids) else (0, 0)
        if len(ids) == 0 or len(ids) != height * width:
            return None
        place = torch.arange(height * width, device=ids.device)
        return (height, width) if torch.equal(ids[:, 0] * width + ids[:, 1], place) else None


class TimestepHook:
    """A forward pre-hook (``with_kwargs``) of a whole model.

    Raises:
        ValueError: for a model whose forward has no ``timestep``.
    """

    def __init__(self, model: nn.Module, timestep: Timestep):
        self.arguments, self.timestep = _Arguments(model), timestep
        if "timestep" not in self.arguments.place:
            raise ValueError(
                f"schedule: expected a model that takes timestep, got {type(model).__name__}; route the model inside it"
            )

    def __call__(self, model: nn.Module, args, kwargs) -> None:
        value = self.arguments.get("timestep", args, kwargs)
        if isinstance(value, Tensor):
            if torch.compiler.is_compiling():
                raise ValueError(
                    "schedule: a compiled graph cannot look at its timestep; compile the blocks "
                    "(compile_repeated_blocks) instead of the model, or leave timesteps out of the schedule"
                )
            low, high = (float(x) for x in value.aminmax())
            if low != high:
                raise ValueError(f"timestep: the schedule needs one for the whole batch, got {low} to {high}")
            value = low
        self.timestep.value = None if value is None else float(value)


def entrance(parent: nn.Module) -> nn.Module:
    """What gets the latents as its first argument: the patch embedding, or the parent itself.

    A hook of a model that is compiled as a whole is a graph of its own, and the size would be a constant of the next.
    """
    inner = isinstance(parent, Transformer2DModel) and not parent.is_input_patches
    embed = None if isinstance(parent, _PACKED) or inner else parent.pos_embed
    return parent if embed is None else embed


def patch_size(parent: nn.Module) -> int:
    """Latent pixels a side that make a token."""
    if isinstance(parent, _PACKED):
        return 2  # pipelines pack 2 x 2 latents
    if isinstance(parent, Transformer2DModel) and not parent.is_input_patches:
        return 1
    return parent.config.patch_size


def map_of_layer(
    model: nn.Module, name: str, parent: nn.Module | None, sample_size: tuple[int, int]
) -> tuple[int, int] | None:
    """(H, W) in tokens that an attention layer will see; None where nothing tells.

    Args:
        model: a diffusers model.
        name: of the layer in ``model``.
        parent: the one of the :data:`PARENTS` around it; None: the layer gets maps itself.
        sample_size: (H, W) of the latents that ``model`` gets.
    """
    height, width = sample_size
    unet, local = _unet_of(model, name)
    if unet is None and parent is None:  # of an autoencoder
        return None
    for _ in range(0 if unet is None else _halvings(unet, local)):
        height, width = (height + 1) // 2, (width + 1) // 2
    patch = 1 if parent is None else patch_size(parent)
    return height // patch, width // patch


def _unet_of(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The innermost module around a layer that has blocks that change the resolution, and the layer's name in it."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        around = model.get_submodule(".".join(parts[:i]))
        if hasattr(around, "down_blocks"):
            return around, ".".join(parts[i:])
    return None, name


def _halvings(unet: nn.Module, name: str) -> int:
    part, place, *_ = *name.split("."), ""
    down = [int(getattr(block, "downsamplers", None) is not None) for block in unet.down_blocks]
    if part == "down_blocks":
        return sum(down[: int(place)])
    if part == "up_blocks":
        blocks = unet.up_blocks[: int(place)]
        return sum(down) - sum(getattr(block, "upsamplers", None) is not None for block in blocks)
    return sum(down)
