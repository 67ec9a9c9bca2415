"""The Python of the README and of the pages of docs/ runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/choosing.md",
    "docs/concepts.md",
    "docs/kernels.md",
    "docs/timm.md",
    "docs/training.md",
    "docs/transformers.md",
)
BLOCKS = [
    (page, code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


def test_there_are_snippets():
    assert {page for page, _ in BLOCKS} == set(PAGES)


@pytest.mark.parametrize(
    ("page", "code"), BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(BLOCKS)]
)
def test_snippet(page, code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"
