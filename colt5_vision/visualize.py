"""See where the heavy branch looked: record the routing of a forward, draw the routed tokens over
the image.

:func:`show_routing` does all of it in one call. :func:`record_routing` and :func:`plot_routing` are
its two halves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .checks import check_int, check_pair
from .router import CoordinateDescentRouter
from .routing import Routing
from .swap.grouped import GROUPED
from .swap.verb import routed_layers
from .swap.window import Grid, several
from .swap.wrappers import models_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["RoutingRecord", "plot_routing", "record_routing", "show_routing"]

# of a router's tokens: what they are called, the part they belong to, and what sets them apart
_ROLES = {
    "kv_router": ("heavy keys", "attention", "every token of the image attends to them"),
    "tile_keys": ("heavy keys", "attention", "the tokens of each tile attend to a few of them"),
    "q_router": ("heavy queries", "attention", "they attend to the heavy keys"),
    "router": ("heavy tokens", "feed-forward", "they go through the large feed-forward too"),
}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RoutingRecord(NamedTuple):
    """One call of one router.

    Attributes:
        name: qualified name of the router in the model, or of the layer that is routed.
        routing: its detached :class:`Routing`, on the CPU.
        grid_size: (H, W) of the map, the first of several, (T * H, W) of a volume, or (1, N) of a
            sequence.
        place: number of this router among those of its kind in the model, from 1, and how many
            there are.
        by_tile: every tile of tokens chose keys of its own, all of them told as one route.
    """

    name: str
    routing: Routing
    grid_size: tuple[int, int]
    place: tuple[int, int] = (1, 1)
    by_tile: bool = False

    @property
    def role(self) -> str:
        """``"kv_router"``, ``"q_router"`` or ``"router"``, of feed-forwards. A layer that went
        through ``route_attention`` routes keys, with a choice for each tile ``"tile_keys"``."""
        return "tile_keys" if self.by_tile else _role(self.name)

    def num_routed(self) -> int:
        """How many tokens of the first sample were routed, by any of the routes."""
        return int(self.heatmap()[0].count_nonzero())

    def heatmap(self) -> Tensor:
        """(B, H, W) share of the routes that took each token, in [0, 1]."""
        indices, taken = self.routing.indices, self.routing.mask.float()  # (B, R, K)
        height, width = self.grid_size
        votes = torch.zeros(*indices.shape[:2], height * width).scatter_add(-1, indices, taken)
        return votes.clamp_max(1).mean(1).unflatten(-1, (height, width))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingRecord]]:
    """Record every router call inside the ``with`` block, in call order.

    Args:
        model: any module that holds :class:`CoordinateDescentRouter` modules, or a model or
            pipeline through ``route_attention`` (a compiled one records while uncompiled).

    Yields:
        A list that fills up as the model runs.

    Raises:
        ValueError: if the model holds no router, and no layer of it is routed.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    routers = {name: m for name, m in modules if isinstance(m, CoordinateDescentRouter)}
    layers = routed_layers(model)
    places = _places([*routers, *layers])
    if not routers and not layers:
        raise ValueError(
            "model: expected a model with routed attention, found no CoordinateDescentRouter in "
            "it, and no layer that went through route_attention"
        )
    records: list[RoutingRecord] = []

    # of a layer to train: what its router returns
    def hook(name: str):
        def record(module, args, kwargs, output):
            grid = kwargs.get("grid_size") or (1, args[0].shape[1])
            routing = Routing(*(field.detach().cpu() for field in output))
            records.append(RoutingRecord(name, routing, tuple(grid), places[name]))

        return record

    # of a routed pretrained layer: the keys that it takes
    def layer_hook(name: str, by_tile: bool):
        def record(indices: Tensor, log_weights: Tensor, grid: Grid) -> None:
            if several(grid):  # those of the first map
                grid = grid[0]
                indices = torch.where(indices < math.prod(grid), indices, -1)
            valid, indices = (indices >= 0).cpu(), indices.clamp_min(0).cpu()
            weights = log_weights.detach().cpu()
            gates = weights.neg().exp().clamp_max(1).masked_fill(~valid, 0)
            fields = (x.unsqueeze(1) for x in (indices, gates, weights, valid))
            height = math.prod(grid[:-1])
            grid = (height, grid[-1])
            records.append(RoutingRecord(name, Routing(*fields), grid, places[name], by_tile))

        return record

    # recorded while the caller runs the model
    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in routers.items()]
    for name, layer in layers.items():
        layer.attention.recorder = layer_hook(name, layer.config.router in GROUPED)
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.attention.recorder = None


def _role(name: str) -> str:
    """What the router of this name routes, a key of :data:`_ROLES`."""
    last = name.rpartition(".")[2]
    return last if last in _ROLES else "kv_router"


def _places(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Of each name its number among those of its role, and their number."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_role(name), []).append(name)
    return {
        name: (number, len(same))
        for same in kinds.values()
        for number, name in enumerate(same, start=1)
    }


def show_routing(
    model: Any,
    image: "Tensor | np.ndarray | Image | str | Path",
    path: str | Path | None = None,
    *,
    layers: int | Sequence[str] = 3,
    size: int | tuple[int, int] | None = None,
    titles: Sequence[str] = (),
    call: Callable[[Tensor], Any] | None = None,
) -> "Figure":
    """Run a model on an image and draw which tokens of it were heavy.

    One image gives two rows and two columns: the image, and three layers. Several images give a row
    each. Heavy tokens keep their colors, with an orange tint. All others turn dark and grey. A line
    below says what heavy means.

    Args:
        model: a module that holds routed layers or is a backbone of them, or a model or pipeline
            through ``route_attention``. It runs in evaluation mode, without gradients.
        image: what the model takes, a tensor (C, H, W) or (B, C, H, W). Or a picture: a file, a PIL
            image, an array (H, W) or (H, W, 3) of bytes. A picture is normalised with the mean and
            deviation of a timm model, for other models with those of ImageNet.
        path: where to save the picture; None: only return it.
        layers: how many of the layers to draw, spread over the depth, or patterns of their names.
        size: (height, width) in pixels to resize the image to; None: as it is.
        titles: one for each image.
        call: how to run the model on the (B, C, H, W) tensor; None: ``model(image)``. For a
            pipeline ``lambda _: pipe(prompt)``.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing (extra ``viz``).
        TypeError, ValueError: for an image that is none of those; if nothing of the model is
            routed, or nothing was at this size; if no routed layer has such a name.
    """
    _figure_class()  # before the model runs
    modules = [module for part in models_of(model).values() for module in part.modules()]
    x = _as_input(image, modules, size)

    # a forward that leaves no trace
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        with record_routing(model) as records, torch.no_grad():
            (model if call is None else call)(x)
    finally:
        for module, mode in modes:
            module.training = mode

    chosen = _choose(_of_maps(records, model), layers)
    return plot_routing(_as_shown(image, x), chosen, path, titles=titles)


def plot_routing(
    images: Tensor,
    records: Sequence[RoutingRecord],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] = (),
) -> "Figure":
    """Draw a row per image: the image, then for each record the image with its heavy tokens in
    color. Many panels go on in further rows: four in a row for one image, seven for several.

    Args:
        images: (B, 1 or 3, H, W); stretched to [0, 1] image by image.
        records: of :func:`record_routing` for the same batch.
        path: where to save the picture; None: only return it.
        titles: one for each image.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing (extra ``viz``).
        TypeError, ValueError: for images, records and titles that do not fit.
    """
    figure_class = _figure_class()
    _check_picture(images, records, titles)
    images = _stretched(images)

    # a grid without axes, its cells as high as the images
    panels, most = 1 + len(records), 4 if len(images) == 1 else 7
    columns = 2 if (len(images), panels) == (1, 4) else min(panels, most)
    rows = len(images) * math.ceil(panels / columns)
    width = min(3.2, 24 / columns)
    height = width * images.shape[-2] / images.shape[-1] + 0.45
    figure = figure_class(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(len(images), -1)
    for axis in axes.flat:
        axis.set_axis_off()

    # the images, each before its panels
    for row, image in enumerate(images):
        axes[row][0].imshow(image.permute(1, 2, 0))
        axes[row][0].set_title(titles[row] if titles else "image", fontsize=9)

    # a panel for each record
    names = _plain_names(records)
    for column, record in enumerate(records, start=1):
        shown = _highlighted(images, record.heatmap())
        for row, image in enumerate(shown):
            axes[row][column].imshow(image.permute(1, 2, 0))
        axes[0][column].set_title(names[column - 1], fontsize=9)

    figure.supxlabel(_legend(records), fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _figure_class() -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "colt5_vision.visualize needs matplotlib: pip install matplotlib"
        ) from error
    return Figure


def _read(image: Any) -> Tensor:
    """A picture as (3, H, W) in [0, 1]."""
    if isinstance(image, (str, Path)):
        from PIL import Image, ImageOps

        with Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    elif hasattr(image, "convert"):  # a PIL image
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
        raise TypeError(
            "image: expected a tensor, a file, a PIL image, or an array (H, W) or (H, W, 3) of "
            f"bytes, got {type(image).__name__} of {pixels.dtype} {pixels.shape}"
        )
    values = torch.from_numpy(pixels.copy()).float() / 255
    return values.expand(3, -1, -1) if values.ndim == 2 else values.permute(2, 0, 1)


def _as_input(image: Any, modules: Sequence[nn.Module], size) -> Tensor:
    """(B, C, H, W) as the model takes it, where the model is."""
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4):
            raise ValueError(f"image: expected (C, H, W) or (B, C, H, W), got {tuple(image.shape)}")
        x = image if image.ndim == 4 else image.unsqueeze(0)
    else:
        told = next((m.pretrained_cfg for m in modules if hasattr(m, "pretrained_cfg")), {})
        mean, deviation = (
            torch.tensor(told.get(name, usual)).view(-1, 1, 1)
            for name, usual in zip(("mean", "std"), _IMAGENET)
        )
        x = ((_read(image) - mean) / deviation).unsqueeze(0)
    if size is not None:
        pair = check_pair("size", size)
        x = nn.functional.interpolate(x.float(), pair, mode="bilinear", antialias=True)
    one = next((p for m in modules for p in m.parameters(recurse=False)), x)
    return x.to(one.device, one.dtype if one.is_floating_point() else torch.float32)


def _as_shown(image: Any, x: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) to draw on: the picture itself, or the model's input."""
    if isinstance(image, Tensor):
        return x if x.shape[1] in (1, 3) else x.float().mean(1, keepdim=True)
    shown = _read(image).unsqueeze(0)
    return nn.functional.interpolate(shown, x.shape[-2:], mode="bilinear", antialias=True)


def _of_maps(records: Sequence[RoutingRecord], model: Any) -> list[RoutingRecord]:
    """The records that choose among the tokens of a map."""
    maps = [record for record in records if record.grid_size[0] > 1]
    if not maps:
        reasons = [r for layer in routed_layers(model).values() for r in layer.calls.exact]
        why = f": {', '.join(dict.fromkeys(reasons))}" if reasons else ""
        raise ValueError(f"image: no layer routed tokens of a map at this size{why}")
    choosing = [r for r in maps if r.num_routed() < math.prod(r.grid_size)]
    return choosing or maps


def _choose(records: list[RoutingRecord], layers: int | Sequence[str]) -> list[RoutingRecord]:
    """Some of the records: of the wanted names, or so many of keys, spread over the depth."""
    if isinstance(layers, str):
        raise TypeError(f"layers: expected a number or a list of patterns, got {layers!r}")
    if not isinstance(layers, int):
        found = [r for r in records if any(fnmatchcase(r.name, one) for one in layers)]
        if not found:
            names = ", ".join(dict.fromkeys(record.name for record in records))
            raise ValueError(f"layers: expected some of {names}, got {list(layers)}")
        return found
    keys = [record for record in records if record.role in ("kv_router", "tile_keys")] or records
    count = min(check_int("layers", layers), len(keys))
    return [keys[round(i)] for i in np.linspace(0, len(keys) - 1, count)]


def _plain_names(records: Sequence[RoutingRecord]) -> list[str]:
    """Titles without names of code."""
    names = []
    for record in records:
        what, part, _ = _ROLES[record.role]
        tokens = math.prod(record.grid_size)
        number, layers = record.place
        title = f"{part}, layer {number} of {layers}"
        names.append(f"{title}\n{record.num_routed():,} {what} of {tokens:,} tokens")
    return names


def _legend(records: Sequence[RoutingRecord]) -> str:
    """What heavy means, for the kinds of tokens that are drawn."""
    roles = dict.fromkeys(record.role for record in records)
    return "\n".join(f"In color: {_ROLES[role][0]}, {_ROLES[role][2]}" for role in roles)


def _check_picture(images: Tensor, records: Sequence[RoutingRecord], titles: Sequence[str]) -> None:
    """Images, maps of them, and titles belong together."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (B, 1 or 3, H, W), got {tuple(images.shape)}")
    samples, _, height, width = images.shape
    for record in records:
        routed = record.routing.indices.shape[0]
        if routed != samples:
            raise ValueError(f"records: expected {samples} samples, {record.name} has {routed}")
        rows, columns = record.grid_size
        if rows == 1 and columns > 2 * math.ceil(width / height):
            raise ValueError(
                f"records: expected maps of the images, {record.name} routed a sequence of "
                f"{columns} tokens"
            )
    if titles and len(titles) != samples:
        raise ValueError(f"titles: expected {samples}, got {len(titles)}")


def _stretched(images: Tensor) -> Tensor:
    """(B, 3, H, W) on the CPU, each image from 0 to 1."""
    images = images.detach().float().cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp_min(1e-12)).expand(-1, 3, -1, -1)


def _highlighted(images: Tensor, heat: Tensor) -> Tensor:
    """Images (B, 3, H, W), dark and grey where ``heat`` (B, h, w) is 0, tinted orange where it is
    1."""
    heat = nn.functional.interpolate(heat.unsqueeze(1), size=images.shape[-2:], mode="nearest")
    orange = torch.tensor([1.0, 0.55, 0.1]).view(3, 1, 1)
    rest = 0.4 * images.mean(1, keepdim=True)
    return rest + heat * (0.5 * images + 0.5 * orange - rest)
