"""The tables of docs/diffusers.md are the code's own."""

from pathlib import Path

import pytest

from colt5_vision.pipelines.table import LEFT_MODELS, TABLE

DOCS = Path(__file__).parents[2] / "docs" / "diffusers.md"
PLACES = {
    "map": "none",
    "before": "before the map",
    "behind": "behind the map",
    "site": "on both sides",
}


def served():
    rows = [["class", "frames", "layers", "other tokens"], ["---"] * 4]
    for name, family in TABLE.items():
        where = f"`{name}`" + (f" in {family.inside}" if family.inside else "")
        layers = ", ".join(f"`{pattern}`" for pattern in family.layers)
        places = ", ".join(dict.fromkeys(PLACES[place] for place in family.layers.values()))
        rows.append([where, "video" if family.video else "image", layers, places])
    return rows


def left():
    rows = [["class", "why"], ["---"] * 2]
    return rows + [[f"`{name}`", reason] for name, reason in LEFT_MODELS.items()]


@pytest.mark.parametrize("table", [served, left])
def test_the_documentation_lists_what_the_table_holds(table):
    text = DOCS.read_text()
    start = f"<!-- table: {table.__name__} -->\n"
    found = text[text.index(start) + len(start) :].partition("<!-- end -->")[0]
    assert found == "".join(f"| {' | '.join(row)} |\n" for row in table())
