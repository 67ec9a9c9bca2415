"""Rows of a benchmark, each written when it is measured."""

import json
from pathlib import Path

from colt5_vision.store import save_atomically


class Rows:
    """Rows by what they are of.

    Args:
        path: of a file of JSON lines.
        key: names of what a row is of.
        resume: keep the rows that are there.
    """

    def __init__(self, path: Path, key: tuple[str, ...], resume: bool):
        self.path, self.key, self.rows = path, key, []
        for line in path.read_text().splitlines() if resume and path.is_file() else ():
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut short
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        save_atomically(path, lambda part: part.write_text(lines))
        self.known = {self._of(row) for row in self.rows}

    def has(self, **of) -> bool:
        return self._of(of) in self.known

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.known.add(self._of(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _of(self, row: dict) -> tuple:
        return tuple(row[name] for name in self.key)
