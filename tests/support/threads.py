"""A thread that traces a model while another one works."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

# one thread for all: on a machine without a GPU, torch 2.11 crashes where a second one traces
_OTHER = ThreadPoolExecutor(1)


class _Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.leave = threading.Event(), threading.Event()

    def forward(self, x):
        self.inside.set()
        self.leave.wait(120)
        return x + 1


@contextlib.contextmanager
def another_thread_traces():
    """torch.export is at work in another thread for as long as the code inside runs.

    ``torch.compiler.is_compiling()`` is true then, for all threads; from torch 2.14 on also while
    torch.compile works.
    """
    slow = _Slow()
    tracing = _OTHER.submit(torch.export.export, slow, (torch.ones(2),), strict=False)
    try:
        assert slow.inside.wait(60) and torch.compiler.is_compiling()
        yield
        assert torch.compiler.is_compiling()
    finally:
        slow.leave.set()
        tracing.result()
