"""diffusers' own tests, unedited, run with routed attention in every model that they construct.

Neither the wheel nor the source distribution of diffusers 0.42.1 has them (of ``tests/`` the latter
holds ``testing_utils.py`` alone). They come from a checkout of the installed version that
``COLT5_DIFFUSERS_SOURCE`` names, or from the source distribution of a version that has them, which
is kept under ``.cache/``, ignored by git.

``diffusers_plugin`` beside this file is the pytest plugin of the processes that run them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers

from tests.support.source_distributions import Unavailable, source_distribution

CACHE = Path(__file__).resolve().parents[2] / ".cache"


def fetch() -> Path:
    """Folder that holds ``tests/`` and ``src/`` of the installed diffusers.

    Raises:
        Unavailable: if there is no checkout, and the registry cannot be reached or has no tests; if
            what was found does not belong to the installed diffusers.
    """
    if source := os.environ.get("COLT5_DIFFUSERS_SOURCE"):
        return _checked(Path(source).resolve())
    target = CACHE / f"diffusers-{diffusers.__version__}"
    if not target.exists():
        _download(target)
    return _checked(target)


def _checked(source: Path) -> Path:
    own = source / "src" / "diffusers" / "__init__.py"
    if not own.exists() or own.read_bytes() != Path(diffusers.__file__).read_bytes():
        raise Unavailable(
            f"{source} does not hold the source of the installed diffusers {diffusers.__version__}"
        )
    if not (source / "tests" / "models").is_dir():
        raise Unavailable(
            f"{source} has no tests/models: name a checkout of diffusers v{diffusers.__version__} "
            "in "
            "COLT5_DIFFUSERS_SOURCE"
        )
    return source


def _download(target: Path) -> None:
    """Tests and ``src/diffusers/__init__.py`` of the source distribution into ``target``."""
    with source_distribution("diffusers", diffusers.__version__, CACHE) as (content, folder):
        wanted = (f"{target.name}/tests/", f"{target.name}/src/diffusers/__init__.py")
        members = [member for member in content.getmembers() if member.name.startswith(wanted)]
        content.extractall(folder, members, filter="data")
        try:
            (folder / target.name).rename(target)
        except OSError:  # another process was as fast
            if not target.exists():
                raise


def run(source: Path, *paths: str, routed: bool, timeout: float = 3600) -> dict[str, dict]:
    """Run test files of ``source`` in a process of their own, without network.

    Returns:
        By test id: ``outcome`` ("passed", "failed", "skipped"), ``routed_calls`` during it, and the
            last line of why.

    Raises:
        RuntimeError: if pytest did not get to run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        path = os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)
        env = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu", "PYTHONPATH": path}
        env |= {"COLT5_REPORT": str(report), "COLT5_ROUTED": "1" if routed else ""}
        plugins = ["-p", "diffusers_plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(source), *plugins, *paths]
        done = subprocess.run(
            command,
            cwd=source,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(
                f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return json.loads(report.read_text())


def passed(results: dict[str, dict]) -> set[str]:
    return {name for name, result in results.items() if result["outcome"] == "passed"}
