"""Exact soft top-k in Triton kernels; one row is spread over as many programs as its length asks
for.

A row's gates follow from one scalar: the largest float32 ``v`` with ``mass(v) >= k - count(v)``,
where count is the number of scores above ``v``, those that are capped at gate 1, and mass the sum
of exp((s - v) / eps) over the others. ``v`` is searched over the ordered bits of a float32, so that
the number of rounds does not depend on the scores (outliers, ties, clusters) and no score is left
inside the last bracket. A round evaluates 2**BITS candidates in one pass over the row; each program
stores its part, and the launch that follows adds up the parts in every program, in one order.
Counts are integers and mass is compared with k - count: nothing is ever subtracted from a sum of
    exponentials.

A row of up to ``SORTED_ROW`` takes the three launches of ``kernels.py`` instead.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..registration import laid_out_as
from .kernels import room, score_of, sort_kernel, sorted_gates_kernel, splitter_kernel, store_gates

WHOLE_ROW = 16384
"""Rows up to this length are solved by one program in one launch."""
SORTED_ROW = 262_144
"""Longer rows up to this length are sorted by chunks of SORTED_CHUNK in groups of SORTED_GROUP."""
SORTED_CHUNK = 1024
SORTED_GROUP = 32
CHUNK = 1024
"""Entries a program takes of a longer row, at least."""
MOST_PROGRAMS = 256
"""Programs of one row, at most: each reads the parts of all."""


def split(n: int) -> tuple[int, int]:
    """Programs of a row of ``n`` entries, and entries of each. Of ``n`` alone: a batch gives what
    its rows give."""
    chunk = n if n <= WHOLE_ROW else CHUNK * triton.cdiv(n, CHUNK * MOST_PROGRAMS)
    return triton.cdiv(n, chunk), chunk


@triton.jit
def candidate_keys(low, level, BITS: tl.constexpr):
    """Lower ends of the 2**BITS sections that round ``level`` divides the bracket from ``low``
    into."""
    return low + (tl.arange(0, 1 << BITS).to(tl.int64) << (32 - BITS * (level + 1)))


@triton.jit
def evaluate(scores, begin, end, candidates, scale, BITS: tl.constexpr, TILE: tl.constexpr):
    """Mass and count of the entries [begin, end) of a row at each candidate."""
    mass = tl.zeros((1 << BITS, TILE), tl.float32)
    count = tl.zeros((1 << BITS, TILE), tl.int32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        s = tl.load(scores + at, mask=at < end, other=float("-inf"))[None, :]
        above = s > candidates[:, None]
        count += above.to(tl.int32)
        mass += tl.where(above, 0.0, tl.exp2((s - candidates[:, None]) * scale))
    return tl.sum(mass, 1), tl.sum(count, 1)


@triton.jit
def section_of(mass, count, k):
    """Which section holds ``v``. Below ``v`` every candidate passes, and the lowest always does."""
    return tl.maximum(tl.sum((mass >= room(k, count)).to(tl.int32), 0) - 1, 0)


@triton.jit
def narrowed(
    k, masses, counts, lows, row, rows, programs, level, BITS: tl.constexpr, GATHER: tl.constexpr
):  # fmt: skip
    """Lower end of the bracket after round ``level``, with mass and count there, from the parts of
    all programs."""
    sections = tl.arange(0, 1 << BITS)
    mass = tl.zeros((1 << BITS, GATHER), tl.float32)
    count = tl.zeros((1 << BITS, GATHER), tl.int32)
    first_section = ((level & 1) * rows + row) << BITS
    for first in range(0, programs, GATHER):
        program = first + tl.arange(0, GATHER)
        at = ((first_section + sections) * programs)[:, None] + program[None, :]
        mass += tl.load(masses + at, mask=(program < programs)[None, :], other=0.0)
        count += tl.load(counts + at, mask=(program < programs)[None, :], other=0)
    mass, count = tl.sum(mass, 1), tl.sum(count, 1)
    section = section_of(mass, count, k)
    low = tl.load(lows + level * rows + row) + (section.to(tl.int64) << (32 - BITS * (level + 1)))
    here = sections == section
    return low, tl.sum(tl.where(here, mass, 0.0), 0), tl.sum(tl.where(here, count, 0), 0)


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "level"])
def search_kernel(
    scores,  # (rows, n)
    k,  # (rows, 1)
    masses,  # (2, rows, sections, programs), the halves in turn
    counts,
    lows,  # (rounds, rows): lower end of the bracket at the start of each round
    n,
    rows,
    programs,
    chunk,
    level,
    scale,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Round ``level`` of the search over one program's part of a row. WHOLE: every round up to it,
    of a whole row."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    scores += row * n
    row_k = tl.load(k + row)
    low = tl.full((), -(1 << 31), tl.int64)
    if WHOLE:
        for earlier in range(level):
            candidates = score_of(candidate_keys(low, earlier, BITS))
            mass, count = evaluate(scores, begin, end, candidates, scale, BITS, TILE)
            low += section_of(mass, count, row_k).to(tl.int64) << (32 - BITS * (earlier + 1))
    elif level > 0:
        low, _, _ = narrowed(
            row_k, masses, counts, lows, row, rows, programs, level - 1, BITS, GATHER
        )
    mass, count = evaluate(
        scores, begin, end, score_of(candidate_keys(low, level, BITS)), scale, BITS, TILE
    )
    at = ((((level & 1) * rows + row) << BITS) + tl.arange(0, 1 << BITS)) * programs + program
    tl.store(masses + at, mass)
    tl.store(counts + at, count)
    if program == 0:
        tl.store(lows + level * rows + row, low)


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "level"])
def gates_kernel(
    scores,
    k,
    num_valid,  # (rows, 1)
    masses,
    counts,
    lows,
    gates,  # (rows, n), out
    n,
    rows,
    programs,
    chunk,
    level,
    scale,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Gates from what the last round, ``level``, left."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * chunk
    end = tl.minimum(begin + chunk, n)
    row_k = tl.load(k + row)
    low, mass, count = narrowed(
        row_k, masses, counts, lows, row, rows, programs, level, BITS, GATHER
    )
    full = (row_k >= tl.load(num_valid + row)).to(tl.int32)  # the interpreter broadcasts no bool
    left = room(row_k, count)
    store_gates(
        scores + row * n, gates + row * n, begin, end, score_of(low), mass, left, full, scale, TILE
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "programs", "chunk"])
def gradient_sums_kernel(grad, gates, totals, dots, n, programs, chunk, TILE: tl.constexpr):
    """One program's part of the sums of y and y g over the uncapped entries; totals and dots (rows,
    programs)."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * chunk
    end = tl.minimum(begin + chunk, n)
    total = tl.zeros((TILE,), tl.float32)
    dot = tl.zeros((TILE,), tl.float32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        gate = tl.load(gates + row * n + at, mask=at < end, other=0.0)
        gate = tl.where(gate >= 1, 0.0, gate)
        total += gate
        dot += gate * tl.load(grad + row * n + at, mask=at < end, other=0.0)
    tl.store(totals + tl.program_id(0), tl.sum(total, 0))
    tl.store(dots + tl.program_id(0), tl.sum(dot, 0))


@triton.jit
def gathered_sum(parts, row, programs, GATHER: tl.constexpr):
    """Sum of a row of (rows, programs), in one order in every program."""
    total = tl.zeros((GATHER,), tl.float32)
    for first in range(0, programs, GATHER):
        program = first + tl.arange(0, GATHER)
        total += tl.load(parts + row * programs + program, mask=program < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["n", "programs", "chunk"])
def gradient_kernel(
    grad,
    gates,
    totals,
    dots,
    grad_scores,
    grad_k,
    n,
    programs,
    chunk,
    scale,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """The gradient of the scores (rows, n) and of k (rows, 1) from all programs' sums."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    total = gathered_sum(totals, row, programs, GATHER)
    mean = gathered_sum(dots, row, programs, GATHER) / tl.where(total > 0, total, 1.0)
    if program == 0:
        tl.store(grad_k + row, mean)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        gate = tl.load(gates + row * n + at, mask=at < end, other=0.0)
        gate = tl.where(gate >= 1, 0.0, gate)
        tl.store(
            grad_scores + row * n + at,
            gate * (tl.load(grad + row * n + at, mask=at < end) - mean) * scale,
            mask=at < end,
        )


def _scale(eps: float) -> float:
    return min(max(math.log2(math.e) / eps, 1e-37), 1e37)  # a normal float32


def _sorted_forward(scores: Tensor, k: Tensor, num_valid: Tensor, eps: float) -> Tensor:
    rows, n = scores.shape
    programs, groups = triton.cdiv(n, SORTED_CHUNK), SORTED_CHUNK // SORTED_GROUP
    scores_, scale = scores.contiguous(), _scale(eps)
    options = {"CHUNK": SORTED_CHUNK, "GROUP": SORTED_GROUP, **backend.no_spills(scores.device)}

    # sorted chunks
    ordered = torch.empty(rows, programs, SORTED_CHUNK, device=scores.device)
    masses = torch.empty(rows, programs, groups, device=scores.device)
    backend.launch(
        sort_kernel, (rows * programs,), scores_, ordered, masses, n, programs, scale,
        num_warps=4, **options,
    )  # fmt: skip

    # what each splitter cuts off, a few of them a program
    splitters = min(8, groups)
    splitter_mass = torch.empty_like(masses)
    splitter_below = torch.empty_like(masses, dtype=torch.int32)
    backend.launch(
        splitter_kernel, (rows * programs * groups // splitters,), ordered, masses, splitter_mass,
        splitter_below, programs, scale, SPLITTERS=splitters, CHUNKS=32, num_warps=8, **options,
    )  # fmt: skip

    # the gates
    gates = torch.empty_like(scores_)
    backend.launch(
        sorted_gates_kernel, (rows * programs,), scores_, k.contiguous(), num_valid.contiguous(),
        ordered, splitter_mass, splitter_below, gates, n, programs, scale,
        CHUNKS=max(32, triton.next_power_of_2(programs)), num_warps=8, **options,
    )  # fmt: skip
    return laid_out_as(gates, scores)


def forward(scores: Tensor, k: Tensor, num_valid: Tensor, eps: float) -> Tensor:
    """Gates as :func:`.eager.soft_topk_forward`. 2 launches for a short row, 3 for one of up to
    ``SORTED_ROW``, 9 for a longer one; none waits for the host."""
    rows, n = scores.shape
    if WHOLE_ROW < n <= SORTED_ROW:
        return _sorted_forward(scores, k, num_valid, eps)
    programs, chunk = split(n)
    whole = programs == 1

    # few candidates a round cost the fewest exponentials, many the fewest launches
    bits, tile, gather, warps = (2, 1024, 1, 8) if whole else (4, 256, 64, 4)
    rounds = 32 // bits

    # what the programs tell one another
    scores_, k, num_valid = scores.contiguous(), k.contiguous(), num_valid.contiguous()
    masses = torch.empty(2, rows, 1 << bits, programs, device=scores.device)
    counts = torch.empty_like(masses, dtype=torch.int32)
    lows = torch.empty(rounds, rows, dtype=torch.int64, device=scores.device)
    scale = _scale(eps)

    # the level, some bits a launch
    grid, state = (rows * programs,), (masses, counts, lows)
    for level in range(rounds - 1 if whole else 0, rounds):
        backend.launch(
            search_kernel,
            grid,
            scores_,
            k,
            *state,
            n,
            rows,
            programs,
            chunk,
            level,
            scale,
            BITS=bits,
            TILE=tile,
            GATHER=gather,
            WHOLE=whole,
            num_warps=warps,
            **backend.no_spills(scores.device),
        )

    # the gates of it
    gates = torch.empty_like(scores_)
    backend.launch(
        gates_kernel,
        grid,
        scores_,
        k,
        num_valid,
        *state,
        gates,
        n,
        rows,
        programs,
        chunk,
        rounds - 1,
        scale,
        BITS=bits,
        TILE=1024,
        GATHER=gather,
        num_warps=warps,
    )
    return laid_out_as(gates, scores)


def backward(grad: Tensor, gates: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients as :func:`.eager.soft_topk_backward`, in two launches."""
    rows, n = gates.shape
    programs, chunk = split(n)
    grad, gates_ = grad.contiguous(), gates.contiguous()

    # sums of each chunk
    totals = torch.empty(rows, programs, device=gates.device)
    dots = torch.empty_like(totals)
    grid = (rows * programs,)
    backend.launch(
        gradient_sums_kernel,
        grid,
        grad,
        gates_,
        totals,
        dots,
        n,
        programs,
        chunk,
        TILE=1024,
        num_warps=4,
    )

    # sums of each row, and the gradient
    grad_scores, grad_k = torch.empty_like(gates_), totals.new_empty(rows, 1)
    sizes = (n, programs, chunk, min(1 / eps, 1e37))
    backend.launch(
        gradient_kernel,
        grid,
        grad,
        gates_,
        totals,
        dots,
        grad_scores,
        grad_k,
        *sizes,
        TILE=1024,
        GATHER=256,
        num_warps=4,
    )
    return laid_out_as(grad_scores, gates), grad_k
