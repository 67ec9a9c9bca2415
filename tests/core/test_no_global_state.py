"""What belongs to a forward lives in it: no module of the library remembers one."""

import sys

from tests.support.module_cases import CASES, build, gradients, image, some_mask


def remembered():
    """Every global of the library: which object it is, and how much is in it."""
    library = [m for name, m in sys.modules.items() if name.partition(".")[0] == "colt5_vision"]
    found = {(m.__name__, name): value for m in library for name, value in vars(m).items()}
    held = (dict, list, set)
    return {
        key: (id(value), len(value) if isinstance(value, held) else None)
        for key, value in found.items()
        if not key[1].startswith("__")
    }


def test_forward_and_backward_leave_no_trace():
    modules = {name: build(case) for name, case in CASES.items()}
    before = remembered()
    for size in ((9, 7), (5, 6)):
        for name, module in modules.items():
            gradients(CASES[name], module, image(3, *size), some_mask(3, *size))
    assert len(before) > 300 and remembered() == before
