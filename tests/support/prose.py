"""Words a sentence in the pages of this project: ``python -m tests.support.prose [PAGE ...]``.

Prints a line a page, and the sentences that are too long. Ends with 1 if a page is over its limits.
Code, tables, headings, pictures and HTML comments are not counted. A word of code or the text of a
link is one or more words as it is read.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Limits(NamedTuple):
    """What a page may have: words in all, words a sentence in the mean and at most, semicolons a
    sentence at most. None: any number."""

    mean: float
    longest: int
    words: int | None = None
    semicolons: int = 0


PAGE = Limits(mean=15, longest=20)
LIMITS = {
    "README.md": Limits(mean=15, longest=20, words=700),
    "CHANGELOG.md": PAGE,
    "CONTRIBUTING.md": PAGE,
    "benchmarks/README.md": PAGE,
    "benchmarks/results/README.md": PAGE,
    "docs/notes/README.md": PAGE,
}
LIMITS |= {
    str(path.relative_to(ROOT)): PAGE
    for folder in ("docs", "docs/api")
    for path in sorted((ROOT / folder).glob("*.md"))
}
"""Pages that are held to limits. The notes in docs/notes are kept as they were written."""

_NOT_PROSE = (
    r"(?s:<!--.*?-->)",
    r"(?s:```.*?```)",
    r"^( {4}|\t).*$",  # a figure made of text
    r"^ *\|.*$",  # a table
    r"^#.*$",
    r"^:::.*$",  # a name that mkdocstrings describes
    r"!\[[^\]]*\]\([^)]*\)",
)
_BULLET = re.compile(r"^\s*([-*+]|\d+\.|>)\s+", re.MULTILINE)
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`\[])")


def sentences(text: str) -> list[str]:
    """The sentences of a page in Markdown. An item of a list is one at least."""
    for pattern in _NOT_PROSE:
        text = re.sub(pattern, "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^>\s?", "", text, flags=re.MULTILINE)
    text = _BULLET.sub("\n\n", text)
    # a dot inside of code ends nothing
    text = re.sub(r"`[^`]*`", lambda code: re.sub(r"[.!?:;|]", "·", code[0]), text)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    found = [one for part in paragraphs for one in _END.split(part)]
    return [one for one in found if words(one)]


def words(sentence: str) -> int:
    """Things between spaces that have a letter or a digit."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def page_words(text: str) -> int:
    """Words of a whole page as a reader sees it: tables and headings too, without code blocks."""
    text = re.sub(r"```.*?```|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    return words(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text))


def faults(text: str, limits: Limits) -> list[str]:
    """What is over the limits in a page, in words."""
    found = sentences(text)
    counts = [words(one) for one in found]
    mean, all_words = sum(counts) / max(len(counts), 1), page_words(text)
    out = []
    if limits.words is not None and all_words > limits.words:
        out.append(f"{all_words} words, at most {limits.words}")
    if mean > limits.mean:
        out.append(f"{mean:.1f} words a sentence, at most {limits.mean}")
    for one, count in zip(found, counts, strict=True):
        if count > limits.longest:
            out.append(f"{count} words in a sentence, at most {limits.longest}: {one}")
        if one.count(";") > limits.semicolons:
            out.append(f"{one.count(';')} semicolons, at most {limits.semicolons}: {one}")
    return out


def main(pages: list[str]) -> int:
    """Print the counts of ``pages``, or of all that have limits."""
    bad = 0
    print(f"{'page':30} {'words':>6} {'sentences':>10} {'mean':>6} {'longest':>8}")
    for page in pages or LIMITS:
        text = (ROOT / page).read_text()
        counts = [words(one) for one in sentences(text)] or [0]
        mean = sum(counts) / len(counts)
        print(f"{page:30} {page_words(text):6} {len(counts):10} {mean:6.1f} {max(counts):8}")
        wrong = faults(text, LIMITS.get(page, PAGE))
        bad += bool(wrong)
        for line in wrong:
            print(f"    {line}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
