"""Soft top-k of a row of tens of thousands in three launches; and what the kernels of all lengths
share.

:func:`sort_kernel` sorts each chunk of a row and cuts it into groups. The last score of each group
is a *splitter*. :func:`splitter_kernel` finds mass and count at every splitter, as ``triton.py``
defines them; a sorted chunk gives its part of them from one sum of all lower groups and the scores
of one group. What is looked for lies between two neighbouring splitters, and so in one group of
each chunk. :func:`sorted_gates_kernel` has these few scores in registers, and halves the bracket
there.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32


@triton.jit
def score_of(key):
    """The float32 at a place in the order of floats, from the lowest finite one to inf: differences
    are free of NaN."""
    key = tl.minimum(tl.maximum(key, -0x7F7FFFFF), 0x7F800000)
    magnitude = tl.abs(key).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -magnitude, magnitude)


@triton.jit
def key_of(score):
    """The place of a float32 in the order of floats, as int64."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.int64)
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def room(k, count):
    """k - count; float64 keeps the count exact, and so the difference."""
    return (k.to(tl.float64) - count.to(tl.float64)).to(tl.float32)


@triton.jit
def store_gates(scores, gates, begin, end, v, mass, k_left, full, scale, TILE: tl.constexpr):
    """Gates of the entries [begin, end) of a row, from the mass at ``v`` and what of k is left for
    it; all 1 where ``full``."""
    # v is the root up to one step of a float: what is left of it, and the rounding of the
    # comparisons, is put right here
    rest = tl.log2(mass / k_left)
    known = (rest == rest).to(tl.int32)  # noqa: PLR0124  a NaN among the scores makes all gates NaN, as in plain torch
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        s = tl.load(scores + at, mask=at < end)
        exponent = (s - v) * scale - rest
        capped = full + ((s > v) | (exponent > 0)).to(tl.int32) * known
        gate = tl.where(capped > 0, 1.0, tl.exp2(exponent))
        tl.store(gates + at, gate, mask=at < end)


@triton.jit(do_not_specialize=["n", "programs"])
def sort_kernel(
    scores,  # (rows, n)
    ordered,  # (rows, programs, CHUNK), out: rising; inf beyond the row
    masses,  # (rows, programs, groups), out: of each group and all lower ones, at its last score
    n,
    programs,
    scale,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sort one chunk of a row, and sum up its exponentials group by group."""
    pid = tl.program_id(0).to(tl.int64)
    at = (pid % programs) * CHUNK + tl.arange(0, CHUNK)
    s = tl.load(scores + pid // programs * n + at, mask=at < n, other=0.0)
    spoilt = tl.max((s != s).to(tl.int32), 0)  # noqa: PLR0124
    s = tl.minimum(tl.maximum(s, -LARGEST), LARGEST)
    s = tl.sort(tl.where(at < n, s, float("inf")))
    tl.store(ordered + pid * CHUNK + tl.arange(0, CHUNK), s)

    # each group at its last score
    count: tl.constexpr = CHUNK // GROUP
    group = tl.arange(0, count)
    s = tl.reshape(s, (count, GROUP))
    last = tl.minimum(tl.max(s, 1), LARGEST)
    mass = tl.where(s < float("inf"), tl.exp2((s - last[:, None]) * scale), 0.0)
    mass = tl.sum(mass, 1)

    # with all lower ones
    mass = mass[None, :] * tl.exp2((last[None, :] - last[:, None]) * scale)
    mass = tl.sum(tl.where(group[None, :] <= group[:, None], mass, 0.0), 1)
    tl.store(masses + pid * count + group, tl.where(spoilt > 0, float("nan"), mass))


@triton.jit(do_not_specialize=["programs"])
def splitter_kernel(
    ordered,
    masses,
    splitter_mass,  # (rows, programs, groups), out
    splitter_below,  # out: how many scores are not above it
    programs,
    scale,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITTERS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Mass and count at a few splitters of a chunk, from all chunks of the row, several at once."""
    count: tl.constexpr = CHUNK // GROUP
    group, inner = tl.arange(0, count), tl.arange(0, GROUP)
    pair = tl.arange(0, SPLITTERS * CHUNKS)
    first_splitter = tl.program_id(0).to(tl.int64) * SPLITTERS
    row = first_splitter // count // programs

    # the splitters, one for each pair with a chunk
    v = tl.load(ordered + (first_splitter + pair // CHUNKS + 1) * GROUP - 1)
    v = tl.minimum(v, LARGEST)
    mass = tl.zeros((SPLITTERS * CHUNKS,), tl.float32)
    below = tl.zeros((SPLITTERS * CHUNKS,), tl.int32)
    for first in range(0, programs, CHUNKS):
        chunk = first + pair % CHUNKS
        inside = chunk < programs
        chunk += row * programs
        here = ordered + chunk * CHUNK

        # the group that it cuts
        last = here[:, None] + ((group + 1) * GROUP - 1)[None, :]
        last = tl.load(last, mask=inside[:, None], other=float("inf"))
        cut = tl.sum((last <= v[:, None]).to(tl.int32), 1)
        s = here[:, None] + cut[:, None] * GROUP + inner[None, :]
        s = tl.load(s, mask=(inside & (cut < count))[:, None], other=float("inf"))
        taken = s <= v[:, None]
        mass += tl.sum(tl.where(taken, tl.exp2((s - v[:, None]) * scale), 0.0), 1)
        below += cut * GROUP + tl.sum(taken.to(tl.int32), 1)

        # and the lower ones; what is not finite shows in every splitter
        lower = tl.maximum(cut - 1, 0)
        last = tl.load(here + (lower + 1) * GROUP - 1, mask=inside, other=0.0)
        factor = tl.where(cut > 0, tl.exp2((last - v) * scale), 0.0)
        mass += factor * tl.load(masses + chunk * count + lower, mask=inside, other=0.0)

    # over all chunks
    at = first_splitter + tl.arange(0, SPLITTERS)
    tl.store(splitter_mass + at, tl.sum(tl.reshape(mass, (SPLITTERS, CHUNKS)), 1))
    tl.store(splitter_below + at, tl.sum(tl.reshape(below, (SPLITTERS, CHUNKS)), 1))


@triton.jit(do_not_specialize=["n", "programs"])
def sorted_gates_kernel(
    scores,  # (rows, n)
    k,  # (rows, 1)
    num_valid,  # (rows, 1)
    ordered,
    splitter_mass,
    splitter_below,
    gates,  # (rows, n), out
    n,
    programs,
    scale,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Gates of one chunk; every program of a row looks for the same number."""
    count: tl.constexpr = CHUNK // GROUP
    group, inner = tl.arange(0, count), tl.arange(0, GROUP)
    row = (tl.program_id(0) // programs).to(tl.int64)
    row_k = tl.load(k + row)
    chunk, inside = tl.arange(0, CHUNKS), tl.arange(0, CHUNKS) < programs
    splitter = (row * programs + chunk)[:, None] * count + group[None, :]
    last = tl.load(ordered + (splitter + 1) * GROUP - 1, mask=inside[:, None], other=float("inf"))
    mass = tl.load(splitter_mass + splitter, mask=inside[:, None], other=0.0)
    below = tl.load(splitter_below + splitter, mask=inside[:, None], other=0)

    # the two splitters around it: mass and count at the lower one
    passes = (last < float("inf")) & (mass >= room(row_k, n - below))
    low = tl.max(tl.max(tl.where(passes, last, float("-inf")), 1), 0)
    high = tl.min(tl.min(tl.where(last > low, last, float("inf")), 1), 0)
    found = passes & (last == low)
    low_mass = tl.max(tl.max(tl.where(found, mass, 0.0), 1), 0)
    low_mass += tl.sum(tl.sum(mass * 0.0, 1), 0)  # NaN, if one is among the scores
    low_below = tl.max(tl.max(tl.where(found, below, 0), 1), 0)

    # the scores between them
    cut = tl.sum((last <= low).to(tl.int32), 1)
    s = ((row * programs + chunk) * count + cut)[:, None] * GROUP + inner[None, :]
    s = tl.load(ordered + s, mask=(inside & (cut < count))[:, None], other=float("inf"))
    between = (s > low) & (s < high)

    # halve the bracket until no float lies within
    begin, end = key_of(low), key_of(high)
    while end - begin > 1:
        middle = begin + (end - begin) // 2
        v = score_of(middle)
        taken = between & (s <= v)
        here = tl.sum(tl.sum(tl.where(taken, tl.exp2((s - v) * scale), 0.0), 1), 0)
        here += low_mass * tl.exp2((low - v) * scale)
        lower = low_below + tl.sum(tl.sum(taken.to(tl.int32), 1), 0)
        good = here >= room(row_k, n - lower)
        begin, end = tl.where(good, middle, begin), tl.where(good, end, middle)

    # the gates
    v = score_of(begin)
    taken = between & (s <= v)
    here = tl.sum(tl.sum(tl.where(taken, tl.exp2((s - v) * scale), 0.0), 1), 0)
    here += low_mass * tl.exp2((low - v) * scale)
    lower = low_below + tl.sum(tl.sum(taken.to(tl.int32), 1), 0)
    full = (row_k >= tl.load(num_valid + row)).to(tl.int32)  # the interpreter broadcasts no bool
    first = (tl.program_id(0) % programs) * CHUNK
    store_gates(
        scores + row * n, gates + row * n, first, tl.minimum(first + CHUNK, n), v, here,
        room(row_k, n - lower), full, scale, CHUNK,
    )  # fmt: skip
