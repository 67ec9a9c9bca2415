"""The Python of the README and of the pages of docs/ runs as printed."""

import json
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
BLOCKS = {
    page: re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) for page in PAGES
}
# each snippet by itself, but in one process: imports take longer than most of them
RUN = """
import json, sys
for code in json.load(sys.stdin):
    exec(code, {"__name__": "__main__"})
"""


@pytest.mark.parametrize("page", PAGES)
def test_snippets(page):
    assert BLOCKS[page]
    if page == "docs/transformers.md":
        pytest.importorskip("transformers.models")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        input=json.dumps(BLOCKS[page]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"
