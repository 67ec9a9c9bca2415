"""docs/training.md lists the backbones that there are, and what its pages say of gates holds."""

from tests.support.backbones import table
from tests.support.prose import ROOT

PAGE = (ROOT / "docs" / "training.md").read_text()


def test_the_table_of_backbones():
    """Printed by ``python -m tests.support.backbones``."""
    assert table() in PAGE


def test_the_accuracy_of_the_demo():
    last = (ROOT / "benchmarks" / "results" / "digits_cpu.md").read_text().splitlines()[-1]
    assert f"[{last.split(' | ')[2]}](../benchmarks/results/digits_cpu.md)" in PAGE
