"""The tables of docs/timm.md and docs/transformers.md, from the adapters' own.

python -m tests.support.adapter_tables    # writes them
"""

import re
from pathlib import Path

from colt5_vision.models import timm_adapter, transformers_adapter

DOCS = Path(__file__).parents[2] / "docs"


def rows(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def timm_served() -> str:
    lines = []
    for kind, family in timm_adapter.FAMILIES.items():
        name = f"`{kind.__module__.removeprefix('timm.')}.{kind.__name__}`"
        map_from = "its own input" if family.reads_map else "the patch embedding"
        lines.append((family.models, name, map_from))
    return rows(("models", "attention", "the map is told by"), lines)


def timm_left() -> str:
    lines = [(f"`{name}`", reason) for name, reason in timm_adapter.LEFT.items()]
    return rows(("attention", "why it stays exact"), lines)


def transformers_served() -> str:
    lines = []
    for name, tower in transformers_adapter.TOWERS.items():
        around = ", ".join(f"`{part}`" for part in tower.before) or "none"
        if tower.behind:
            around += "; behind: " + ", ".join(f"`{part}`" for part in tower.behind)
        lines.append((tower.models, f"`{name}`", f"`{tower.attention}`", around))
    return rows(("models", "embeddings", "attention", "tokens beside the map"), lines)


def transformers_maps() -> str:
    lines = [(one.models, f"`{name}`") for name, one in transformers_adapter.MAPS.items()]
    return rows(("models", "attention"), lines)


TABLES = {
    ("timm.md", "served"): timm_served,
    ("timm.md", "left"): timm_left,
    ("transformers.md", "served"): transformers_served,
    ("transformers.md", "maps"): transformers_maps,
}


def between(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)


def main() -> None:
    for (page, name), make in TABLES.items():
        path = DOCS / page
        text = between(name).sub(lambda found: found[1] + make() + found[2], path.read_text())  # noqa: B023
        path.write_text(text)


if __name__ == "__main__":
    main()
