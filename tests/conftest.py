import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

from colt5_vision._torch_internals import function_modes

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)
settings.register_profile("colt5", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("colt5")

# folders of libraries that are not installed; a folder's own name passes for an empty library
collect_ignore = [
    name for name in ("diffusers", "timm", "transformers") if find_spec(f"{name}.models") is None
]


@pytest.fixture(autouse=True)
def no_mode_of_torch_stays():
    """One that stays, as of an export that failed, changes what later tests see."""
    yield
    assert function_modes() == []
