"""Tables and pictures of the rows that ``benchmarks.rivals`` has measured so far."""

import math
import statistics
from pathlib import Path

from benchmarks.needle_report import machine
from colt5_vision.store import save_atomically
from support.measure import table

_ABOUT = """\
Every method in the same attentions of two real networks. Density is the share of the map's keys
that a query attends to exactly. Ours counts its window and its 64 probes. Not counted, for anybody:
pooled keys and what chooses. FLOPs count all of it, over those of full attention.

- error: relative L2 of single attentions, geometric mean over layers. Inputs are those under full
  attention.
- p99: 99th percentile of a query's error over the mean norm, geometric mean over layers.
- kept: share of full attention's softmax on exact keys, mean over layers.
- time: CPU seconds over those of full attention next to it, median over layers. Only rows with a
  star are fast code. The others model what a kernel computes, in loops over tiles.
- whole: all large attentions at once, against the network's output with full attention.
"""


def write(rows: list[dict], stem: Path) -> str:
    """Writes ``stem``.md, and ``stem``.png if there is something to draw; the text."""
    lines = ["# The field and ours in the same attentions\n", f"{machine()}\n", _ABOUT]
    for place in sorted({_place(row) for row in rows}):
        lines += _section(place, [row for row in rows if _place(row) == place])
    text = "\n".join(lines) + "\n"
    save_atomically(stem.with_suffix(".md"), lambda part: part.write_text(text))
    _draw(rows, stem.with_suffix(".png"))
    return text


def _place(row: dict) -> tuple:
    return row["network"], row["size"], row["density"]


def _section(place: tuple, rows: list[dict]) -> list[str]:
    name, size, density = place
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    whole = [row for row in rows if row["layer"] is None]
    column = "cosine" if any("cosine" in row for row in whole) else "psnr"
    head = ["method", "FLOPs", "time", "error", "p99", "kept"]
    for name_of in inputs:
        head += [f"whole, {name_of}: relative", column, "worst draw"]
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells.append([method, *_single(own)])
        for name_of in inputs:
            cells[-1] += _whole([r for r in own if r["input"] == name_of], column)
    cells.sort(key=lambda cell: float(cell[6] or cell[3] or "inf"))
    return [f"\n## {name}, {size} px, {density:.0%} of the keys\n", *table(head, cells)]


def _single(rows: list[dict]) -> list[str]:
    layers = [row for row in rows if row["layer"] is not None]
    if not layers:
        return [""] * 5
    flops = [row["flops"] for row in layers if "flops" in row]
    time = statistics.median(row["seconds"] / row["full_seconds"] for row in layers)
    kept = [row["kept"] for row in layers if "kept" in row]
    return [
        f"{flops[0]:.1%}" if flops else "",
        f"{time:.2f}" + "*" * layers[0]["timed"],
        *(_number(_mean(row[key] for row in layers)) for key in ("error", "p99")),
        f"{statistics.mean(kept):.3f}" if kept else "",
    ]


def _whole(rows: list[dict], column: str) -> list[str]:
    draws = [row for row in rows if row["layer"] is None]
    if not draws:
        return [""] * 3
    mean = statistics.mean(row[column] for row in draws)
    return [
        _number(_mean(row["relative"] for row in draws)),
        f"{mean:.5f}" if column == "cosine" else f"{mean:.1f}",
        _number(max(row["relative"] for row in draws)) if len(draws) > 1 else "",
    ]


def _mean(values) -> float:
    return math.exp(statistics.mean(math.log(max(value, 1e-12)) for value in values))


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


_COSTS = {  # of a method's single attentions
    "FLOPs, % of full attention": lambda rows: [100 * r["flops"] for r in rows if "flops" in r][:1],
    "CPU time, % of full attention": lambda rows: [
        100 * statistics.median(r["seconds"] / r["full_seconds"] for r in rows)
    ],
}
_OURS = ("crimson", "darkorange", "gold")
_THEIRS = tuple("osDv^<>PXhd")  # with 8 colours: 88 looks
_NOTE = (
    "{} of the keys, lower left is better. Hollow: a model of a kernel in plain torch, whose "
    "seconds do not count."
)


def _draw(rows: list[dict], path: Path) -> None:
    """Error of whole networks against FLOPs and against time: a column an input, a point a method
    and density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = [row for row in rows if row["layer"] is None]
    places = dict.fromkeys((row["network"], row["size"], row["input"]) for row in whole)
    places = sorted(places, key=lambda place: place[:2])
    if not places:
        return
    looks = _looks(list(dict.fromkeys(row["method"] for row in rows)))
    size = (1 + 4 * len(places), 10)
    figure, axes = plt.subplots(2, len(places), figsize=size, layout="constrained", squeeze=False)

    # a column an input
    for column, (network, pixels, name) in enumerate(places):
        own = [row for row in rows if (row["network"], row["size"]) == (network, pixels)]
        for axis, (label, cost) in zip(axes[:, column], _COSTS.items(), strict=True):
            if column and places[column - 1][:2] == (network, pixels):
                axis.sharey(axes[0, column - 1])
            for method, look in looks.items():
                of = [row for row in own if row["method"] == method]
                points = _points(of, name, cost)
                hollow = cost is _COSTS["CPU time, % of full attention"] and not _timed(of)
                face = {"markerfacecolor": "none"} if hollow else {}
                axis.plot(*(zip(*points, strict=True) if points else ([], [])), **look | face)
            axis.set(xlabel=label, xscale="log", yscale="log")
            axis.set_xticks(ticks := [10, 20, 50, 100, 200, 500], map(str, ticks))
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"{network}, {pixels} px, {_what(network)} {name}")

    # what is common to all
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the whole network")
    shares = sorted({row["density"] for row in rows if row["layer"] is not None})
    note = _NOTE.format(", ".join(f"{share:.0%}" for share in shares))
    handles = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside lower center", ncols=5, title=note)
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text().startswith("ours") else "normal")
    save_atomically(path, lambda part: figure.savefig(part, dpi=100, format="png"))
    plt.close(figure)


def _what(network: str) -> str:
    return "photograph" if network == "DINOv2" else "noise"


def _timed(rows: list[dict]) -> bool:
    return any(row.get("timed") for row in rows)


def _looks(methods: list[str]) -> dict[str, dict]:
    """Arguments of ``plot`` by method, ours last and above the others."""
    import matplotlib.pyplot as plt

    colours, looks = plt.get_cmap("Dark2"), {}
    rivals = [method for method in methods if not method.startswith("ours")]
    for number, method in enumerate(rivals):
        look = {"color": colours(number % 8), "marker": _THEIRS[number % len(_THEIRS)]}
        looks[method] = look | {"linestyle": "", "label": method, "markersize": 7}
    for number, method in enumerate(sorted(set(methods) - set(rivals))):
        look = {"color": _OURS[number % len(_OURS)], "marker": "*", "markeredgecolor": "black"}
        looks[method] = look | {"linestyle": "", "label": method, "markersize": 16, "zorder": 3}
    return looks


def _points(rows: list[dict], name: str, cost) -> list[tuple[float, float]]:
    """(cost, error of the whole network on one input) of one method, a point a density."""
    points = []
    for density in sorted({row["density"] for row in rows}):
        part = [row for row in rows if row["density"] == density]
        errors = [r["relative"] for r in part if r["layer"] is None and r["input"] == name]
        layers = [row for row in part if row["layer"] is not None]
        costs = cost(layers) if layers else []
        if costs and errors:
            points.append((costs[0], _mean(errors)))
    return points
