"""The steps of benchmarks/gpu without a GPU: what needs one is replaced."""

import time

import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import measure, report
from benchmarks.gpu.measure import Map, Sizes, Timer

CPU = torch.device("cpu")
TINY = Sizes(
    maps=(Map(8, 2, 8, batch=2, window=4),),
    gates=((2, 64),),
    selection=(64,),
    latency=64,
    graph=Map(8, 2, 8, window=4),
    compiled=((6, 7), (9, 8)),
    seconds=0.01,
    dtype=torch.float32,
    compile_backend="eager",
)


class CpuTimer(Timer):
    """In place of all that needs a GPU."""

    def _flush_buffer(self):
        return None

    def once(self, call, calls, flush):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls

    def synchronize(self):
        pass

    def peak_bytes(self, call):
        call()

    def free(self):
        pass

    def capture(self, call):
        written = call()

        def replay():
            for old, new in zip(measure.tensors(written), measure.tensors(call()), strict=True):
                if old is not None:
                    old.copy_(new)

        return replay, written


def run(names, timer, sizes=TINY):
    """Records of these steps on the timer's device."""
    records = []
    command.run_steps(names, timer.device, sizes, timer, records.append)
    return records


def failures(records):
    return [report.line(record) for record in records if record["failed"]]
