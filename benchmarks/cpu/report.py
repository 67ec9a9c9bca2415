"""What was measured, as JSON and as Markdown."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
from pathlib import Path

import torch

from support.measure import table

from .cases import SHARE, SPEED
from .layers import Growth
from .timing import spread

MOST_GROWTH = 1.1  # exponent of time over tokens at a fixed number of routed keys
PREDICTED = 0.25  # of the measured time, what a prediction may be off
HOW = (
    "Medians (quartiles) of rounds in which all variants of a case take turns; a ratio is taken "
    "in every round: "
    "time of the row over that of the column, above 1 the column is faster. MiB: what one call "
    "adds at its peak "
    "to the resident memory of a process of its own, its result included, to half a MiB. –: not "
    "measured, the "
    "note says why. Raw figures are in the JSON file."
)
ABOUT = {
    "gates": (
        "Soft top-k gates of normal scores. Error: largest |sum of gates - k| / k; who has not "
        "converged computes"
        " something else. 20 iterations with the eps scaling of colt5_attention's router (from 4, "
        "x 0.7), 50 "
        "without."
    ),
    "selection": ("The k largest of each row, without gradients."),
    "attention": (
        "The operator alone, window ∪ routed keys against all keys, and the swap, which chooses "
        "its keys; size, heads x width, batch."
    ),
    "layers": (
        "64 channels, 2 heads x 32, batch 1, float32, norm and projections included. The number "
        "of routed keys is"
        " fixed, but for the rows that say keys 1/16. `fusion sum` routes as many queries too, as "
        "CoLT5 does: it "
        "does less than the others. colt5_attention routes inside each window: of every window "
        "its share. ToDo, "
        "tomesd, window and full attention have the norm and the projections of `fusion softmax`."
    ),
}


def machine() -> dict:
    """Hardware and versions."""
    model = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    packages = ("colt5-attention", "tomesd")
    return {
        "cpu": f"{model} ({platform.machine()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system() + " " + platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def growth(case: Growth, record: dict) -> list[dict]:
    """Slope of log time over log tokens, by least squares, of every round; of layers measured at
    three sides."""
    found = []
    for layer, names in case.series().items():
        raw = {side: record["variants"][name].get("raw") for side, name in names.items()}
        raw = {side: values for side, values in raw.items() if values}
        if len(raw) < 3:
            continue
        tokens = [2 * math.log(side) for side in raw]
        slopes = [
            statistics.linear_regression(tokens, [math.log(t) for t in times]).slope
            for times in zip(*raw.values(), strict=False)
        ]
        limit = MOST_GROWTH if raw.keys() == names.keys() and "keys" not in layer else None
        exponent = spread(slopes)
        met = None if limit is None else exponent["median"] <= limit
        found.append(
            {"layer": layer, "sides": list(raw), "exponent": exponent, "limit": limit, "met": met}
        )
    return found


def figures(value: dict, scale: float = 1.0, unit: str = "") -> str:
    """Median and quartiles."""
    middle, low, high = (
        f"{number:.0f}" if number >= 1000 else f"{number:.3g}"
        for number in (scale * value[key] for key in ("median", "q1", "q3"))
    )
    return f"{middle}{unit} ({low}–{high})"


def _group(rows: list[dict]) -> list[str]:
    """Table of a group; a column for each variant of ours: how many times as long the others
    take."""
    speeds = [ratio for row in rows for ratio in row["ratios"] if ratio["kind"] == SPEED]
    ours = list(dict.fromkeys(ratio["ours"] for ratio in speeds))
    entries = [entry for row in rows for entry in row["variants"].values()]
    errors, foretold = (
        any(entry.get(key) is not None for entry in entries) for key in ("error", "predicted")
    )

    # a line for each variant
    lines = []
    for row in rows:
        ratios = {
            (r["ours"], r["other"]): figures(r, unit="x")
            for r in row["ratios"]
            if r["kind"] == SPEED
        }

        for name, entry in row["variants"].items():
            # time and memory
            cells = [
                row["case"],
                row["pass"],
                name,
                figures(entry, 1e3) if "median" in entry else "–",
            ]
            cells.append(
                "–" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:.1f}"
            )

            # what only some groups have
            if foretold:
                cells.insert(4, "–" if not entry.get("predicted") else predicted(entry))
            if errors:
                cells.append("–" if entry.get("error") is None else f"{entry['error']:.1e}")
            cells += [ratios.get((mine, name), "–") for mine in ours]
            lines.append([*cells, (entry["note"] or "").replace("|", "\\|")])

    # with the ratios to ours
    header = [
        "case",
        "pass",
        "variant",
        "ms",
        *(["predicted ms"] if foretold else []),
        "MiB",
        *(["error"] if errors else []),
        *(f"over {n}" for n in ours),
        "note",
    ]
    return table(header, lines)


def predicted(entry: dict) -> str:
    """By the cost model, and what that is of the measured time."""
    share = entry["predicted"] / entry["median"]
    return f"{1e3 * entry['predicted']:.3g} ({share:.0%})"


def foretold(rows: list[dict]) -> str | None:
    """How many rows the cost model predicts well."""
    entries = [entry for row in rows for entry in row["variants"].values()]
    shares = [e["predicted"] / e["median"] for e in entries if e.get("predicted") and "median" in e]
    near = sum(abs(share - 1) <= PREDICTED for share in shares)
    if not shares:
        return None
    return (
        f"The library's cost model predicts {near} of {len(shares)} times within {PREDICTED:.0%} "
        "of what was measured."
    )


def markdown(report: dict) -> str:
    rows = report["rows"]
    lines = [
        "# The library on a CPU",
        "",
        f"`{report['command']}`, {report['seconds']:.0f} s. Not run on a GPU.",
    ]
    if not report["complete"]:
        lines += ["", "**Not complete**: the run was interrupted, or goes on."]
    lines += [
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in report["machine"].items()),
    ]
    lines += ["", HOW]

    # growth
    if report["growth"]:
        verdicts = {True: "met", False: "**not met**", None: ""}
        cells = [
            [
                g["layer"],
                ", ".join(f"{s}²" for s in g["sides"]),
                figures(g["exponent"]),
                f"<= {g['limit']}" if g["limit"] else "",
                verdicts[g["met"]],
            ]
            for g in report["growth"]
        ]
        lines += [
            "",
            "## Growth of time with tokens",
            "",
            "Forward; the slope of log time over log tokens in every round.",
        ]
        lines += ["", *table(["layer", "maps", "exponent", "limit", "verdict"], cells)]

    # routing's share
    shares = [
        [row["case"], row["pass"], ratio["other"], figures(ratio, 100, " %")]
        for row in rows
        for ratio in row["ratios"]
        if ratio["kind"] == SHARE
    ]
    if shares:
        lines += ["", "## Share of a layer's time spent routing", ""]
        lines += ["Routers alone over the whole layer, each timed in the same rounds.", ""]
        lines += table(["case", "pass", "layer", "share"], shares)

    # the groups
    for group, about in ABOUT.items():
        some = [row for row in rows if row["group"] == group]
        if some:
            threads = ", ".join(
                f"{n} thread" + "s" * (n > 1) for n in dict.fromkeys(row["threads"] for row in some)
            )
            lines += [
                "",
                f"## {group.capitalize()}",
                "",
                f"{about} {threads.capitalize()}.",
                "",
                *([text, ""] if (text := foretold(some)) else []),
                *_group(some),
            ]
    return "\n".join(lines) + "\n"


def write(report: dict, stem: Path) -> list[Path]:
    """``stem``.json and ``stem``.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    paths[0].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(markdown(report))
    return paths
