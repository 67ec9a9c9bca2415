"""timm's own model tests, unedited, for our models: fetched with the source distribution of the
installed timm.

The wheel has no tests. The source distribution comes from the package registry (pip checks its
hash) and is kept under ``.cache/``, which git ignores.
"""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import timm

from tests.support.source_distributions import Unavailable, source_distribution

CACHE = Path(__file__).resolve().parents[2] / ".cache"

DESELECTED = {"test_model_forward_torchscript", "test_model_forward_fx_torchscript"}
"""Those of ``torch.jit``, which timm is dropping and torch has deprecated. No others."""


def fetch() -> Path:
    """Path of timm's ``tests/test_models.py`` of the installed version.

    Raises:
        Unavailable: if the registry cannot be reached, or what it gives does not belong to the
            installed timm.
    """
    release = f"timm-{timm.__version__}"
    target = CACHE / release / "test_models.py"
    if target.exists():
        return target
    with source_distribution("timm", timm.__version__, CACHE) as (content, folder):
        try:
            version, tests = (
                content.extractfile(f"{release}/{name}").read()
                for name in ("timm/version.py", "tests/test_models.py")
            )
        except (KeyError, AttributeError) as error:  # no such member, or not a file
            raise Unavailable(f"{content.name} is not laid out as expected: {error}") from error
        if version != Path(timm.__file__).with_name("version.py").read_bytes():
            raise Unavailable(f"{content.name} is not of the installed timm {timm.__version__}")
        target.parent.mkdir(exist_ok=True)
        whole = folder / "test_models.py"
        whole.write_bytes(tests)
        whole.replace(target)  # another process may have been as fast
    return target


def load(path: Path, models: list[str]) -> ModuleType:
    """Import timm's test file with ``timm.list_models`` knowing ``models`` only, wherever they are
    registered."""

    def list_models(filter="", module="", **kwargs) -> list[str]:
        return [name for name in timm.models.list_models(filter, **kwargs) if name in models]

    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    loaded = importlib.util.module_from_spec(spec)
    with mock.patch.object(timm, "list_models", list_models), warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # timm's CI shards
        spec.loader.exec_module(loaded)
    return loaded


def select(loaded: ModuleType, models: list[str]) -> dict:
    """The tests of ``loaded`` that run ``models`` by name, and the fixtures.

    Left out are those of timm's other models, and :data:`DESELECTED`.
    """

    def names(function) -> set:
        marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        return {value for mark in marks if mark.args[0] == "model_name" for value in mark.args[1]}

    return {
        name: item
        for name, item in vars(loaded).items()
        if name == "cfg_device"
        or (
            name.startswith("test_")
            and name not in DESELECTED
            and names(item)
            and names(item) <= set(models)
        )
    }
