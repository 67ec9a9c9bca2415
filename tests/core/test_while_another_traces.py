"""Eager calls of every module while another thread traces: what is traced is a thread's own
matter."""

import pytest

from tests.support.module_cases import (
    CASES,
    apply,
    assert_same,
    build,
    gradients,
    image,
    some_mask,
)
from tests.support.threads import another_thread_traces


def test_every_module_gives_the_same_and_checks_its_arguments():
    x, mask = image(), some_mask()
    modules = {name: build(case) for name, case in CASES.items()}
    expected = {name: gradients(CASES[name], module, x, mask) for name, module in modules.items()}
    with another_thread_traces():
        for name, module in modules.items():
            assert_same(gradients(CASES[name], module, x, mask), expected[name])
            with pytest.raises((TypeError, ValueError), match="mask"):
                apply(CASES[name], module, x, mask.float())
