"""Which implementation an operator runs: plain torch (``eager``) or its Triton kernels. Importing
needs no Triton."""

import functools
import importlib.util
import os
from contextlib import nullcontext

import torch
from torch import Tensor

from .._torch_internals import in_onnx_export, is_transformed

BACKENDS = ("auto", "eager", "triton")
VARIABLE = "COLT5_VISION_BACKEND"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU by Triton's interpreter: slow, for tests. Triton itself reads this when it
is imported."""

HALVES = (torch.float16, torch.bfloat16)


def check_backend(backend: str | None, name: str = "backend") -> None:
    """``backend`` is None or one of ``"auto"``, ``"eager"``, ``"triton"``."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{name}: expected one of {BACKENDS}, got {backend!r}")


def requested_backend(backend: str | None = None) -> str:
    """What was asked for: by the call, else by the environment variable ``COLT5_VISION_BACKEND``,
    else ``"auto"``."""
    if backend:
        check_backend(backend)
        return backend
    value = os.environ.get(VARIABLE) or "auto"
    check_backend(value, VARIABLE)
    return value


@functools.cache
def _why_not_device(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"needs compute capability 8.0, {torch.cuda.get_device_name(index)} has {major}.{minor}"
        )
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(
    x: Tensor, dtypes: tuple[torch.dtype, ...] = (*HALVES, torch.float32)
) -> str | None:
    """Why an operator cannot run its Triton kernels on ``x``; None if it can.

    Args:
        x: the tensor that decides on device and dtype.
        dtypes: those the kernels are made for. The interpreter takes float32 everywhere.
    """
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return (
            "needs a CUDA or ROCm device (or TRITON_INTERPRET=1 in the environment), got "
            f"{x.device}"
        )
    if INTERPRETED:
        dtypes = (*dtypes, torch.float32)
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        return f"the kernels are for {expected}, got {str(x.dtype).removeprefix('torch.')}"
    return None if x.device.type == "cpu" else _why_not_device(x.device.index)


def use_triton(operator: str, backend: str | None, why_not: str | None) -> bool:
    """Whether ``operator`` runs its kernels.

    Args:
        operator: its name, for the error.
        backend: as asked for in the call; None or empty: the environment variable decides.
        why_not: why they cannot run, see :func:`why_not_triton`.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run.
    """
    backend = requested_backend(backend)
    if backend == "triton" and why_not is not None:
        raise RuntimeError(f"{operator}: backend 'triton' cannot run: {why_not}")
    # the interpreter is for tests: it must be asked for
    return backend == "triton" or (backend == "auto" and why_not is None and not INTERPRETED)


def needs_operator(x: Tensor) -> bool:
    """Whether ``x`` may meet a kernel, so that a registered operator must stand where plain torch
    would do."""
    return x.device.type == "cuda" or INTERPRETED


def takes_transform(operator: str, backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether a transform rides on a call, which then must be plain torch: ``torch.func``'s, or
    forward-mode AD.

    Raises:
        NotImplementedError: ``"triton"`` was asked for.
    """
    if not is_transformed(*tensors):
        return False
    if backend == "triton":
        raise NotImplementedError(
            f"{operator}: the kernels do not run within torch.func or forward-mode AD; "
            "use backend='eager'"
        )
    return True


def takes_operator(operator: str, backend: str | None, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call goes through the registered operator, which then chooses, or is plain torch
    that compilers see.

    Args:
        operator: its name, for errors.
        backend: as asked for in the call.
        x: the tensor that decides on device and dtype.
        others: further differentiable inputs.

    Raises:
        ValueError, RuntimeError: ``backend`` is an unknown word, or ``"triton"`` where it cannot
            run.
        NotImplementedError: ``"triton"`` within such a transform.
    """
    check_backend(backend)
    if in_onnx_export(x) or takes_transform(operator, backend, x, *others):
        return False
    if backend == "triton" and not needs_operator(x):
        use_triton(operator, backend, why_not_triton(x))  # says why not
    return needs_operator(x)


def architecture(device: torch.device) -> int:
    """What kernels choose their tiles by: compute capability as 80, 90, 100; 942 for ROCm; 0 for
    the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        return 942
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def no_spills(device: torch.device) -> dict[str, int]:
    """Launch option: ptxas takes the registers that a kernel needs, for up to 8 warps.

    By itself it spills a few where one more block then fits on a processor.
    AMD's compiler does not, and knows no such option.
    """
    return {"maxnreg": 255} if 0 < architecture(device) < 200 else {}


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Start a kernel on the device of its tensors. Every launch of the library passes here."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)
