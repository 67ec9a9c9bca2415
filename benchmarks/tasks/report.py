"""The tables of what ``benchmarks.tasks`` has measured so far."""

from pathlib import Path
from statistics import mean

from benchmarks.needle_report import machine
from colt5_vision.store import save_atomically
from support.measure import table

FULL = "full"
_ABOUT = """\
What two networks are for, with another attention in place of their own. Nothing was trained or
chosen with it. Keys: of the map's, exact ones that a query attends to, window and probes counted.

- segments: accuracy of a linear probe that tells which picture each patch of a mosaic is from.
- matches: patches whose nearest token in another view is within a patch of where it should be.
- near: the same within a tenth of the picture.
- alike: patches with the same answer as with full attention.
- salient: intersection over union with full attention's map.
- clusters: patches in the same of 8 clusters as with full attention.
- PSNR: of the picture after four denoising steps, over the range of full attention's.

Shares in percent, mean over the inputs; in brackets the input that is farthest from full attention,
its difference in points.
"""


def write(rows: list[dict], stem: Path) -> str:
    """Writes ``stem``.md; the text."""
    lines = ["# What the networks are for\n", f"{machine()}\n", _ABOUT]
    for size in sorted({row["size"] for row in rows if row["task"] != "denoise"}):
        lines += _vit([row for row in rows if row["size"] == size and row["task"] != "denoise"])
    for size in sorted({row["size"] for row in rows if row["task"] == "denoise"}):
        lines += _unet([row for row in rows if row["size"] == size and row["task"] == "denoise"])
    text = "\n".join(lines) + "\n"
    save_atomically(stem.with_suffix(".md"), lambda part: part.write_text(text))
    return text


def _vit(rows: list[dict]) -> list[str]:
    head = ["attention", "segments", "segments alike", "matches", "near", "matches alike"]
    head += ["salient", "clusters"]
    names = ("segments", "segments_alike", "matches", "matches_near", "matches_alike")
    names += ("salient", "clusters")
    inputs = {row["input"] for row in rows if row["task"] == "segments"}
    scenes = list(dict.fromkeys(row["input"] for row in rows if row["task"] == "views"))
    about = f"\n## DINOv2 ViT-S/14, {rows[0]['size']} px, {len(inputs)} mosaics; views of "
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells.append([method, *(_cell(rows, name, method) for name in names)])
    return [about + ", ".join(scenes) + "\n", *table(head, cells)]


def _cell(rows: list[dict], name: str, method: str) -> str:
    """The mean, and the difference to full attention that is largest."""
    full, own = (
        {(r["task"], r["input"]): 100 * r[name] for r in rows if name in r and r["method"] == which}
        for which in (FULL, method)
    )
    if not own:
        return ""
    apart = [own[key] - full[key] for key in own if key in full]
    worst = f" ({max(apart, key=abs):+.2f})" if apart and method != FULL else ""
    return f"{mean(own.values()):.2f}{worst}"


def _unet(rows: list[dict]) -> list[str]:
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row["psnr"] for row in rows if row["method"] == method]
        cells.append([method, f"{mean(found):.1f}", f"{min(found):.1f}", len(found)])
    head = ["attention", "PSNR, mean", "PSNR, worst", "noises"]
    return [f"\n## Consistency UNet, {rows[0]['size']} px, four steps\n", *table(head, cells)]
