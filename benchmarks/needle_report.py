"""Tables and figures of the needle study."""

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.needle_model import VARIANTS
from colt5_vision.store import save_atomically
from support.measure import table


def by_variant(records: list[dict], order: Sequence[str]) -> dict[str, list[dict]]:
    """The runs of each variant that has any, by their seeds."""
    groups = {name: [r for r in records if r["variant"] == name] for name in order}
    return {name: sorted(group, key=lambda r: r["seed"]) for name, group in groups.items() if group}


def summarize(groups: dict[str, list[dict]]) -> list[dict]:
    """One entry of each variant, over its seeds; its gain on the first one, in points, over the
    seeds of both."""
    summary, first = [], {r["seed"]: r["accuracy"] for r in next(iter(groups.values()))}
    for name, group in groups.items():
        # accuracies, and what they gain on the first variant
        scores = [r["accuracy"] for r in group]
        gains = [100 * (r["accuracy"] - first[r["seed"]]) for r in group if r["seed"] in first]

        spread = statistics.stdev(scores) if len(scores) > 1 else None
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        routed = group[0]["reach"] is not None

        # beside what they cost
        summary.append(
            {
                "variant": name,
                "keys": group[0]["keys"],
                "mean_keys": group[0]["mean_keys"],
                "mean": statistics.mean(scores),
                "spread": spread,
                "gain": statistics.mean(gains) if gains else None,
                "gain_error": error,
                "seeds": {r["seed"]: r["accuracy"] for r in group},
                "reach": statistics.mean(r["reach"] for r in group) if routed else None,
                "seconds": statistics.median(r["seconds"] for r in group),
                "seconds_per_step_at_last": statistics.median(
                    r["seconds_per_step_at_last"] for r in group
                ),
                "added_mib": statistics.median(r["added_mib"] for r in group),
                "parameters": group[0]["parameters"],
            }
        )
    return summary


def accuracy_table(summary: list[dict], tokens: int) -> list[str]:
    """Lines of the table of a study."""
    first = summary[0]["variant"].split(":")[0]
    header = ["attention", "keys (mean in training)", "accuracy", f"points against {first}"]
    header += ["seeds", "digit's windows reached", "CPU s, training", "CPU s a step at last"]
    header += ["MiB added by the first step", "parameters"]
    rows = [
        [
            s["variant"],
            f"{s['keys']} of {tokens} ({s['mean_keys']:.0f})",
            _with_error(s["mean"], s["spread"], ".3f"),
            "–"
            if s["gain"] is None or s is summary[0]
            else _with_error(s["gain"], s["gain_error"], "+.1f"),
            ", ".join(f"{value:.3f}" for value in s["seeds"].values()),
            "–" if s["reach"] is None else f"{s['reach']:.2f}",
            f"{s['seconds']:.0f}",
            f"{s['seconds_per_step_at_last']:.3f}",
            f"{s['added_mib']:.0f}",
            f"{s['parameters']:,}",
        ]
        for s in summary
    ]
    return table(header, rows)


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def about(runs: list[dict]) -> str:
    """What the numbers of a study are."""
    first, widest = runs[0], max(r["widest"] or 0 for r in runs)
    if first["start"]:
        begin = f"Runs go on with their weights after {first['start']}x{first['start']}. "
    else:
        begin = f"Routed at first: {widest:g} of the map, then narrowing. " if widest else ""
    return (
        f"Canvas {first['canvas']}x{first['canvas']}, {first['steps']} steps, squares on "
        f"{first['held_out']} held-out "
        "canvases; chance is 0.1. Mean ± standard deviation over seeds; points against the first "
        "row over the seeds of "
        "both, ± the standard error of their mean. Digit's windows reached: share of the canvases "
        "in which a routed "
        f"key lies in a window that the digit touches. {begin}CPU seconds and memory of a process "
        f"with one run, {machine()}.\n"
    )


def machine() -> str:
    return f"{platform.machine()}, torch {torch.__version__}"


def report(records: list[dict], stem: Path, settings: Sequence[str]) -> list[str]:
    """``stem``.json, .md and .png; the lines of the table."""
    groups, first = by_variant(records, list(VARIANTS)), records[0]
    summary, runs = summarize(groups), [run for group in groups.values() for run in group]
    shared = {name: first[name] for name in settings if name != "widest"}
    whole = {"machine": machine(), **shared, "summary": summary, "runs": runs}
    save_atomically(
        stem.with_suffix(".json"), lambda part: part.write_text(json.dumps(whole, indent=1) + "\n")
    )
    lines = accuracy_table(summary, first["tokens"])
    title = "# Each square is labelled with the class of the one digit, far away\n"
    text = "\n".join([title, about(runs), *lines, ""])
    save_atomically(stem.with_suffix(".md"), lambda part: part.write_text(text))
    save_atomically(stem.with_suffix(".png"), lambda part: draw(groups, part))
    return lines


def line_of(name: str) -> dict:
    """Label and look of a variant, the same in every figure: its color is the fusion, its dashes
    the router, and it is thin with few keys."""
    variant = VARIANTS[name]
    if variant.router is None:
        label = {"full": "full attention", "window": "windows only"}[name]
        return {"label": label, "color": {"full": "k", "window": "0.6"}[name], "ls": "--"}
    keys = {"eighth": "1/8 of the keys", "few": "few keys"}[variant.keys]
    return {
        "label": f"{variant.kind}, {variant.router}, {keys}",
        "color": {"softmax": "tab:blue", "sum": "tab:orange"}[variant.kind],
        "ls": {"learned": "-", "random": ":", "grid": "-."}[variant.router],
        "lw": {"eighth": 2.0, "few": 1.0}[variant.keys],
    }


def draw(groups: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against steps, a panel each for 1/8 of the keys and for few, full and window in
    both; against seconds."""
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = {"eighth": "1/8 of the keys", "few": "few keys", None: "time"}
    for axis, (keys, title) in zip(axes, titles.items()):
        for name, group in groups.items():
            variant = VARIANTS[name]
            if keys is not None and variant.keys not in (None, keys):
                continue
            curves = torch.tensor([r["curve"] for r in group])
            line = line_of(name)
            along = curves[0, :, 0] if keys else curves[..., 2].mean(0)
            axis.plot(along, curves[..., 1].mean(0), **line)
            if keys:
                low, high = curves[..., 1].amin(0), curves[..., 1].amax(0)
                axis.fill_between(along, low, high, alpha=0.12, color=line["color"])
        axis.set(xlabel="steps" if keys else "CPU seconds", ylim=(0, 1), title=title)
        axis.axhline(0.1, color="0.8", lw=0.8)
    axes[0].set_ylabel("held-out accuracy (band: range over seeds)")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110, format="png")


def draw_scale(folder: Path) -> Path:
    """``needle_scale_cpu.png``: of each canvas studied, accuracy against CPU seconds and against
    memory."""
    # the studies that there are
    studies = [
        path
        for canvas in ("", "_384", "_768")
        if (path := folder / f"needle{canvas}_cpu.json").is_file()
    ]

    # a column for each size of canvas
    figure = Figure(figsize=(5 * len(studies), 8), layout="constrained")
    axes = figure.subplots(2, len(studies), sharey=True, squeeze=False)
    for column, path in zip(axes.T, studies):
        study = json.loads(path.read_text())
        for name, group in by_variant(study["runs"], list(VARIANTS)).items():
            # a curve for its training, a point for each run
            line = line_of(name)
            curve = torch.tensor([r["curve"] for r in group]).mean(0)
            column[0].plot(curve[:, 2], curve[:, 1], **line)
            memory, accuracy = torch.tensor([(r["added_mib"], r["accuracy"]) for r in group]).T
            column[1].scatter(
                memory,
                accuracy,
                label=line["label"],
                color=line["color"],
                alpha=0.5 if line.get("lw") == 1.0 else 1.0,
                marker={"--": "s", ":": "x"}.get(line["ls"], "o"),
            )

        # axes
        column[0].set(
            xlabel="CPU seconds, training",
            title=f"canvas {study['canvas']}, {study['steps']} steps",
        )
        column[1].set(xlabel="MiB added by the first step")
        for axis in column:
            axis.set(ylim=(0, 1), xlim=(0, 1.05 * axis.dataLim.xmax))
            axis.axhline(0.1, color="0.8", lw=0.8)

    # names
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path = folder / "needle_scale_cpu.png"
    save_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    return path
