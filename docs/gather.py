"""Gather what ``mkdocs`` builds: pages in build/pages, sources of the API reference in build/src.

The pages lie there as in the repository, so that their links lead where they lead on a host of
repositories. The sources lie there as they are installed, with ``models/`` and ``pipelines/``
inside of the package, and without what mkdocstrings reads otherwise: roles of reStructuredText, and
sources of several lines, which it takes for a box with a title.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
PAGES = ("*.md", "*.png", "*.css", "*.py", "*.json", "LICENSE", "CITATION.cff")
FOLDERS = ("docs", "benchmarks", "colt5_vision", "examples")
SOURCE = re.compile(r"^( *)(Source: .*)((?:\n\1 {4}\S.*)+)", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?(?:[\w.]+\.)?([^`.]+)`")


def pages() -> None:
    """All pages and pictures, and the files that they link to."""
    target = BUILD / "pages"
    shutil.rmtree(target, ignore_errors=True)
    found = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    found += [p for folder in FOLDERS for kind in PAGES for p in (ROOT / folder).rglob(kind)]
    for path in found:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def sources() -> None:
    """The package as it is installed."""
    target = BUILD / "src" / "colt5_vision"
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(ROOT / "colt5_vision", target)
    for room in ("models", "pipelines"):
        shutil.copytree(ROOT / room, target / room)
    for path in target.rglob("*.py"):
        text = ROLE.sub(r"`\1`", path.read_text())
        path.write_text(SOURCE.sub(_flush, text))


def _flush(source: re.Match) -> str:
    """A source whose further lines are not indented."""
    indent, first, further = source.groups()
    return indent + first + further.replace("\n    ", "\n")


if __name__ == "__main__":
    pages()
    sources()
