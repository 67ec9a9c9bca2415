"""Measurements, side by side in one process; run as ``python -m benchmarks.NAME``."""

import sys
from pathlib import Path

# helpers are those of the examples, by the name that these use: ``support``
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
