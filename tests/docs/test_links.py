"""Links between the pages of this project lead somewhere."""

import re

import pytest

from tests.support.prose import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def anchors(text):
    """What GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"(?s:```.*?```)", "", text), re.MULTILINE)
    heads = (re.sub(r"[^\w\- ]", "", head.strip().lower()) for head in heads)
    return {head.replace(" ", "-") for head in heads}


def links(text):
    text = re.sub(r"(?s:```.*?```)|`[^`\n]*`", "", text)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page(page):
    path = ROOT / page
    for link in links(path.read_text()):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_what_a_link_is():
    assert links("[a](b.md#c) `[x](y)` ![p](q.png) [w](https://e.org)") == ["b.md#c", "q.png"]
    assert anchors("# The schedule\n## A `b`, c?\n") == {"the-schedule", "a-b-c"}
