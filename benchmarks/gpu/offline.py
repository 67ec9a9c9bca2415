"""Compile the library's own kernel launches for chips that are not here, and read what they need.

``recorded`` runs an operator on CPU tensors with the launches kept instead of made: kernels,
arguments and options are those a GPU of the given architecture would get. ``build`` compiles one of
them; nothing is run.
"""

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from colt5_vision.ops import backend

TARGETS = {
    80: GPUTarget("cuda", 80, 32),
    90: GPUTarget("cuda", 90, 32),
    100: GPUTarget("cuda", 100, 32),
    942: GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
    942: 64 << 10,
}  # bytes a block may have

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass
class Launch:
    kernel: triton.JITFunction
    args: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Resources:
    registers: int
    stack: int  # bytes of local memory a thread: spills, or an array that is indexed
    shared: int  # bytes a block


@contextlib.contextmanager
def recorded(architecture: int):
    """The launches that the code inside makes, as for a GPU of ``architecture``; outputs stay
    uninitialised."""
    launches = []

    def keep(kernel, grid, *args, **options):
        names = kernel.arg_names
        bound = dict(zip(names, args, strict=False))
        bound.update({name: value for name, value in options.items() if name in names})
        launches.append(Launch(kernel, bound, {k: v for k, v in options.items() if k not in names}))

    with (
        mock.patch.object(backend, "launch", keep),
        mock.patch.object(backend, "architecture", lambda _: architecture),
    ):
        yield launches


def _source(launch: Launch) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch allocates aligned memory
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
                continue
            signature[parameter.name] = "i64" if abs(value) >= 1 << 31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            raise TypeError(f"{launch.name}: argument {parameter.name} is a {type(value).__name__}")
    return ASTSource(launch.kernel, signature, constants, attributes)


def compiled(launch: Launch, architecture: int):
    """Triton's compiled kernel; raises what the compiler raises."""
    return triton.compile(_source(launch), target=TARGETS[architecture], options=launch.options)


def build(launch: Launch, architecture: int) -> Resources:
    """Compile a launch, and see what it needs."""
    return resources(compiled(launch, architecture), launch, architecture)


def resources(kernel, launch: Launch, architecture: int) -> Resources:
    """What a compiled launch needs."""
    shared = kernel.metadata.shared
    if TARGETS[architecture].backend == "hip":
        text = kernel.asm["amdgcn"]
        field = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        return Resources(field["vgpr_count"], field["private_segment_fixed_size"], shared)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(
        rf"Function {launch.name}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing
    )
    registers, stack, _, local = (int(x) for x in found.groups())
    return Resources(registers, stack + local, shared)


def check(launch: Launch, architecture: int) -> Resources:
    """Compile, and fail if it spills or needs more shared memory than a block may have."""
    found = build(launch, architecture)
    what = f"{launch.name} for {architecture}: {found}, {launch.options}"
    assert found.shared <= SHARED_LIMIT[architecture], what
    if architecture != 942:
        assert found.stack == 0, what
    return found
