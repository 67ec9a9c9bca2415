"""diffusers' own tests, unedited, run with routed attention in every model that they construct.

Neither the wheel nor the source distribution of diffusers 0.42.1 has them (of ``tests/`` the latter holds
``testing_utils.py`` alone). They come from a checkout of the installed version that ``COLT5_DIFFUSERS_SOURCE`` names, or
from the source distribution of a version that has them, which is kept under ``.cache/``, ignored by git.

This module is also the pytest plugin of the processes that run them (``-p diffusers_own_tests``).
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
from colt5_vision.pipelines import RoutedAttentionConfig, enable_routed_attention
from diffusers import ModelMixin
from source_distributions import Unavailable, source_distribution

from colt5_vision.pretrained import PretrainedRoutedAttention

CACHE = Path(__file__).resolve().parent.parent / ".cache"
CONFIG = RoutedAttentionConfig(window_size=4, num_heavy_tokens_kv=1.0, min_tokens=1)
"""All tokens routed: what stock attention computes, up to rounding."""


def fetch() -> Path:
    """Folder that holds ``tests/`` and ``src/`` of the installed diffusers.

    Raises:
        Unavailable: if there is no checkout, and the registry cannot be reached or has no tests; if what was found does
            not belong to the installed diffusers.
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
        raise Unavailable(f"{source} does not hold the source of the installed diffusers {diffusers.__version__}")
    if not (source / "tests" / "models").is_dir():
        raise Unavailable(
            f"{source} has no tests/models: name a checkout of diffusers v{diffusers.__version__} in "
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
        By test id: ``outcome`` ("passed", "failed", "skipped"), ``routed_calls`` during it, and the last line of why.

    Raises:
        RuntimeError: if pytest did not get to run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu", "PYTHONPATH": path}
        env |= {"COLT5_REPORT": str(report), "COLT5_ROUTED": "1" if routed else ""}
        plugins = ["-p", "diffusers_own_tests", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(source), *plugins, *paths]
        done = subprocess.run(
            command, cwd=source, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return json.loads(report.read_text())


def passed(results: dict[str, dict]) -> set[str]:
    return {name for name, result in results.items() if result["outcome"] == "passed"}


# from here on: in the process that runs diffusers' tests
_results: dict[str, dict] = {}
_calls = 0
_depth = 0


def pytest_configure(config):
    if os.environ.get("COLT5_ROUTED"):
        route_every_model()


def route_every_model() -> None:
    """From now on a diffusers model, not one within another nor an autoencoder, is routed as soon as it is made."""
    forward = PretrainedRoutedAttention.forward

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        global _calls
        _calls += 1
        return forward(self, *args, **kwargs)

    PretrainedRoutedAttention.forward = counted
    ModelMixin.__init_subclass__ = classmethod(lambda cls, **kwargs: _route_when_made(cls))  # diffusers imports lazily
    known = ModelMixin.__subclasses__()
    while known:
        known += (cls := known.pop()).__subclasses__()
        _route_when_made(cls)


def _route_when_made(cls: type) -> None:
    init = vars(cls).get("__init__")
    if init is None or hasattr(init, "routes"):
        return

    @functools.wraps(init)
    def made(self, *args, **kwargs):
        global _depth
        _depth += 1
        try:
            init(self, *args, **kwargs)
        finally:
            _depth -= 1
        if _depth == 0 and ".autoencoders." not in type(self).__module__:
            try:
                enable_routed_attention(self, CONFIG)
            except ValueError as error:
                if "no layer of" not in str(error) or "min_tokens" in str(error):
                    raise

    made.routes = True
    cls.__init__ = made


def pytest_runtest_logreport(report):
    global _calls
    result = _results.setdefault(report.nodeid, {"outcome": "passed", "routed_calls": 0, "why": ""})
    result["routed_calls"] += _calls
    _calls = 0
    if report.outcome == "failed" or report.outcome == "skipped" and result["outcome"] == "passed":
        result |= {"outcome": report.outcome, "why": report.longreprtext.strip().rpartition("\n")[2]}


def pytest_sessionfinish(session):
    if "COLT5_REPORT" in os.environ:
        Path(os.environ["COLT5_REPORT"]).write_text(json.dumps(_results))
