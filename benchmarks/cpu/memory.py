"""One call in a process of its own: the memory it adds, and a first idea of how long it takes."""

import ctypes
import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from benchmarks.gpu.measure import attempt
from support.measure import added_memory

from .cases import Case

# a server imports torch and the cases once and forks for every call. It has computed nothing, so
# that no child has memory that an earlier call freed and the allocator kept; and the kernel starts
# the peak of a child anew
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CASES = ("attention", "gates", "layers", "selection")
# the last is what torch imports with the first backward of a registered operator
_PRELOAD = [
    *(f"benchmarks.cpu.{name}" for name in ("memory", *_CASES)),
    "__main__",
    "torch._dynamo",
]
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_START_SECONDS = 60.0  # of imports and inputs, on a slow machine


def _measure(case: Case, variant: str, what: str, ready: Callable[[], None]) -> dict:
    # a freed block of 64 KiB or more goes back to the system at once: what counts is what lives,
    # not what the allocator keeps for later, which differs from process to process by as much again
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    case.tiny().makers()[variant]()[what]()  # loads libraries, starts threads
    call = case.makers()[variant]()[what]
    ready()
    start = time.perf_counter()
    added = added_memory(call)
    return {
        "peak_bytes": None if math.isnan(added) else added,
        "seconds": time.perf_counter() - start,
    }


def _child(connection: Connection, case: Case, variant: str, what: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells what becomes of an interruption
    torch.set_num_threads(threads)
    found, why = attempt(lambda: _measure(case, variant, what, lambda: connection.send("ready")))
    connection.send({"failed": why} if found is None else found)


def probe(case: Case, variant: str, what: str, threads: int, limit: float) -> dict:
    """Measure one call.

    Args:
        case, variant, what: which call.
        threads: of torch.
        limit: seconds after which the process is ended.

    Returns:
        ``peak_bytes`` (None where the system does not tell) and ``seconds`` of the call; or why
        there are none: ``too_long``, or ``failed``.
    """
    context = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(sender, case, variant, what, threads), daemon=True
    )
    process.start()
    sender.close()
    try:
        for seconds in (_START_SECONDS, limit):
            if not receiver.poll(seconds):
                return {"too_long": f"one call takes more than {seconds:.0f} s"}
            found = receiver.recv()
            if found != "ready":
                break
        return found
    except EOFError:
        process.join()
        return {"failed": f"its process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()
