"""See where the heavy branch looked: record the routing of a forward, draw the routed tokens over
the image."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .router import CoordinateDescentRouter
from .routing import Routing
from .swap.verb import routed_layers


class RoutingRecord(NamedTuple):
    """One call of one router.

    Attributes:
        name: qualified name of the router in the model, or of the layer that is routed.
        routing: its detached :class:`Routing`, on the CPU.
        grid_size: (H, W) of the map, (T * H, W) of a volume, or (1, N) of a sequence.
    """

    name: str
    routing: Routing
    grid_size: tuple[int, int]

    def heatmap(self) -> Tensor:
        """(B, H, W) share of the routes that took each token, in [0, 1]."""
        indices, taken = self.routing.indices, self.routing.mask.float()  # (B, R, K)
        height, width = self.grid_size
        votes = torch.zeros(*indices.shape[:2], height * width).scatter_add(-1, indices, taken)
        return votes.mean(1).unflatten(-1, (height, width))


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
    if not routers and not layers:
        raise ValueError(
            "model: expected a model with routed attention, found no CoordinateDescentRouter in "
            "it, and no layer that went through route_attention"
        )
    records: list[RoutingRecord] = []

    def hook(name: str):
        def record(module, args, kwargs, output):
            grid = kwargs.get("grid_size") or (1, args[0].shape[1])
            routing = Routing(*(field.detach().cpu() for field in output))
            records.append(RoutingRecord(name, routing, tuple(grid)))

        return record

    def layer_hook(name: str):
        def record(indices: Tensor, log_weights: Tensor, grid: tuple[int, ...]) -> None:
            valid, indices = (indices >= 0).cpu(), indices.clamp_min(0).cpu()
            weights = log_weights.detach().cpu()
            gates = weights.neg().exp().clamp_max(1).masked_fill(~valid, 0)
            fields = (x.unsqueeze(1) for x in (indices, gates, weights, valid))
            height = math.prod(grid[:-1])
            records.append(RoutingRecord(name, Routing(*fields), (height, grid[-1])))

        return record

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in routers.items()]
    for name, layer in layers.items():
        layer.attention.recorder = layer_hook(name)
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.attention.recorder = None


def plot_routing(
    images: Tensor,
    records: Sequence[RoutingRecord],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] = (),
):
    """Draw a row per image: the image, then for each record the image with everything dimmed but
    the routed tokens.

    Args:
        images: (B, 1 or 3, H, W); stretched to [0, 1] image by image.
        records: of :func:`record_routing` for the same batch.
        path: where to save the picture; None: only return it.
        titles: one for each image.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing (extra ``viz``).
        ValueError: for images, records and titles that do not fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_routing needs matplotlib: pip install 'colt5-vision[viz]'"
        ) from error
    _check_picture(images, records, titles)
    images = _stretched(images)

    # a grid without axes
    rows, columns = len(images), 1 + len(records)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()

    # the images in the first column
    for row, image in enumerate(images):
        axes[row][0].imshow(image.permute(1, 2, 0))
        axes[row][0].set_title(titles[row] if titles else "input", fontsize=8)

    # a column for each record
    for column, record in enumerate(records, start=1):
        shown = _highlighted(images, record.heatmap())
        for row, image in enumerate(shown):
            axes[row][column].imshow(image.permute(1, 2, 0))
        count = int(record.routing.mask[0].sum())
        slots = math.prod(record.grid_size) * record.routing.indices.shape[1]
        axes[0][column].set_title(f"{record.name}\n{count} of {slots} tokens", fontsize=8)

    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _check_picture(images: Tensor, records: Sequence[RoutingRecord], titles: Sequence[str]) -> None:
    """Images, maps of them, and titles belong together."""
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
    """Images (B, 3, H, W), dimmed where ``heat`` (B, h, w) is 0, orange where it is 1."""
    heat = nn.functional.interpolate(heat.unsqueeze(1), size=images.shape[-2:], mode="nearest")
    orange = torch.tensor([1.0, 0.55, 0.1]).view(3, 1, 1)
    return (images * (0.25 + 0.75 * heat) + 0.35 * heat * orange).clamp(0, 1)
