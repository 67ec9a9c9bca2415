"""Hard top-k with a total order in Triton kernels: a radix select, spread over as many programs as
a row asks for.

A score becomes an integer whose order is that of the scores, upside down, so that the smallest is
the best. Four passes fix its 8-bit digits from the top: each counts the digits of what is still in
question, in integers, so that the order of the atomic additions does not matter. Two more passes
write the k taken entries, ties by the lower index, and a sort of those k puts them in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend

CHUNK = 4096
"""Entries a program takes of a row, at least."""
MOST_PROGRAMS = 256
"""Programs of one row, at most."""


@triton.jit
def ranks_of(scores):
    """int64 in [1, 2**32): smaller for a higher score, equal for 0.0 and -0.0. NaN as in
    ``eager.ordered_keys``."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.int64)
    return (1 << 31) + tl.where(bits < 0, magnitude, -magnitude)


@triton.jit
def threshold(histograms, row, rows, passes, k):
    """The digits found by the ``passes`` before, as one number, and how many entries with these
    digits are taken."""
    digits = tl.zeros((), tl.int64)
    left = tl.zeros((), tl.int32) + k
    for earlier in range(passes):
        count = tl.load(histograms + (earlier * rows + row) * 256 + tl.arange(0, 256))
        before = tl.cumsum(count, 0)
        digit = tl.sum((before < left).to(tl.int32), 0)  # the first whose entries reach the k-th
        left -= tl.sum(tl.where(tl.arange(0, 256) < digit, count, 0), 0)
        digits = digits * 256 + digit
    return digits, left


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "k", "level"])
def histogram_kernel(scores, histograms, n, rows, programs, chunk, k, level, TILE: tl.constexpr):
    """Count digit ``level`` of the entries whose higher digits are those of the k-th; histograms
    (4, rows, 256)."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * chunk
    end = tl.minimum(begin + chunk, n)
    digits, _ = threshold(histograms, row, rows, level, k)
    shift = 24 - 8 * level
    count = tl.zeros((512,), tl.int32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        rank = ranks_of(tl.load(scores + row * n + at, mask=at < end, other=0.0))
        inside = (at < end) & ((rank >> (shift + 8)) == digits)
        # the others fall into a bin of their own
        count += tl.histogram(tl.where(inside, (rank >> shift) & 255, 256).to(tl.int32), 512)
    bins = tl.arange(0, 512)
    tl.atomic_add(
        histograms + (level * rows + row) * 256 + bins,
        count,
        mask=(bins < 256) & (count > 0),
        sem="relaxed",
    )


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "k"])
def count_kernel(scores, histograms, counts, n, rows, programs, chunk, k, TILE: tl.constexpr):
    """How many entries of one program's part are better than the k-th, and how many tie with it;
    counts (2, rows, programs)."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    kth, _ = threshold(histograms, row, rows, 4, k)
    better = tl.zeros((TILE,), tl.int32)
    ties = tl.zeros((TILE,), tl.int32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        rank = ranks_of(tl.load(scores + row * n + at, mask=at < end, other=0.0))
        better += ((at < end) & (rank < kth)).to(tl.int32)
        ties += ((at < end) & (rank == kth)).to(tl.int32)
    tl.store(counts + row * programs + program, tl.sum(better, 0))
    tl.store(counts + (rows + row) * programs + program, tl.sum(ties, 0))


@triton.jit
def sum_before(counts, program, GATHER: tl.constexpr):
    """Sum of the counts of the programs before this one."""
    total = tl.zeros((GATHER,), tl.int32)
    for first in range(0, program, GATHER):
        other = first + tl.arange(0, GATHER)
        total += tl.load(counts + other, mask=other < program, other=0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "k"])
def take_kernel(
    scores,
    histograms,
    counts,
    taken,
    n,
    rows,
    programs,
    chunk,
    k,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Write the k taken entries: first the better ones, then the ties of lowest index; taken (rows,
    k)."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    kth, num_ties = threshold(histograms, row, rows, 4, k)
    num_better = sum_before(counts + row * programs, program, GATHER)
    tie_place = k - num_ties + sum_before(counts + (rows + row) * programs, program, GATHER)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        rank = ranks_of(tl.load(scores + row * n + at, mask=at < end, other=0.0))
        better = ((at < end) & (rank < kth)).to(tl.int32)
        tie = ((at < end) & (rank == kth)).to(tl.int32)
        place = (
            tl.where(better > 0, num_better + tl.cumsum(better, 0), tie_place + tl.cumsum(tie, 0))
            - 1
        )
        # rank and index in one number: its order is the total order
        entry = ((rank - (1 << 31)) << 32) + at
        tl.store(taken + row * k + place, entry, mask=(better > 0) | ((tie > 0) & (place < k)))
        num_better += tl.sum(better, 0)
        tie_place += tl.sum(tie, 0)


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices as :func:`.eager.top_indices`, for float32 scores."""
    *shape, n = scores.shape
    scores = scores.reshape(-1, n).contiguous()

    # a row is cut into chunks, one a program
    rows, chunk = scores.shape[0], CHUNK * triton.cdiv(n, CHUNK * MOST_PROGRAMS)
    programs = triton.cdiv(n, chunk)
    histograms = torch.zeros(4, rows, 256, dtype=torch.int32, device=scores.device)
    counts = torch.empty(2, rows, programs, dtype=torch.int32, device=scores.device)
    taken = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    grid, sizes = (rows * programs,), (n, rows, programs, chunk, k)

    # the k-th largest, a byte a launch
    for level in range(4):
        backend.launch(
            histogram_kernel, grid, scores, histograms, *sizes, level, TILE=1024, num_warps=4
        )

    # what each chunk takes, and where it writes it
    backend.launch(count_kernel, grid, scores, histograms, counts, *sizes, TILE=1024, num_warps=4)
    backend.launch(
        take_kernel,
        grid,
        scores,
        histograms,
        counts,
        taken,
        *sizes,
        TILE=1024,
        GATHER=256,
        num_warps=4,
    )

    # entries are (rank, place): best first, then the place alone
    return taken.sort(dim=-1).values.bitwise_and_(0xFFFFFFFF).reshape(*shape, k)
