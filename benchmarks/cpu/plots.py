"""Pictures of what was measured, from the records alone."""

from pathlib import Path

from benchmarks.gpu.measure import PASSES


def _curves(axis, rows: list[dict], what: str, value, label: str) -> None:
    """A line for each variant of the layers over the tokens of the map."""
    rows = [row for row in rows if row["group"] == "layers" and row["pass"] == what]
    names = list(dict.fromkeys(name for row in rows for name in row["variants"]))
    colors: dict[str, str] = {}

    # a line for each layer
    for name in names:
        points = []
        for row in rows:
            found = value(row["variants"][name])
            if found:
                points.append((int(row["case"].split("x")[0]) ** 2, found))

        # a layer of ours, the same with another number of keys, and its routing have one color
        color = colors.setdefault(
            name.removeprefix("routing of ").removesuffix(", keys 1/16"), f"C{len(colors)}"
        )
        width = 2.2 if "fusion" in name else 1.2
        style = "--" if "1/16" in name else ":" if "routing" in name else "-"
        if points:
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color=color,
                lw=width,
                ls=style,
                label=name,
            )

    # axes
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of the map",
        ylabel=label,
        title=f"layer, {what}: {label}",
    )
    axis.grid(alpha=0.3)


def _bars(axis, rows: list[dict], what: str) -> None:
    row = next((row for row in rows if row["group"] == "gates" and row["pass"] == what), None)
    if row is None:
        return
    found = {name: entry for name, entry in row["variants"].items() if "median" in entry}
    values = [1e3 * entry["median"] for entry in found.values()]
    below = [1e3 * (entry["median"] - entry["q1"]) for entry in found.values()]
    above = [1e3 * (entry["q3"] - entry["median"]) for entry in found.values()]
    colors = [
        "C1" if "colt5" in name else "C0" if name.startswith(("soft", "coord")) else "C7"
        for name in found
    ]
    axis.barh(list(found), values, xerr=[below, above], color=colors)
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=f"gates, {row['case']}, {what}")


def plot(rows: list[dict], path: Path) -> None:
    """Layers over map sizes: time of both passes, memory of training; gates: time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    for axis, what in zip(axes[0], PASSES, strict=True):
        _curves(axis, rows, what, lambda entry: entry.get("median"), "seconds")
    _curves(
        axes[1, 0], rows, PASSES[1], lambda entry: (entry["peak_bytes"] or 0) / 2**20, "MiB added"
    )
    _bars(axes[1, 1], rows, PASSES[1])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
