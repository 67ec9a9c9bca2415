"""See where the heavy branch looked: record the routing of a forward, draw the routed tokens over the image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .router import CoordinateDescentRouter, Routing


class RoutingRecord(NamedTuple):
    """One call of one router.

    Attributes:
        name: qualified name of the router in the model.
        routing: its detached :class:`Routing`, on the CPU.
        grid_size: (H, W) of the map, or None for a sequence.
    """

    name: str
    routing: Routing
    grid_size: tuple[int, int] | None

    def heatmap(self) -> Tensor:
        """(B, H, W) share of the routes that took each token, in [0, 1]; needs a map."""
        if self.grid_size is None:
            raise ValueError(f"heatmap: {self.name} routed a sequence, expected a map")
        indices, taken = self.routing.indices, self.routing.mask.float()
        height, width = self.grid_size
        votes = torch.zeros(*indices.shape[:2], height * width).scatter_add(-1, indices, taken)
        return votes.mean(1).unflatten(-1, (height, width))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingRecord]]:
    """Record every router call inside the ``with`` block, in call order.

    Args:
        model: any module that holds :class:`CoordinateDescentRouter` modules (a compiled one records while uncompiled).

    Yields:
        A list that fills up as the model runs.

    Raises:
        ValueError: if the model holds no router.
    """
    routers = {name: m for name, m in model.named_modules() if isinstance(m, CoordinateDescentRouter)}
    if not routers:
        raise ValueError("model: expected a model with routed attention, found no CoordinateDescentRouter in it")
    records: list[RoutingRecord] = []

    def hook(name: str):
        def record(module, args, kwargs, output):
            grid = kwargs.get("grid_size")
            routing = Routing(*(field.detach().cpu() for field in output))
            records.append(RoutingRecord(name, routing, None if grid is None else tuple(grid)))

        return record

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in routers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def plot_routing(
    images: Tensor, records: Sequence[RoutingRecord], path: str | Path | None = None, *, titles: Sequence[str] = ()
):
    """Draw a row per image: the image, then for each record the image with everything dimmed but the routed tokens.

    Args:
        images: (B, 1 or 3, H, W); stretched to [0, 1] image by image.
        records: of :func:`record_routing` for the same batch.
        path: where to save the picture; None: only return it.
        titles: one for each image.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing (extra ``viz``).
        ValueError: on shapes that do not fit.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_routing needs matplotlib: pip install 'colt5-vision[viz]'") from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected (B, 1 or 3, H, W), got {tuple(images.shape)}")
    heatmaps = [record.heatmap() for record in records]
    for record, heat in zip(records, heatmaps):
        if heat.shape[0] != images.shape[0]:
            raise ValueError(f"records: expected {images.shape[0]} samples, {record.name} has {heat.shape[0]}")
    if titles and len(titles) != len(images):
        raise ValueError(f"titles: expected {len(images)}, got {len(titles)}")

    images = images.detach().float().cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp_min(1e-12)).expand(-1, 3, -1, -1)
    rows, columns = len(images), 1 + len(records)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    highlight = torch.tensor([1.0, 0.55, 0.1]).view(3, 1, 1)
    for row, image in enumerate(images):
        axes[row][0].imshow(image.permute(1, 2, 0))
        axes[row][0].set_title(titles[row] if titles else "input", fontsize=8)
        for column, (record, heat) in enumerate(zip(records, heatmaps), start=1):
            heat = torch.nn.functional.interpolate(heat[row][None, None], size=image.shape[-2:], mode="nearest")[0]
            shown = image * (0.25 + 0.75 * heat) + 0.35 * heat * highlight
            axes[row][column].imshow(shown.clamp(0, 1).permute(1, 2, 0))
            count = int(record.routing.mask[row].sum())
            if row == 0:
                axes[row][column].set_title(f"{record.name}\n{count} of {_slots(record)} tokens", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _slots(record: RoutingRecord) -> int:
    """Tokens of the map, over all routes."""
    return record.grid_size[0] * record.grid_size[1] * record.routing.indices.shape[1]
