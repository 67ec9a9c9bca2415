"""benchmarks/gpu on tensors without values: every step gets as far as its launches on a chip that
is not here.

Fake CUDA tensors take the path of a GPU. Autograd cannot run on a device that is absent, so the
backward passes run on fake CPU tensors, for which the kernels are asked for.
"""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, correctness, every_operator, measure, report, routing, sweep
from benchmarks.gpu.offline import recorded
from colt5_vision.ops import backend
from tests.support.gpu_steps import CpuTimer, failures, run
from tests.support.marks import further

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="launches are kept, not made")

# kernels of each step, forward and backward; None: a step launches none of ours there
_ATTENTION = "forward_kernel", "backward_query_kernel"
_GATES = "gates_kernel", "gradient_kernel"
LAUNCHED = {
    "opcheck": (*_ATTENTION, *_GATES),
    "attention": _ATTENTION,
    "layer": (*_ATTENTION, *_GATES),
    "gates": _GATES,
    "grouped": _ATTENTION,
    "graphs": (*_ATTENTION, *_GATES),
    "compiled": _ATTENTION,
    "selection": ("take_kernel", None),
    "router": ("router_logits_kernel", "router_logits_backward_kernel"),
    "ceilings": (None, None),  # what torch reaches
    "flex": _ATTENTION,
    "sanitizer": (*_ATTENTION, *_GATES),
    "sweep": _ATTENTION,
}
IN_A_PROCESS = {"tests"}  # pytest, whose tests make launches of their own
SIZES = {
    "full": replace(measure.FULL, compile_backend="eager"),
    "quick": replace(measure.QUICK, compile_backend="eager"),
}
# two graphs of flex attention take as long as all the others
RUNS = [("full", step) for step in LAUNCHED if step != "flex"] + [*further(("full", "flex"))]
RUNS += [("quick", s) for s in command.QUICK_SECONDS]


class Launching(TorchDispatchMode):
    """Operators of ours do what they do on a GPU; fake tensors would ask for shapes alone."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "colt5_vision":
            return OPDEFS[op.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls):
        return True  # a graph is made as without this mode, and runs in it


@contextlib.contextmanager
def absent_gpu(kind):
    """An H200; what reads values is replaced, and gradients on CUDA are."""
    chip = SimpleNamespace(multi_processor_count=132)
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(recorded(90))
        replace_in = lambda *what: stack.enter_context(mock.patch.object(*what))
        replace_in(torch.cuda, "get_device_properties", lambda _: chip)
        replace_in(backend, "_why_not_device", lambda _: None)
        if kind == "cuda":
            replace_in(torch.autograd, "grad", lambda out, x, *_, **__: list(map(torch.clone, x)))
        else:
            replace_in(backend, "INTERPRETED", True)
            for module in (attention, correctness, every_operator, routing, sweep):
                replace_in(module, "kernels", lambda _: "triton")
        replace_in(torch, "equal", lambda a, b: a.shape == b.shape)
        replace_in(torch.library, "opcheck", lambda *args, **how: {})
        replace_in(attention, "pairs", lambda *_: dict.fromkeys(("full", "window", "union"), 1))
        for module in (measure, correctness, sweep):
            replace_in(module, "relative_error", lambda a, b: 0.0)
        replace_in(torch.cuda, "synchronize", lambda *_: None)
        replace_in(torch.Tensor, "isfinite", lambda _: SimpleNamespace(all=lambda: True))
        replace_in(correctness, "_sanitizer", lambda: "the sanitizer")
        replace_in(correctness.subprocess, "run", partial(sanitized, kind))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Launching())
        yield launches


def sanitized(kind, argv, **how):
    """In place of the sanitizer's process: the module that it would run, in this one."""
    *sanitizer, python, flag, module = argv
    assert sanitizer == ["the sanitizer", "--tool", "memcheck", "--error-exitcode", "86"]
    assert (python, flag, module) == (sys.executable, "-m", "benchmarks.gpu.every_operator")
    assert how["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert (how["cwd"] / "benchmarks/gpu/every_operator.py").is_file()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        every_operator.main(kind)
    text = output.getvalue() + "========= ERROR SUMMARY: 0 errors\n"
    return subprocess.CompletedProcess(argv, 0, text)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(("size", "step"), RUNS)
def test_a_step_gets_as_far_as_its_launches(size, step, kind):
    with absent_gpu(kind) as launches:
        records = run([step], CpuTimer(torch.device(kind, 0), 0.0, most=1), SIZES[size])
    assert records and not failures(records)
    # rows of up to SORTED_ROW and longer ones have kernels of their own
    names = {one.name.removeprefix("sorted_") for one in launches}
    forward, backward = LAUNCHED[step][0], LAUNCHED[step][1]
    assert forward in (*names, None)
    assert kind == "cuda" or backward in (*names, None)


def test_every_step_is_tried():
    assert set(LAUNCHED) | IN_A_PROCESS == set(command.STEPS)


def test_every_operator_that_there_is_is_checked():
    """By opcheck and by the sanitizer."""
    with absent_gpu("cpu"):
        records = run(["opcheck"], CpuTimer(torch.device("cpu"), 0.0, most=1), SIZES["full"])
        (told,) = run(["sanitizer"], CpuTimer(torch.device("cpu"), 0.0, most=1), SIZES["full"])
        count = len(every_operator.cases(torch.device("cpu"), torch.bfloat16))
    assert "opcheck of the others" not in {record["name"] for record in records}
    assert told["detail"] == f"0 errors in {count} calls, forward and backward"


def test_a_sweep_launches_what_it_names():
    with absent_gpu("cpu") as launches:
        run(["sweep"], CpuTimer(torch.device("cpu"), 0.0, most=1), SIZES["full"])
    for kernel in ("forward_kernel", "backward_query_kernel", "backward_window_kernel"):
        tried = {
            (one.args["BLOCK_M"], one.args["BLOCK_N"], *map(one.options.get, sweep.KEYS[2:]))
            for one in launches
            if one.name == kernel
        }
        assert set(sweep.CANDIDATES) <= tried, kernel


def test_the_kernel_tests_start_kernels(monkeypatch):
    """The step's own command, by Triton's interpreter in place of a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(correctness, "KERNEL_TESTS", Path("tests/kernels/test_join_kernels.py"))
    monkeypatch.setattr(correctness.os, "cpu_count", lambda: 1)
    (record,) = run(["tests"], CpuTimer(torch.device("cpu"), 0.0))
    assert not failures([record])
    passed = int(record["detail"].split()[0])
    assert passed > 3


@pytest.mark.parametrize("more", [[], ["--quick"], ["--sweep"]], ids=["full", "quick", "sweep"])
def test_the_whole_command(more, tmp_path, monkeypatch):
    """Children as they would be started, one after the other; each leaves a report behind."""
    asked, ran = [], []

    def child(names, sizes, records):
        assert sizes is (measure.QUICK if "--quick" in more else measure.FULL)
        done = ({"step": name, **measure.check(name, True, "done")} for name in names)
        records.write_text("".join(json.dumps(record) + "\n" for record in done))
        ran.extend(names)

    def popen(argv, **how):
        assert argv[:3] == [sys.executable, "-m", "benchmarks.gpu"]
        assert not {"TRITON_INTERPRET", backend.VARIABLE} & set(how["env"])
        asked.append(argv[3:])
        if len(asked) > 1:  # what came before is on the disk
            (path,) = tmp_path.glob("*.json")
            assert [r["step"] for r in json.loads(path.read_text())["records"]] == ran
        assert command.main(argv[3:]) == 0
        return SimpleNamespace(wait=lambda _: 0, poll=lambda: 0)

    replace_in = monkeypatch.setattr
    replace_in(torch.cuda, "is_available", lambda: True)
    replace_in(torch.cuda, "current_device", lambda: 0)
    replace_in(report, "machine", lambda device, commit: {"device": "absent"})
    replace_in(command, "child", child)
    replace_in(command.subprocess, "Popen", popen)
    monkeypatch.setenv(backend.VARIABLE, "eager")
    assert command.main([*more, "--output", str(tmp_path)]) == 0
    wanted = {"--quick": command.QUICK_SECONDS, "--sweep": ["sweep"]}
    assert ran == list(wanted[more[0]] if more else command.FULL_SECONDS)


@pytest.mark.parametrize(("more", "most"), [([], 480), (["--quick"], 120)])
def test_steps_that_hang_end_within_the_time(more, most, tmp_path, monkeypatch):
    """Each is stopped at its own time; then what is left runs, and all ends in time."""
    now, order = [0.0], []

    def hangs(argv, records, seconds, names):
        order.extend(names)
        now[0] += seconds
        return [{"step": names[-1], **measure.check("a step", False, f"{seconds:.0f} s")}]

    replace_in = monkeypatch.setattr
    replace_in(torch.cuda, "is_available", lambda: True)
    replace_in(torch.cuda, "current_device", lambda: 0)
    replace_in(report, "machine", lambda device, commit: {"device": "absent"})
    replace_in(command, "run_child", hangs)
    replace_in(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert command.main([*more, "--output", str(tmp_path)]) == 1
    assert order == list(command.QUICK_SECONDS if more else command.FULL_SECONDS)
    assert 0.9 * most < now[0] <= most
