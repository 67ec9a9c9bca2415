"""The figures of README.md and docs/results.md are those of benchmarks/results."""

import re

import pytest

from tests.support import published
from tests.support.prose import ROOT

RESULTS = (ROOT / "docs" / "results.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("question", "rows"), published.results().items(), ids=published.results())
def test_tables_of_the_results(question, rows):
    assert "\n".join(rows) in RESULTS


def test_the_table_of_the_readme():
    assert "\n".join(published.readme()) in README


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README.md", "results.md"])
def test_figures_in_sentences(text):
    prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = published.numbers(prose)
    assert found and set(found) <= published.claims()


def test_what_counts_as_a_figure():
    text = "At 0.93 it is 8.85× as fast, 307 MiB (`eps 0.1`), 1/16 of 64×64, [v](x-0.2.md)."
    assert published.numbers(text) == ["0.93", "8.85×", "307 MiB"]


def test_no_table_of_the_results_is_unknown():
    made = [row for rows in published.results().values() for row in rows]
    lines = [line for line in RESULTS.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(lines) if set(line) <= set("|-")]
    others = [line for i, line in enumerate(lines) if i not in heads and i + 1 not in heads]
    assert others == made


def test_the_results_stay_short():
    assert len(RESULTS.splitlines()) <= 80
