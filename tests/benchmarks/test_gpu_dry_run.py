"""benchmarks/gpu on tensors without values: every step gets as far as its launches on a chip that
is not here.

Fake CUDA tensors take the path of a GPU. Autograd cannot run on a device that is absent, so the
backward passes run on fake CPU tensors, for which the kernels are asked for.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, correctness, every_operator, measure, routing
from colt5_vision.ops import backend
from tests.support.gpu_steps import CpuTimer, failures, run
from tests.support.offline import recorded

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="launches are kept, not made")

# kernels of each step, forward and backward; a step that launches none of ours
_ATTENTION = "forward_kernel", "backward_query_kernel"
_GATES = "gates_kernel", "gradient_kernel"
LAUNCHED = {
    "opcheck": (*_ATTENTION, *_GATES),
    "attention": _ATTENTION,
    "layer": (*_ATTENTION, *_GATES),
    "gates": _GATES,
    "graphs": (*_ATTENTION, *_GATES),
    "selection": ("take_kernel", None),
    "router": ("router_logits_kernel", "router_logits_backward_kernel"),
    "flex": _ATTENTION,
}
# a subprocess, a compiler's own fake tensors, peers alone, the operators of opcheck again
ELSEWHERE = {"tests", "compiled", "ceilings", "sanitizer", "sweep"}


class Launching(TorchDispatchMode):
    """Operators of ours do what they do on a GPU; fake tensors would ask for shapes alone."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "colt5_vision":
            return OPDEFS[op.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


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
            for module in (attention, correctness, every_operator, routing):
                replace_in(module, "kernels", lambda _: "triton")
        replace_in(torch, "equal", lambda a, b: a.shape == b.shape)
        replace_in(torch.library, "opcheck", lambda *args, **how: {})
        replace_in(attention, "pairs", lambda *_: dict.fromkeys(("full", "window", "union"), 1))
        for module in (measure, correctness):
            replace_in(module, "relative_error", lambda a, b: 0.0)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Launching())
        yield launches


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("step", LAUNCHED)
def test_a_step_gets_as_far_as_its_launches(step, kind):
    sizes = replace(measure.FULL, compile_backend="eager")
    with absent_gpu(kind) as launches:
        records = run([step], CpuTimer(torch.device(kind, 0), 0.0, most=1), sizes)
    assert records and not failures(records)
    forward, backward = LAUNCHED[step][0], LAUNCHED[step][1]
    names = {one.name for one in launches}
    assert forward in names
    assert kind == "cuda" or backward in (*names, None)


def test_every_step_is_tried_here_or_elsewhere():
    assert set(LAUNCHED) | ELSEWHERE == set(command.STEPS)
