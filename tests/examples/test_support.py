"""The examples' helpers have one name: two names are two modules of one file, and two of each class
in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "colt5_vision", "docs", "examples", "models", "pipelines", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
# from examples.support import x, from examples import x, import examples.x
BY_FOLDER = re.compile(r"^\s*(from|import)\s+examples\b", re.MULTILINE)


def test_nothing_is_imported_by_its_folder():
    assert len(FILES) > 300
    assert not [path for path in FILES if BY_FOLDER.search(path.read_text())]


def test_helpers_of_tests_and_of_examples_are_apart():
    import support

    assert list(support.__path__) == [str(ROOT / "examples/support")]


CODE = {
    "script": "sys.path.insert(0, 'examples'); import swap_pretrained_vit",
    "benchmark": "import benchmarks.figures, benchmarks.needle, benchmarks.diffusion",
}


@pytest.mark.parametrize("how", CODE)
def test_each_helper_is_one_module(how):
    """However it is started: a helper of the examples is loaded once, as ``support``."""
    for needed in ("timm", "diffusers.models", "skimage"):
        pytest.importorskip(needed)
    told = (
        "found = {n: getattr(m, '__file__', None) or '' for n, m in list(sys.modules.items())}\n"
        "print(*sorted(name for name, file in found.items() if '/examples/' in file))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {CODE[how]}\n{told}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "support.command_line" in names
    assert not [name for name in names if name.startswith("examples")]
