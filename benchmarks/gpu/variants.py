"""Variants of the forward attention kernel by counts: ``python -m benchmarks.gpu.variants``.

It compiles for chips that are not here and reads what came out. It runs nothing and measures
nothing, so it needs no GPU. Times are bounds from an H200's data sheet.

Counts, for N tokens, w² keys of a window, K routed keys, heads of D, halves of 2 bytes, tiles of M
queries and S keys:
    FLOPs: 4 · heads · N · (w² + K) · D, two products.
    programs: heads · (N / w²) · ceil(w² / M), and those of the gather.
    asked for: what programs load and store in all, most of it served by the L2 cache. A program
        loads and stores M rows of 2 D bytes, and loads 4 D bytes a key with 4 bytes of a window's
        key (position), 8 of a gathered one (bias, window) or 12 by index. The gather reads and
        writes 4 D bytes a key and head. A second pass loads queries once more, and what the first
        has stored.
    memory: what must pass the HBM at least. q, k, v and the result once, the gathered keys once
        written, and between two passes the result once written and once read.
    instructions: of a warp for one block of keys, counted in the machine code of the loop.
Bounds:
    tensor cores: FLOPs / peak.
    memory: those bytes / bandwidth.
    issue: instructions of all warps / (4 a clock and processor). The clock is the one at which the
        peak holds.
    blocks a processor: what registers and shared memory leave room for.
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton

from colt5_vision.ops import backend
from colt5_vision.ops.routed_window_attention import kernels
from colt5_vision.ops.routed_window_attention import triton as launches
from colt5_vision.ops.routed_window_attention.geometry import Geometry

from .offline import SHARED_LIMIT, TARGETS, Launch, Resources, build, compiled, recorded, resources
from .variant_kernels import DESCRIPTORS, INDEXED, SECOND_PASS, variant_kernel

RESULT = Path(__file__).parents[1] / "results" / "gpu_variants.md"

# data sheet of an NVIDIA H200 SXM, without sparsity: assumptions, upper bounds
PEAK = 989e12  # FLOP/s in float16 and bfloat16
BANDWIDTH = 4.8e12  # bytes/s of the memory
PROCESSORS = 132
CLOCK = PEAK / (PROCESSORS * 4096)  # a processor's tensor cores do 4,096 FLOPs a clock
ISSUED = 4  # instructions of a warp, a clock and processor
REGISTERS = 65_536  # of a processor
THREADS = 2048  # of a processor at most
RESERVED = 1024  # bytes of shared memory that a block takes for itself

HALF = 2  # bytes
SIDE, HEADS, WINDOW = 256, 24, 16
VARIANTS = {
    "gathered (the library's)": None,
    "by index": INDEXED,
    "gathered, descriptors": DESCRIPTORS,
    "two passes": SECOND_PASS,
}


@contextlib.contextmanager
def variant(mode) -> Iterator[None]:
    """The library's forward runs another kernel inside; None: its own."""
    launch, list_keys = backend.launch, None

    def other(kernel, grid, *args, **options):
        nonlocal list_keys
        if kernel is kernels.gather_kernel:
            list_keys = args[kernel.arg_names.index("list_keys")]
            if mode is INDEXED:
                return
        if kernel is kernels.forward_kernel:
            if mode is SECOND_PASS:
                windows = list(args)
                windows[kernel.arg_names.index("listed")] = 0
                launch(kernel, grid, *windows, **options)
            kernel, options = variant_kernel, options | {"list_keys": list_keys, "MODE": mode}
        launch(kernel, grid, *args, **options)

    with mock.patch.object(backend, "launch", other if mode is not None else launch):
        yield


def recorded_call(mode, architecture: int, head_dim: int, keys: int, dtype) -> list[Launch]:
    """The launches of one forward call at the goal's shape."""
    shape = (3, 1, SIDE**2, HEADS, head_dim)
    q, k, v = torch.empty(shape, dtype=dtype, device="meta").transpose(2, 3)
    routed = torch.empty(1, 1, keys, dtype=torch.int64, device="meta")
    geometry = Geometry(0, SIDE, SIDE, (WINDOW, WINDOW), head_dim**-0.5)
    with recorded(architecture) as found, variant(mode):
        launches.forward(q, k, v, routed, None, None, None, geometry)
    return [x for x in found if x.name in ("gather_kernel", "forward_kernel", "variant_kernel")]


def instructions(kernel) -> list[int]:
    """Machine instructions of the loops that use the tensor cores, in their order; sm_90 only."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        )

    # places of instructions and labels
    code, labels = [], {}
    for line in listing.stdout.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(found[1])

    # a branch back ends a loop
    loops = []
    for end, text in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        begin = labels.get(target[1], end + 1) if target else end + 1
        if begin <= end and any("HGMMA" in x for x in code[begin : end + 1]):
            loops.append(end + 1 - begin)
    return loops


@dataclass
class Counts:
    """Of one variant at one shape; see the head of the file."""

    flops: int
    programs: int
    asked: int
    memory: int


def counts(mode, head_dim: int, keys: int, block_m: int) -> Counts:
    tokens, area = SIDE**2, WINDOW**2
    programs = HEADS * (tokens // area) * -(-area // block_m)
    queries = HEADS * tokens * head_dim * HALF  # bytes of q, of k, of v, of the result
    of_list = HEADS * keys * 2 * head_dim * HALF  # bytes of routed keys and values
    index = 12 if mode is INDEXED else 8
    asked = 2 * queries + programs * ((area + keys) * 2 * head_dim * HALF + area * 4 + keys * index)
    memory = 4 * queries
    total = programs
    if mode is not INDEXED:
        asked += 2 * of_list
        memory += of_list
        total += HEADS * -(-keys // launches._GATHER_BLOCK)
    if mode is SECOND_PASS:
        asked += 3 * queries
        memory += 2 * queries
        total += programs
    return Counts(4 * HEADS * tokens * (area + keys) * head_dim, total, asked, memory)


def blocks(found: Resources, warps: int) -> int:
    """Blocks of a program that fit on a processor at once."""
    registers = -(-found.registers // 8) * 8 * 32 * warps
    shared = SHARED_LIMIT[90] // (found.shared + RESERVED)
    return min(REGISTERS // registers, shared, THREADS // (32 * warps))


def issue_seconds(loops: list[tuple[int, int]], programs: int, warps: int, block_n: int) -> float:
    """Time to issue the loops of all programs: (instructions a block, keys) of each."""
    each = sum(count * -(-keys // block_n) for count, keys in loops) * warps
    return each * programs / (PROCESSORS * ISSUED * CLOCK)


def hopper_row(name: str, mode, head_dim: int, keys: int, built: dict) -> str:
    """One line of the table of sm_90."""
    found = recorded_call(mode, 90, head_dim, keys, torch.float16)
    main = [launch for launch in found if launch.name != "gather_kernel"]
    key = (mode, head_dim)
    if key not in built:
        made = [compiled(launch, 90) for launch in main]
        built[key] = [
            (resources(x, y, 90), instructions(x)) for x, y in zip(made, main, strict=True)
        ]
    warps, block_n = main[-1].options["num_warps"], main[-1].args["BLOCK_N"]
    block_m = main[-1].args["BLOCK_M"]
    need, loops = built[key][-1]

    # a pass over the windows, then one over the routed keys
    if mode is SECOND_PASS:
        loops = [built[key][0][1][0], loops[-1]]
    count = counts(mode, head_dim, keys, block_m)
    programs = HEADS * (SIDE // WINDOW) ** 2 * -(-(WINDOW**2) // block_m)
    times = {
        "tensor": count.flops / PEAK,
        "memory": count.memory / BANDWIDTH,
        "issue": issue_seconds(
            list(zip(loops[:2], (WINDOW**2, keys), strict=True)), programs, warps, block_n
        ),
    }
    cells = [
        name, need.registers, need.stack, f"{need.shared / 1024:.0f}", blocks(need, warps),
        f"{count.programs:,}", f"{count.flops / 1e12:.2f}", f"{count.asked / 1e9:.1f}",
        f"{count.memory / 1e9:.2f}", f"{loops[0]} / {loops[1]}",
        *(f"{seconds * 1e3:.2f}" for seconds in times.values()),
        f"{max(times.values()) * 1e3:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HOPPER_HEAD = """\
| kernel | registers | spills, bytes | shared, KiB | blocks a processor | programs | TFLOP | \
asked for, GB | memory, GB | instructions a block: window / routed | tensor cores, ms | \
memory, ms | issue, ms | largest bound, ms |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


NEEDS_HEAD = """
## Every chip

Registers of a thread, spills of a thread, and shared memory of a block.

| kernel | heads of | dtype | chip | tile | warps | registers | spills, bytes | shared, KiB |
|---|---|---|---|---|---|---|---|---|"""


def needs_row(name: str, mode, head_dim: int, architecture: int, dtype: torch.dtype) -> str:
    launch = recorded_call(mode, architecture, head_dim, 4096, dtype)[-1]
    need = build(launch, architecture)
    cells = [
        name, head_dim, str(dtype).removeprefix("torch."),
        "gfx942" if architecture == 942 else f"sm_{architecture}",
        f"{launch.args['BLOCK_M']} x {launch.args['BLOCK_N']}", launch.options["num_warps"],
        need.registers, need.stack, f"{need.shared / 1024:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEAD = f"""\
# Variants of the attention kernel, by counts

Written by `python -m benchmarks.gpu.variants`. **Not run on a GPU**: no time here is measured.
The head of `benchmarks/gpu/variants.py` defines each column. Peaks are of an H200's data sheet:
{PEAK / 1e12:.0f} TFLOP/s, {BANDWIDTH / 1e12} TB/s, {PROCESSORS} processors. The clock follows.
A map of {SIDE}x{SIDE} tokens, {HEADS} heads, windows of {WINDOW}. Triton {triton.__version__}."""


def report() -> Iterator[str]:
    """The page, line by line."""
    yield HEAD
    built: dict = {}
    for head_dim in (128, 64):
        for keys in (4096, 1024):
            yield from (
                "",
                f"## H200 (sm_90), heads of {head_dim}, {keys:,} routed keys, float16",
                "",
            )
            yield HOPPER_HEAD
            for name, mode in VARIANTS.items():
                yield hopper_row(name, mode, head_dim, keys, built)

    # every chip
    yield NEEDS_HEAD
    for head_dim in (128, 64):
        for name, mode in VARIANTS.items():
            yield needs_row(name, mode, head_dim, 90, torch.bfloat16)
            for architecture in TARGETS:
                yield needs_row(name, mode, head_dim, architecture, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.variants", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    path = parser.parse_args().output
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
