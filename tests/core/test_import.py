"""What an import needs, and what it brings along."""

import ast
import configparser
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import colt5_vision
from colt5_vision import ops, visualize

ROOT = Path(__file__).parents[2]
BLOCKED = ("timm", "diffusers", "torchvision", "triton")

# None in sys.modules: an import raises ModuleNotFoundError, and find_spec, by which torch looks for
# triton, finds nothing
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"

USE = """
import torch, colt5_vision
module = colt5_vision.ConditionalRoutedTransformerBlock(
    8, num_heavy_attn_tokens_q=4, num_heavy_attn_tokens_kv=4, num_heavy_ff_tokens=4,
    light_window_size=3,
)
module(torch.randn(2, 8, 5, 6)).sum().backward()
print("done")
"""


def python(code, cwd):
    """Run in a fresh interpreter, from another folder."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_core_needs_torch_and_einops_only(tmp_path):
    done = python(BLOCK + USE, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize(
    ("room", "needs", "use"),
    [
        ("models", "timm", "from colt5_vision.models import Colt5VisionTransformer"),
        ("pipelines", "diffusers", "import colt5_vision.pipelines"),
    ],
)
def test_a_room_without_its_library_says_what_to_install(room, needs, use, tmp_path):
    done = python(BLOCK + use, tmp_path)
    assert done.returncode != 0
    (floor,) = set(re.findall(rf"{needs}>=\S+", (ROOT / "setup.cfg").read_text()))
    assert f"colt5_vision.{room} needs {needs}: pip install '{floor}'" in done.stderr


def test_the_core_never_imports_an_adapter_library():
    files = [
        path
        for path in Path(colt5_vision.__file__).parent.rglob("*.py")
        if path.relative_to(Path(colt5_vision.__file__).parent).parts[0]
        not in ("models", "pipelines")
    ]
    assert len(files) > 10
    pattern = re.compile(
        r"^\s*(?:import|from)\s+(timm|diffusers|torchvision|transformers|colt5_attention)\b",
        re.MULTILINE,
    )
    assert not {str(path): found for path in files if (found := pattern.findall(path.read_text()))}


@pytest.mark.parametrize("name", ["amp.is_autocast_available", "compiler.is_exporting"])
def test_what_torch_2_11_cannot_trace_is_asked_in_one_place(name):
    """There the first ends a compilation, and the second is true in every graph."""
    rooms = (Path(colt5_vision.__file__).parent, ROOT / "models", ROOT / "pipelines")
    calling = {
        path.name
        for room in rooms
        for path in room.rglob("*.py")
        if f"torch.{name}" in path.read_text()
    }
    assert calling == {"_torch_internals.py"}


@pytest.mark.parametrize("name", ["models", "pipelines"])
def test_no_generic_package_reaches_the_path(name, tmp_path):
    done = python(f"import {name}", tmp_path)
    assert done.returncode != 0 and f"No module named '{name}'" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_models_is_a_room_of_the_package_and_registers_with_timm(tmp_path):
    code = "import timm, colt5_vision.models; print(*timm.list_models('colt5_*'), sep='\\n')"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(), "no colt5_* model is registered"


def test_public_names():
    assert set(colt5_vision.__all__) <= set(dir(colt5_vision))
    assert colt5_vision.__version__ == importlib.metadata.version("colt5-vision")
    assert all(getattr(colt5_vision, name).__doc__ for name in colt5_vision.__all__)


@pytest.mark.parametrize("module", [colt5_vision, ops, visualize], ids=lambda m: m.__name__)
def test_every_public_parameter_has_a_type(module):
    """What ``py.typed`` promises."""
    bare = []
    for name in module.__all__:
        one = getattr(module, name)
        members = vars(one).items() if inspect.isclass(one) else [(name, one)]
        for member, function in members:
            if not inspect.isfunction(function) or (
                member.startswith("_") and member != "__init__"
            ):
                continue
            parameters = inspect.signature(function).parameters.values()
            bare += [
                f"{name}.{member}: {p.name}"
                for p in parameters
                if p.annotation is p.empty and p.name != "self" and p.kind is not p.VAR_KEYWORD
            ]
    assert not bare


def test_setup_lists_every_package_and_one_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    rooms = {"colt5_vision": ROOT / "colt5_vision"}
    rooms |= {f"colt5_vision.{room}": ROOT / room for room in ("models", "pipelines")}
    found = {
        ".".join([name, *path.parent.relative_to(room).parts])
        for name, room in rooms.items()
        for path in room.rglob("__init__.py")
    }
    assert listed == found
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {colt5_vision.__version__}\n" in citation


def test_implementations_of_operators_do_not_import_one_another():
    """Nor does an operator import from another's folder: what both need is a file beside them."""
    folder = ROOT / "colt5_vision" / "ops"
    operators = {path.parent.name for path in folder.glob("*/api.py")}
    kinds = ("reference", "eager", "gathered", "triton")
    faults = []
    for path in (path for name in operators for path in (folder / name).glob("*.py")):
        own = [kind for kind in kinds if path.stem.startswith(kind)]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            names = {alias.name for alias in node.names}
            reached = {node.module.split(".")[0]} if node.module else names
            others = reached & operators if node.level == 2 else set()
            if node.level == 1 and own:
                others = {x for x in reached if x.startswith(kinds) and not x.startswith(own[0])}
            faults += [f"{path.parent.name}/{path.name} imports {other}" for other in others]
    assert len(operators) == 7 and not faults
