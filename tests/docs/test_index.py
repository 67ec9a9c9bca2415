"""The index of benchmarks/results names every file, and the pages link to every page."""

import contextlib
import importlib.util
import re

import pytest

from tests.docs.test_links import PAGES, links
from tests.support.prose import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_every_results_file_is_in_the_index():
    named = set()
    for row in (RESULTS / "README.md").read_text().splitlines():
        files = re.split(r"(?<!\\)\|", row)[1] if row.startswith("|") else ""
        found = re.findall(r"\[(\w+)(\.\w+)\]|`(\w*)(\.\w+)`", files)
        stem = ""
        for linked, linked_kind, bare, bare_kind in found:
            stem = linked or bare or stem
            named.add(stem + (linked_kind or bare_kind))
    there = {path.name for path in RESULTS.iterdir()} - {"README.md"}
    assert named == there


def test_every_page_is_linked_from_another():
    linked = {"README.md"}
    for page in PAGES:
        folder = (ROOT / page).parent
        for link in links((ROOT / page).read_text()):
            target = (folder / link.partition("#")[0]).resolve()
            if target != (ROOT / page).resolve():
                linked.add(str(target.relative_to(ROOT)))
    assert set(PAGES) <= linked


@pytest.mark.parametrize("name", ["", ".compat", ".models", ".ops", ".pipelines", ".visualize"])
def test_every_public_name_is_in_the_reference(name):
    if name == ".pipelines":
        pytest.importorskip("diffusers.models")
    module = importlib.import_module(f"colt5_vision{name}")
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entry = rf"^::: {re.escape(module.__name__)}\.(?:(\w+)\.)?(\w+)$"
    found = re.findall(entry, pages, re.MULTILINE)
    # in a file or folder with the name of one: ops.join.join
    listed = {name for folder, name in found if folder in ("", *module.__all__)}
    assert listed == set(module.__all__)


def test_no_entry_of_the_reference_is_a_module():
    """Of ``ops.join``, a function and a folder, mkdocstrings would show the folder."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^::: (.+)$", pages, re.MULTILINE)
    for entry in entries:
        with contextlib.suppress(ImportError):  # the parent may be no module, or not there
            assert importlib.util.find_spec(entry) is None, f"{entry} is a module"
