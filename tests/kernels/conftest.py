"""The Triton kernels against their plain-torch twins: on a GPU, or by Triton's interpreter with
TRITON_INTERPRET=1."""

import pytest
import torch

from colt5_vision.ops import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if backend.INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _rounded(x, source, target, mode):
        """Triton's interpreter (3.6, 3.8) cuts float32 to bfloat16; chips round to the nearest."""
        if source == tl.float32 and target == tl.bfloat16:
            x = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16()
            return x.view(torch.int16).numpy().view(np.uint16)
        return _convert_float(x, source, target, mode)

    def _create_dot(self, a, b, d, *_):
        """Triton's interpreter (3.6, 3.8) multiplies bits of bfloat16 as if they were integers."""
        a, b = (
            _convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
            if x.dtype.scalar == tl.bfloat16
            else x.data
            for x in (a, b)
        )  # fmt: skip
        return interpreter.TensorHandle(
            np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar
        )

    def _sort(x):
        """Triton's interpreter (3.6, 3.8) takes ten seconds to sort a thousand."""
        return tl.tensor(interpreter.TensorHandle(np.sort(x.handle.data), x.dtype), x.type)

    slow_sort, tl.sort = tl.sort, _sort
    interpreter._convert_float = _rounded
    interpreter.InterpreterBuilder.create_dot = _create_dot


def pytest_collection_modifyitems(config, items):
    """Without a GPU and without the interpreter nothing here can run: `make test` runs it by
    itself, interpreted."""
    if DEVICE == "cpu" and not backend.INTERPRETED:
        here = [item for item in items if "kernels" in item.path.parts]
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in set(here)]


@pytest.fixture
def own_sort(monkeypatch):
    """Triton's sort, where the interpreter would have a faster one."""
    if backend.INTERPRETED:
        monkeypatch.setattr(tl, "sort", slow_sort)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """Nothing here may fall back to plain torch unnoticed; twins call ``eager.py`` or say
    backend="eager"."""
    monkeypatch.setenv(backend.VARIABLE, "triton")


@pytest.fixture
def randn(device):
    def make(*shape, seed=0, std=1.0):
        return (
            torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(std).to(device)
        )

    return make


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were started."""
    names, launch = [], backend.launch

    def record(kernel, *args, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(backend, "launch", record)
    return names
