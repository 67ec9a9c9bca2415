"""Tables and a picture of what ``benchmarks.training_free`` has measured so far."""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from support.measure import table


class Record:
    """Measured values by what they are of, saved after every one of them."""

    def __init__(self, path: Path, resume: bool):
        self.path = path
        found = (
            json.loads(path.read_text()) if resume and path.exists() else {"rows": {}, "notes": {}}
        )
        self.rows: dict[str, float] = found["rows"]
        self.notes: dict = found["notes"]

    def measure(self, call: Callable[[], float], *of) -> None:
        key = " | ".join(map(str, of))
        if key not in self.rows:
            self.rows[key] = call()
            self.save()

    def has(self, *of) -> bool:
        return " | ".join(map(str, of)) in self.rows

    def save(self) -> None:
        self.path.write_text(json.dumps({"notes": self.notes, "rows": self.rows}, indent=1) + "\n")

    def where(self, *start) -> Iterator[tuple[list[str], float]]:
        prefix = [str(part) for part in start]
        for key, value in self.rows.items():
            parts = key.split(" | ")
            if parts[: len(prefix)] == prefix:
                yield parts[len(prefix) :], value


def _shares(rows: list[tuple[list[str], float]], at: int) -> list[str]:
    """As written, most keys first."""
    return sorted({of[at] for of, _ in rows}, key=lambda share: float(share.removeprefix("1/")))


def _vit(record) -> list[str]:
    rows = list(record.where("vit"))  # photo, size, variant, share, draw
    lines = []
    for size in sorted({of[1] for of, _ in rows}, key=int):
        found = defaultdict(lambda: defaultdict(dict))
        for (photo, at, name, share, draw), value in rows:
            if at == size:
                found[name, share][photo][draw] = value

        # the head of a size
        shares = _shares([row for row in rows if row[0][1] == size], 3)
        photos = list(dict.fromkeys(of[0] for of, _ in rows if of[1] == size))
        lines += ["", f"## Whole ViT, {size} px, held-out photographs", ""]
        lines += [
            (
                "Mean cosine of the final patch tokens to full attention, all 12 layers routed. A "
                "photograph's number is the"
            ),
            (
                "mean over draws (the fixed sample and seeds); worst is the lowest of all "
                "photographs "
                "and draws. Compare what"
            ),
            "has one draw with others by the fixed one: a single draw is noise.",
            "",
        ]

        # its table
        cells = []
        for share in shares:
            for name in dict.fromkeys(of[2] for of, _ in rows):
                each = found.get((name, share))
                if each:
                    worst = min(min(draws.values()) for draws in each.values())
                    means = {
                        photo: statistics.mean(draws.values()) for photo, draws in each.items()
                    }
                    fixed = [draws["0"] for draws in each.values() if "0" in draws]
                    per = [f"{means[photo]:.4f}" if photo in means else "" for photo in photos]
                    both = [f"{statistics.mean(some):.4f}" for some in (means.values(), fixed)]
                    draws = max(len(values) for values in each.values())
                    cells.append([share, name, both[0], f"{worst:.4f}", draws, both[1], *per])
        lines += table(["keys", "variant", "mean", "worst", "draws", "fixed draw", *photos], cells)
    return lines


def _layers(record, before: str) -> list[str]:
    # errors by variant and share, of every photograph and layer
    found = defaultdict(lambda: defaultdict(list))
    photos, sizes = set(), set()
    for (photo, size, layer, name, share), value in record.where("layers"):
        found[name, share][size, layer].append(value)
        photos.add(photo), sizes.add(size)
    if not found:
        return []

    # rows and columns
    shares = sorted(
        {share for _, share in found}, key=lambda share: float(share.removeprefix("1/"))
    )
    names = list(dict.fromkeys(name for name, _ in found))

    # the head
    lines = [
        "",
        f"## Single attentions of the ViT, training photographs ({', '.join(sorted(photos))})",
        "",
    ]
    lines += [
        (
            f"{', '.join(sorted(sizes))} px; inputs are those under full attention, the sample the "
            "fixed one, layers every third."
        ),
        (
            "Relative error of what an attention adds to the residual stream, root mean square "
            "over "
            "layers, and its square over"
        ),
        f"that of the {before} (geometric mean over layers).",
        "",
    ]

    # the table
    cells = []
    for name in names:
        row = [name]
        for share in shares:
            mean = {at: statistics.mean(values) for at, values in found[name, share].items()}
            base = {
                at: statistics.mean(values) for at, values in found.get((before, share), {}).items()
            }
            both = [at for at in mean if mean[at] > 0 and base.get(at, 0) > 0]
            ratio = (
                math.exp(statistics.mean(math.log(mean[at] / base[at]) for at in both))
                if both
                else math.nan
            )
            row += [f"{math.sqrt(statistics.mean(mean.values())):.4f}", f"{ratio:.2f}"]
        cells.append(row)
    head = [part for share in shares for part in (f"error, keys {share}", "squared, ratio")]
    return lines + table(["variant", *head], cells)


def _unet(record) -> list[str]:
    found = defaultdict(list)
    for (_, size, name, share, _), value in record.where("unet"):
        found[name, size, share].append(value)
    if not found:
        return []
    columns = sorted(
        {(int(size), float(share.removeprefix("1/")), share) for _, size, share in found}
    )
    lines = ["", "## Whole UNet, sigma 80", ""]
    lines += [
        (
            "Relative root mean square error of the output to full attention, mean (largest) over "
            "noises and draws."
        ),
        "",
    ]
    cells = []
    for name in dict.fromkeys(name for name, *_ in found):
        each = [found.get((name, str(size), share)) for size, _, share in columns]
        cells.append(
            [name, *(f"{statistics.mean(x):.4f} ({max(x):.4f})" if x else "" for x in each)]
        )
    return lines + table(
        ["variant", *(f"{size} px, keys {share}" for size, _, share in columns)], cells
    )


def _times(record, before: str) -> list[str]:
    lines = []
    for size in sorted({of[0] for of, _ in record.where("time")}, key=int):
        # a table a size
        seconds = {of[1]: value for of, value in record.where("time", size) for of in [[size, *of]]}
        lines += ["", f"## Time of one attention, {size} px", ""]
        lines += [
            (
                "Median milliseconds at the most keys, routing included, all in turns on a busy "
                "machine (the pooled variants attend"
            ),
            (
                "in a loop over windows, not in the library's operator: their attention is no "
                "measure)."
            ),
            "",
        ]

        # a variant a row, its routing beside it
        cells = []
        for name, value in seconds.items():
            if not name.endswith(": routing"):
                routing = seconds.get(f"{name}: routing")
                part = "" if routing is None else f"{routing * 1e3:.1f}"
                against = f"{value / seconds[before]:.2f}" if before in seconds else ""
                cells.append([name, f"{value * 1e3:.1f}", against, part])
        lines += table(
            ["variant", "attention, ms", f"over the {before}'s", "of it routing, ms"], cells
        )
    return lines


def _picture(record, path: Path, before: str, default: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    # at the largest size
    rows = list(record.where("vit"))
    size = max((of[1] for of, _ in rows), key=int)
    found = defaultdict(lambda: defaultdict(list))
    for (_, at, name, share, _), value in rows:
        if at == size:
            found[name][1 / float(share.removeprefix("1/"))].append(1 - value)

    # a line a variant
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, points), marker in zip(found.items(), itertools.cycle("osDv^<>PXhd")):
        shares = sorted(points)
        means = [statistics.mean(points[share]) for share in shares]
        width = 3 if name in (before, default) else 1
        axis.plot(shares, means, marker=marker, label=name, linewidth=width)

    # what the axes say
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="keys beyond the window, of all tokens",
        ylabel="1 - cosine to full attention (lower is better)",
    )
    ticks = sorted({share for points in found.values() for share in points})
    axis.set_xticks(ticks, [f"1/{1 / share:g}" for share in ticks], minor=False)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_title(
        f"DINOv2 ViT-S/14, {size} px, mean over held-out photographs and draws", fontsize=10
    )
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_report(record, output: Path, before: str, default: str) -> str:
    """Write training_free_cpu.md and .png; returns the text."""
    names = {of[3] for of, _ in record.where("layers")} | {of[2] for of, _ in record.where("vit")}

    # what the variants are
    lines = ["# Routing without training", "", record.notes["machine"], ""]
    lines += [
        (
            f"{len(names)} variants. The keys of a variant are all that a query sees beyond its "
            "window and the prefix tokens: routed"
        ),
        (
            f'and pooled ones together. "{before}" is what the library did before this table, '
            f'"{default}" what it does now.'
        ),
    ]

    # tables
    lines += _vit(record) + _unet(record) + _layers(record, before) + _times(record, before)
    for kind, factors in record.notes.get("budgets", {}).items():
        if factors:
            parts = ", ".join(f"{value:.2f}" for value in factors.values())
            lines += [
                "",
                f"Budgets by {kind}, layer by layer, from the training photographs: {parts}.",
            ]

    # for reading, and a picture
    text = "\n".join(lines) + "\n"
    (output / "training_free_cpu.md").write_text(text)
    if any(record.where("vit")):
        _picture(record, output / "training_free_cpu.png", before, default)
    return text
