"""What training a classifier leaves behind: tables and pictures."""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.utils.data import Dataset

from colt5_vision.visualize import show_routing

from .measure import table

MANY = 20  # classes: above, the table of what was taken for what is left out
SHOWN = 12  # held-out images in a picture


def write_tables(folder: Path, name: str, classes, history: list[dict], taken: Tensor) -> list[str]:
    """history.json and results.md.

    Args:
        taken: (classes, classes) counts of held-out images, what they are by what they were taken
            for.

    Returns:
        The lines of the table of classes.
    """
    (folder / "history.json").write_text(json.dumps(history, indent=1))
    rows = [
        [h["epoch"], f"{h['loss']:.3f}", f"{h['accuracy']:.3f}", f"{h['seconds']:.0f}"]
        for h in history
    ]
    lines = [f"# {name}", ""]
    lines += table(["epoch", "training loss", "held-out accuracy", "seconds"], rows)
    confusion = []
    if len(classes) <= MANY:
        cells = [[own, *counts] for own, counts in zip(classes, taken.tolist())]
        confusion = table(["is, seen as", *classes], cells)
        lines += ["", "Held-out images: a row for what they are.", "", *confusion]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    return confusion


def draw_curve(path: Path, name: str, classes, history: list[dict]) -> None:
    """Loss and accuracy against epochs."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    epochs = [h["epoch"] for h in history]
    accuracy = [h["accuracy"] for h in history]
    axis.plot(epochs, accuracy, "o-", color="tab:orange", label="held-out accuracy")
    axis.axhline(1 / len(classes), color="0.7", ls=":", label="chance")
    axis.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02), title=name)
    axis.set_xlim(0.5, len(epochs) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    loss_axis = axis.twinx()
    losses = [h["loss"] for h in history]
    loss_axis.plot(epochs, losses, "s--", color="tab:blue", label="training loss")
    loss_axis.set_ylabel("loss")
    loss_axis.set_ylim(0, 1.1 * max(losses))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def draw_pictures(folder: Path, model: nn.Module, held_out: Dataset) -> list[str]:
    """validation.png, errors first, and routing.png if the model has routed layers; their names."""
    model.eval()
    device = next(model.parameters()).device
    samples = [held_out[i] for i in range(min(64, len(held_out)))]
    seen = [model(image[None].to(device)).argmax().item() for image, _ in samples]
    order = sorted(range(len(samples)), key=lambda i: seen[i] == samples[i][1])
    _draw_validation(folder / "validation.png", held_out.classes, samples, seen, order[:SHOWN])

    first = range(min(4, len(samples)))
    titles = [_told(held_out.classes, samples[i][1], seen[i]) for i in first]
    images = torch.stack([samples[i][0] for i in first])
    try:
        show_routing(model, images, folder / "routing.png", titles=titles)
    except ValueError as error:  # no routed layer, or none that is routed at this size
        print(f"no routing.png: {error}")
        return ["validation.png"]
    return ["validation.png", "routing.png"]


def _told(classes, label: int, guess: int) -> str:
    if label == guess:
        return str(classes[label])
    return f"is {classes[label]}, seen as {classes[guess]}"


def _draw_validation(path: Path, classes, samples, seen, chosen) -> None:
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, i in zip(axes, chosen):
        image, label = samples[i]
        image = image - image.min()
        image = (image / image.max().clamp_min(1e-12)).expand(3, -1, -1).permute(1, 2, 0)
        axis.imshow(image)
        right = label == seen[i]
        axis.set_title(_told(classes, label, seen[i]), fontsize=8, color="k" if right else "r")
    figure.savefig(path, dpi=110)
