"""Coordinate descent in Triton kernels: the scalars a_t of ``eager.py``, with no answer read by
the host.

An iteration is one sum over the row. A row of several programs takes one launch an iteration: each
program stores its part of the sum, and the launch that follows adds up the parts in every program,
in one order. A short row runs all its iterations in one launch.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..registration import laid_out_as
from .triton import gathered_sum, split


def schedule_tensor(schedule: list[float], device: torch.device) -> Tensor:
    """The schedule as a tensor, filled on the device run by run: a copy from the host would stop a
    CUDA graph."""
    out, begin = torch.empty(len(schedule), device=device), 0
    for eps, run in itertools.groupby(schedule):
        end = begin + sum(1 for _ in run)
        out[begin:end].fill_(eps)
        begin = end
    return out


@triton.jit
def lower_of(s, bound):
    """min(s, bound) that hands on a NaN of ``s``."""
    return tl.where(s > bound, bound, s)


@triton.jit
def bounded_sum(scores, begin, end, a, highest, eps, TILE: tl.constexpr):
    """Sum of exp((min(s, -a) - min(highest, -a)) / eps) over the entries [begin, end) of a row."""
    base = lower_of(highest, -a)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        s = tl.load(scores + at, mask=at < end, other=float("-inf"))
        total += tl.exp((lower_of(s, -a) - base) / eps)
    return tl.sum(total, 0)


@triton.jit
def iterate(
    k, num_valid, highest, iterates, sums, schedule, row, rows, programs, step, steps,
    GATHER: tl.constexpr
):  # fmt: skip
    """a of iteration ``step`` (from 0): the first in closed form, the others from the sums of the
    launch before."""
    log_k, eps = tl.log(tl.load(k + row)), tl.load(schedule + step)
    if step == 0:
        a = eps * (log_k - tl.log(tl.maximum(tl.load(num_valid + row), 1).to(tl.float32)))
    else:
        total = gathered_sum(sums, (step & 1) * rows + row, programs, GATHER)
        before = tl.load(iterates + row * steps + step - 1)
        a = eps * (log_k - tl.log(total)) - lower_of(tl.load(highest + row), -before)
    return a


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "step", "steps"])
def descend_kernel(
    scores,  # (rows, n)
    k,  # (rows, 1)
    num_valid,
    highest,  # (rows, 1): the largest score
    iterates,  # (rows, steps), out
    sums,  # (2, rows, programs), the halves in turn
    schedule,  # (steps + 1,)
    n,
    rows,
    programs,
    chunk,
    step,
    steps,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Finish iteration ``step`` and sum for the next. WHOLE: all iterations but the last, of a
    whole row."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    scores += row * n
    a = iterate(
        k, num_valid, highest, iterates, sums, schedule, row, rows, programs, step, steps, GATHER
    )
    if program == 0:
        tl.store(iterates + row * steps + step, a)
    top = tl.load(highest + row)
    last = step + 1
    if WHOLE:
        last = steps - 1
        log_k = tl.log(tl.load(k + row))
        for following in range(step + 1, last):
            eps = tl.load(schedule + following)
            total = bounded_sum(scores, begin, end, a, top, eps, TILE)
            a = eps * (log_k - tl.log(total)) - lower_of(top, -a)
            tl.store(iterates + row * steps + following, a)
    total = bounded_sum(scores, begin, end, a, top, tl.load(schedule + last), TILE)
    tl.store(sums + ((last & 1) * rows + row) * programs + program, total)


@triton.jit(do_not_specialize=["n", "rows", "programs", "chunk", "steps"])
def descent_gates_kernel(
    scores,
    k,
    num_valid,
    highest,
    iterates,
    sums,
    schedule,
    gates,  # (rows, n), out
    n,
    rows,
    programs,
    chunk,
    steps,
    TILE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Finish the last iteration, and read the gates off."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    begin = program * chunk
    end = tl.minimum(begin + chunk, n)
    a = iterate(
        k,
        num_valid,
        highest,
        iterates,
        sums,
        schedule,
        row,
        rows,
        programs,
        steps - 1,
        steps,
        GATHER,
    )
    if program == 0:
        tl.store(iterates + row * steps + steps - 1, a)
    eps = tl.load(schedule + steps)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        s = tl.load(scores + row * n + at, mask=at < end)
        tl.store(gates + row * n + at, tl.exp(lower_of(s + a, 0.0) / eps), mask=at < end)


@triton.jit
def direct_gradient(grad, gate, s, a, eps):
    """What reaches an entry straight from its gate."""
    return grad * tl.where(s + a <= 0, gate, 0.0) / eps


@triton.jit(do_not_specialize=["n", "programs", "chunk", "steps"])
def descent_sums_kernel(
    grad,
    scores,
    gates,
    iterates,
    schedule,
    sums,  # (rows, programs), out: of the direct gradient
    above,  # (rows, programs, steps), out: how many scores lie above each -a_t
    n,
    programs,
    chunk,
    steps,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * chunk
    end = tl.minimum(begin + chunk, n)
    a, eps = tl.load(iterates + row * steps + steps - 1), tl.load(schedule + steps)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < end
        g = tl.load(grad + row * n + at, mask=inside, other=0.0)
        s = tl.load(scores + row * n + at, mask=inside, other=float("-inf"))
        total += direct_gradient(
            g, tl.load(gates + row * n + at, mask=inside, other=0.0), s, a, eps
        )
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
    for step in range(0, steps, STEPS):
        t = step + tl.arange(0, STEPS)
        bound = -tl.load(iterates + row * steps + t, mask=t < steps, other=0.0)
        count = tl.zeros((STEPS, TILE), tl.int32)
        for first in range(begin, end, TILE):
            at = first + tl.arange(0, TILE)
            s = tl.load(scores + row * n + at, mask=at < end, other=float("-inf"))
            count += (s[None, :] > bound[:, None]).to(tl.int32)
        tl.store(
            above + tl.program_id(0).to(tl.int64) * steps + t, tl.sum(count, 1), mask=t < steps
        )


@triton.jit(do_not_specialize=["programs", "steps"])
def descent_weights_kernel(
    k,
    iterates,
    schedule,
    sums,
    above,
    grad_last,  # (rows, 1), out: the gradient of the last iterate
    log_weights,  # (rows, steps), out: log of g_t / (g_T k)
    grad_k,  # (rows, 1), out
    programs,
    steps,
    STEPS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """The gradients g_t of all iterates of a row: a reverse cumulative sum of log q_t, see
    ``eager.py``."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, STEPS)
    count = tl.zeros((STEPS,), tl.int32)
    for program in range(programs):
        count += tl.load(above + (row * programs + program) * steps + t, mask=t < steps, other=0)
    last = gathered_sum(sums, row, programs, GATHER)
    row_k = tl.load(k + row)
    log_k = tl.log(row_k.to(tl.float64))
    follows = t < steps - 1
    a = tl.load(iterates + row * steps + t, mask=t < steps, other=0.0).to(tl.float64)
    following = tl.load(iterates + row * steps + t + 1, mask=follows, other=0.0).to(tl.float64)
    eps = tl.load(schedule + t + 1, mask=follows, other=1.0).to(tl.float64)
    log_q = tl.where(follows, tl.log(count.to(tl.float64)) + (following - a) / eps - log_k, 0.0)
    log_g = tl.cumsum(log_q, 0, reverse=True)
    tl.store(log_weights + row * steps + t, (log_g - log_k).to(tl.float32), mask=t < steps)
    each = tl.exp(log_g) * tl.load(schedule + t, mask=t < steps, other=0.0)
    each = tl.where(t < steps, each, 0.0)
    tl.store(grad_k + row, (tl.sum(each, 0)).to(tl.float32) * last / row_k)
    tl.store(grad_last + row, last)


@triton.jit(do_not_specialize=["n", "programs", "chunk", "steps"])
def descent_gradient_kernel(
    grad,
    scores,
    gates,
    iterates,
    schedule,
    grad_last,
    log_weights,
    grad_scores,  # (rows, n), out
    n,
    programs,
    chunk,
    steps,
    TILE: tl.constexpr,
):
    """Each score's gradient: its gate's, less what it gave to every iterate whose bound it did not
    pass."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    begin = (tl.program_id(0) % programs) * chunk
    end = tl.minimum(begin + chunk, n)
    iterates += row * steps
    last, eps_last = tl.load(grad_last + row), tl.load(schedule + steps)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        inside = at < end
        s = tl.load(scores + row * n + at, mask=inside, other=float("-inf"))
        through = tl.zeros((TILE,), tl.float32)
        before = tl.load(iterates)
        for t in range(1, steps):
            a = tl.load(iterates + t)
            exponent = (s + a) / tl.load(schedule + t) + tl.load(log_weights + row * steps + t)
            through += tl.where(s > -before, 0.0, tl.exp(exponent))
            before = a
        g = tl.load(grad + row * n + at, mask=inside)
        direct = direct_gradient(g, tl.load(gates + row * n + at, mask=inside), s, before, eps_last)
        tl.store(grad_scores + row * n + at, direct - last * through, mask=inside)


def forward(
    scores: Tensor, k: Tensor, num_valid: Tensor, schedule: list[float]
) -> tuple[Tensor, Tensor]:
    """Gates and iterates as :func:`.eager.coordinate_descent_forward`; 2 launches for a short
    row, else T."""
    (rows, n), steps = scores.shape, len(schedule) - 1
    programs, chunk = split(n)
    whole = programs == 1

    # what the programs tell one another
    scores_, highest = scores.contiguous(), scores.amax(-1, keepdim=True)
    iterates = torch.empty(rows, steps, device=scores.device)
    sums = torch.empty(2, rows, programs, device=scores.device)
    grid = (rows * programs,)
    given = (scores_, k.contiguous(), num_valid.contiguous(), highest, iterates, sums)
    given = (*given, schedule_tensor(schedule, scores.device))
    sizes = (n, rows, programs, chunk)

    # the iterates, one a launch
    for step in range(min(1, steps - 1) if whole else steps - 1):
        backend.launch(
            descend_kernel,
            grid,
            *given,
            *sizes,
            step,
            steps,
            TILE=1024,
            GATHER=256,
            WHOLE=whole,
            num_warps=8 if whole else 4,
        )

    # the last one, and its gates
    gates = torch.empty_like(scores_)
    backend.launch(
        descent_gates_kernel, grid, *given, gates, *sizes, steps, TILE=1024, GATHER=256, num_warps=4
    )
    return laid_out_as(gates, scores), iterates


def backward(
    grad: Tensor, scores: Tensor, gates: Tensor, iterates: Tensor, k: Tensor, schedule: list[float]
) -> tuple[Tensor, Tensor]:
    """Gradients as :func:`.eager.coordinate_descent_backward`, in three launches."""
    (rows, n), steps = scores.shape, iterates.shape[-1]
    programs, chunk = split(n)
    given = tuple(x.contiguous() for x in (grad, scores, gates, iterates))
    iterates, eps = given[-1], schedule_tensor(schedule, scores.device)

    # sums of each chunk
    sums = torch.empty(rows, programs, device=scores.device)
    above = torch.empty(rows, programs, steps, dtype=torch.int32, device=scores.device)
    sizes, grid = (n, programs, chunk, steps), (rows * programs,)
    backend.launch(
        descent_sums_kernel, grid, *given, eps, sums, above, *sizes, TILE=256, STEPS=16, num_warps=4
    )

    # the gradient of each iterate, back in time
    grad_last, grad_k = sums.new_empty(rows, 1), sums.new_empty(rows, 1)
    log_weights, block = torch.empty_like(iterates), triton.next_power_of_2(steps)
    outputs = (grad_last, log_weights, grad_k)
    backend.launch(
        descent_weights_kernel,
        (rows,),
        k.contiguous(),
        iterates,
        eps,
        sums,
        above,
        *outputs,
        programs,
        steps,
        STEPS=block,
        GATHER=256,
        num_warps=4 if block <= 1024 else 16,
    )

    # that of the scores
    grad_scores = torch.empty_like(given[1])
    backend.launch(
        descent_gradient_kernel,
        grid,
        *given,
        eps,
        grad_last,
        log_weights,
        grad_scores,
        *sizes,
        TILE=1024,
        num_warps=4,
    )
    return laid_out_as(grad_scores, scores), grad_k
