"""Which cases every run takes, and which ``make test-all`` adds."""

import pytest

exhaustive = pytest.mark.exhaustive
"""One more case of a kind that other cases already show; it costs seconds to minutes."""


def further(*values):
    """Values of ``pytest.mark.parametrize`` that only ``make test-all`` takes; a tuple holds the
    values of several names."""
    cases = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*case, marks=exhaustive) for case in cases]
