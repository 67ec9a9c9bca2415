"""Rows of figures in README.md and docs/results.md, made of the committed files in
benchmarks/results.

``python -m tests.support.published`` prints them.
"""

import json
import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def table(name: str, first: str, which: int = 0) -> dict[str, list[str]]:
    """Cells of a table in a results file, by the first cell of each row, its head among them.

    Args:
        first: first cell of the head.
        which: of the tables with that cell.
    """
    found = []
    for part in re.split(r"\n\s*\n", (RESULTS / name).read_text()):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if rows and rows[0][0] == first:
            found.append({row[0]: row[1:] for row in (rows[0], *rows[2:])})
    return found[which]


def record(name: str) -> dict:
    """A JSON file."""
    return json.loads((RESULTS / name).read_text())


def line(*cells: str) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def times(value: float) -> str:
    """A ratio, as 0.608×, 8.85×, 33.6×."""
    return f"{value:.3g}×"


def cosines() -> list[str]:
    """A pretrained ViT: cosine of its features to those of full attention."""
    found = table("swap_cpu.md", "attention")
    sizes = ("518 px", "1526 px")
    columns = [i for i, head in enumerate(found["attention"]) if head.split(", ")[1] in sizes]
    names = {
        "`window`": "window only",
        "`grid`": "grid, weighted",
        "ToDo, keys subsampled": "ToDo (keys subsampled)",
        "ToMe-style, keys merged": "ToMe-style (keys merged)",
        "`sampled`": "sampled",
        "`sampled`, 1/4 of the keys": "sampled, keys 1/4",
    }
    return [line(ours, *(found[name][i] for i in columns)) for ours, name in names.items()]


def held_out() -> tuple[str, str]:
    """The same on four held-out photographs, 1/16 of the keys: mean and worst draw."""
    text = (RESULTS / "training_free_cpu.md").read_text()
    return re.search(r"^\| 1/16 \| sampled \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE).groups()


def errors() -> list[str]:
    """A consistency UNet: relative error of its picture, the mean over noises."""
    found = table("terrain_cpu.md", "attention")
    names = {
        "`window`": "window only",
        "`random`": "random keys, weighted",
        "ToDo, odd rows and columns": "the same, odd rows and columns",
        "`sampled`": "routed, keys 1/16",
        "`sampled`, 1/4 of the keys": "routed, keys 1/4",
    }
    return [
        line(ours, *(cell.split(" ")[0] for cell in found[name])) for ours, name in names.items()
    ]


def whole_networks() -> list[str]:
    """Seconds of a whole network, with full and with routed attention."""
    rows = []
    for image, cells in table("swap_cpu.md", "image").items():
        if image != "image" and not image.startswith("1022"):  # as 1036
            size, tokens = re.match(r"(\d+) px, (\d+) tokens", image).groups()
            full, routed, ratio = cells[3:6]
            rows.append(("DINOv2 ViT-S/14", size, tokens, full, routed, ratio))

    heads = table("terrain_cpu.md", "attention")["attention"]
    seconds = table("terrain_cpu.md", "attention", which=1)
    both = zip(seconds["full attention"], seconds["routed, keys 1/16"], strict=True)
    for head, (full, routed) in zip(heads, both, strict=True):
        size, tokens = re.match(r"(\d+) px, (\d+) tokens", head).groups()
        ratio = re.search(r"\((.*)\)", routed)[1]
        rows.append(("Consistency UNet", size, tokens, full.split()[0], routed.split()[0], ratio))
    return [
        line(name, size, f"{int(tokens):,}", full, routed, ratio.replace("x", "×"))
        for name, size, tokens, full, routed, ratio in rows
    ]


def layer(side: int, what: str, fusion: str, other: str = "full SDPA") -> str:
    """How many times as fast as ``other`` a layer is."""
    case = {"group": "layers", "case": f"{side}x{side}, 1024 keys", "pass": what}
    row = next(row for row in record("cpu.json")["rows"] if case.items() <= row.items())
    pair = {"ours": f"fusion {fusion}", "other": other}
    ratios = [ratio["median"] for ratio in row["ratios"] if pair.items() <= ratio.items()]
    return times(ratios[0]) if ratios else "not tried"


def target(name: str) -> dict:
    """What was measured of one."""
    return next(row for row in record("targets_cpu.json")["rows"] if row["target"] == name)


def memory(variant: str) -> str:
    """What a forward of a layer adds at 128 x 128 tokens."""
    case = {"group": "layers", "case": "128x128, 1024 keys", "pass": "forward"}
    row = next(row for row in record("cpu.json")["rows"] if case.items() <= row.items())
    return f"{row['variants'][variant]['peak_bytes'] / 2**20:.0f} MiB"


# of the tables in rivals_cpu.md, 10 % of the keys: at 1036 and 1526 px, at 256 and 512 px
DINOV2, LARGE_DINOV2, UNET, LARGE_UNET = 1, 2, 4, 5


def rival(network: int, method: str) -> tuple[str, str, str]:
    """FLOPs of a method, and the errors of a whole network on one or two inputs."""
    cells = table("rivals_cpu.md", "method", network)[method]
    return cells[0].replace("%", " %"), *map(plain, cells[5::3])


def plain(cell: str) -> str:
    """A number without an exponent."""
    return f"{float(cell):.5f}" if "e" in cell else cell or "not tried"


def field() -> list[str]:
    """The field and ours, 10 % of the keys: FLOPs, and errors of two whole networks, the last at a
    larger size."""
    names = {
        "`sampled`": "ours, sampled, window 14",
        "`grouped`": "ours, grouped",
        "SVG-EAR": "SVG-EAR, 2x clusters",
        "SVG-EAR, fewer iterations": "SVG-EAR, 2x clusters, 2 iterations",
        "PISA, order 0": "PISA 0",
        "PISA, order 1": "PISA 1",
        "ToDo": "ToDo",
    }
    sizes = ((DINOV2, LARGE_DINOV2), (UNET, LARGE_UNET))
    rows = []
    for ours, name in names.items():
        cells = [(*rival(base, name), rival(large, name)[1]) for base, large in sizes]
        rows.append(line(ours, *cells[0], *cells[1]))
    return rows


def best_rival(network: int, column: int) -> tuple[str, str]:
    """Least error of the methods that take at most a fifth more FLOPs than ours, and whose."""
    ours = float(rival(network, "ours, sampled, window 14")[0].split()[0])
    found = []
    for name in table("rivals_cpu.md", "method", network):
        if name != "method" and not name.startswith("ours"):
            flops, *errors = rival(network, name)
            if errors[column] != "not tried" and float(flops.split()[0]) < 1.2 * ours:
                found.append((float(errors[column]), errors[column], name))
    return min(found)[1:]


def needle() -> list[str]:
    """Accuracy of a task that needs the whole map."""
    names = {
        "full attention": "full",
        "`softmax`, learned": "softmax-learned-eighth",
        "`sum`, learned": "sum-learned-eighth",
        "`sum`, random": "sum-random-eighth",
        "`softmax`, learned, few": "softmax-learned-few",
        "`sum`, learned, few": "sum-learned-few",
        "`softmax`, random, few": "softmax-random-few",
    }
    found = {row["variant"]: row for row in record("needle_cpu.json")["summary"]}
    rows = []
    for ours, name in names.items():
        row = found[name]
        cells = (
            f"{row['keys']}",
            f"{len(row['seeds'])}",
            f"{row['mean']:.3f}",
            f"{row['spread']:.3f}",
        )
        rows.append(line(ours, *cells))
    return rows


def readme() -> list[str]:
    """Rows of the README: what, compared with whom, the figure there, and routed."""
    speed = times(target("DINOv2 ViT-S, whole model, 1526 px")["ratio"])
    ours = [rival(network, "ours, sampled, window 14")[1:] for network in (DINOV2, UNET)]
    theirs, name = best_rival(DINOV2, 1)
    theirs_unet, name_unet = best_rival(UNET, 1)
    assert {name[:4], name_unet[:4]} == {"PISA"}
    found = {row["variant"]: row for row in record("needle_cpu.json")["summary"]}
    full, routed = (f"{found[name]['mean']:.3f}" for name in ("full", "sum-learned-eighth"))
    return [
        line("DINOv2 at 1036 px, features: relative error", "PISA", theirs, ours[0][1]),
        line("UNet at 256 px, picture: relative error", "PISA", theirs_unet, ours[1][1]),
        line("DINOv2 at 1526 px, an image: speed", "full attention", "1×", speed),
        line("A network trained from scratch: accuracy", "full attention", full, routed),
    ]


def claims() -> set[str]:
    """Numbers that stand in sentences, as they are written there."""
    needle_768 = {row["variant"]: row for row in record("needle_768_cpu.json")["summary"]}
    needle_192 = {row["variant"]: row for row in record("needle_cpu.json")["summary"]}
    growth = [f"{row['exponent']['median']:.3g}" for row in record("cpu.json")["growth"]]
    distilled = table("terrain_cpu.md", "attention")["distilled, keys 1/16"]
    found = {*held_out(), *growth, *(memory(name) for name in ("fusion softmax", "full SDPA"))}
    found |= {number for row in field() for number in row.split() if "." in number}
    found |= {cell.split()[0] for cell in distilled}
    found |= {row.strip("| ").split(" | ")[-1] for row in whole_networks()}
    found.add(layer(128, "forward", "softmax", "ToDo, subsampled to as many keys"))
    found |= {
        layer(side, "forward", fusion) for side in (128, 256) for fusion in ("softmax", "sum")
    }
    found |= {f"{row['mean']:.3f}" for row in (*needle_768.values(), *needle_192.values())}
    found |= {f"{row['seconds_per_step_at_last']:.3g}" for row in needle_768.values()}
    found.add(record("cpu.json")["machine"]["torch"].rpartition(".")[0])
    return found


def numbers(prose: str) -> list[str]:
    """What must be among :func:`claims`: decimals, ratios, memory."""
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", prose)
    prose = re.sub(r"version \S+|\b0\.1\.0\b|Python \S+", " ", prose)
    return re.findall(r"[\d,.]*\d×(?!\d)|[\d,]+ MiB|(?<![\d/])\d+\.\d+(?![\d×])", prose)


def results() -> dict[str, list[str]]:
    """Rows of the tables in docs/results.md, by the question."""
    made = (cosines, errors, field, whole_networks, needle)
    return {function.__name__: function() for function in made}


if __name__ == "__main__":
    for question, rows in results().items():
        print(question, *rows, sep="\n", end="\n\n")
    print(*readme(), sep="\n", end="\n\n")
    print(*sorted(claims()))
