"""Are the kernels right on this GPU: their tests, registration, memory, CUDA graphs and
``torch.compile``."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from colt5_vision.ops import soft_topk

from . import every_operator
from .attention import inputs, ours, routed_layer
from .measure import (
    Sizes,
    Timer,
    attempt,
    both,
    check,
    forward_backward,
    kernels,
    on,
    reason,
    relative_error,
    using,
)

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = Path("tests/kernels")
NAMESPACE = "colt5_vision"
SANITIZER = "compute-sanitizer"
_ERRORS = 86  # the status that the sanitizer is told to end with if it finds any


def tests(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """The kernel tests; on a GPU they run there, not interpreted."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        yield check("kernel tests", None, f"{' and '.join(missing)} not installed")
        return

    # run them
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(KERNEL_TESTS), f"--junitxml={report}"]
        workers = min(8, (os.cpu_count() or 1) // 2)
        if importlib.util.find_spec("xdist") and workers > 1:
            command += [
                "-n",
                str(workers),
            ]  # compiling the kernels takes the time, and that is the CPU's
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.is_file():
            yield check("kernel tests", False, f"pytest ended with status {status} and no report")
            return
        suites = list(ElementTree.parse(report).iter("testsuite"))

    # count them
    count = {
        key: sum(int(s.get(key)) for s in suites)
        for key in ("tests", "failures", "errors", "skipped")
    }
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    detail = ", ".join(
        f"{n} {what}" for what, n in {"passed": passed, **count}.items() if what != "tests"
    )
    yield check("kernel tests", status == 0 and passed > 0, f"{detail}; pytest's status {status}")


class _Calls(TorchDispatchMode):
    """Keeps one call of each registered operator and pattern of arguments."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == NAMESPACE:
            # which arguments there are, and of what kind, is what takes another path
            pattern = tuple(x.dtype if isinstance(x, torch.Tensor) else type(x) for x in args)
            if (op, pattern) not in self.kept:
                self.kept[op, pattern] = _fresh(op, args), dict(kwargs or {})
        return op(*args, **(kwargs or {}))


def _fresh(op, args) -> tuple:
    """Copies that require a gradient where one can be had: a backward is not differentiated again
    by its operator, and autograd refuses to write into a leaf."""
    fresh = []
    for x, argument in zip(args, op._schema.arguments, strict=False):
        if isinstance(x, torch.Tensor):
            written = argument.alias_info is not None and argument.alias_info.is_write
            wanted = x.requires_grad and not written and not op.name().endswith("_backward")
            x = x.detach().clone().requires_grad_(wanted)  # keeps the strides
        fresh.append(x)
    return tuple(fresh)


def opcheck(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """``torch.library.opcheck`` with arguments that the public functions really pass."""
    calls = _Calls()
    with using(kernels(device)):
        for name, call in every_operator.cases(device, sizes.dtype).items():
            with calls:
                _, why = attempt(lambda call=call: (call(), timer.synchronize()))
            if why is not None:
                yield check(f"{name}, forward and backward", False, why)

        # what torch asks of an operator
        for (op, _), (args, kwargs) in calls.kept.items():
            found = torch.library.opcheck(
                op, args, kwargs, raise_exception=False, rtol=1e-2, atol=1e-2
            )
            wrong = [
                f"{test}: {reason(e)}" for test, e in found.items() if isinstance(e, Exception)
            ]
            shapes = ", ".join(str(tuple(x.shape)) for x in args if isinstance(x, torch.Tensor))
            detail = "; ".join(wrong) or f"{', '.join(found)} on {shapes}"
            yield check(f"opcheck {op}", not wrong, detail)

    # none may be forgotten
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")
    }
    missed = sorted(registered - {op.name() for op, _ in calls.kept})
    if missed:
        yield check(
            "opcheck of the others",
            None,
            f"not called by benchmarks/gpu/every_operator.py: {missed}",
        )


def _sanitizer() -> str | None:
    found = shutil.which(SANITIZER)
    places = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        *sorted(Path("/usr/local").glob("cuda*")),
    ]
    for place in filter(None, places):
        for path in (Path(place) / "bin" / SANITIZER, Path(place) / SANITIZER / SANITIZER):
            found = found or (str(path) if path.is_file() else None)
    return found


def sanitizer(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """Out-of-bounds and misaligned accesses of every operator."""
    name, tool = f"{SANITIZER} memcheck", _sanitizer()
    if tool is None:
        yield check(name, None, "not present")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(_ERRORS), sys.executable, "-m"]
    # torch's cache would hide an access beyond a tensor inside a larger block
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, every_operator.__name__],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    yield sanitizer_verdict(name, done.returncode, done.stdout)


def sanitizer_verdict(name: str, status: int, output: str) -> dict:
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    ran = len(re.findall(r": ran$", output, re.MULTILINE))
    last = (output.strip().splitlines() or ["no output"])[-1].strip()
    if re.search(
        "(?i)device not supported|unable to find injection library|unsupported gpu", output
    ):
        return check(name, None, f"present, but cannot run on this machine: {last}")
    if status == 0 and set(summary) == {"0"}:
        return check(name, True, f"0 errors in {ran} calls, forward and backward")
    print(output[-4000:])
    return check(name, False, f"{sum(map(int, summary))} errors, status {status}: {last}")


def _replayed(call: Callable, static: list[torch.Tensor], timer: Timer) -> float:
    """Error of a replay after the values of the ``static`` inputs have changed."""
    replay, written = timer.capture(call)
    for tensor in static:
        tensor.copy_(torch.randn_like(tensor))
    replay()
    timer.synchronize()
    return relative_error(written, call())


def graphs(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """Captured once, replayed on other values, against the same call made anew."""
    mine, size = kernels(device), sizes.graph
    x, grad, routed = inputs(size, device, sizes.dtype)
    scores, grad_scores = (torch.randn(2, size.tokens, device=device) for _ in range(2))
    layer = routed_layer(size, "softmax", device, sizes.dtype)
    image = torch.randn(
        size.batch, size.side, size.side, layer.dim, device=device, dtype=sizes.dtype
    )
    parameters = tuple(layer.parameters())
    cases = {
        "routed_window_attention": (ours(size, routed), x, grad, ()),
        "soft_topk": (lambda s: soft_topk(s, size.tokens // size.share), [scores], grad_scores, ()),
        "ConditionalRoutedImageAttention": (layer, [image], torch.randn_like(image), parameters),
    }
    for name, (function, static, gradient, others) in cases.items():
        for what, call in both(function, static, gradient, others, mine).items():
            label = f"CUDA graph of {name}, {what}"
            error, why = attempt(lambda call=call, static=static: _replayed(call, static, timer))
            yield check(
                label,
                why is None and error <= 1e-2,
                why or f"relative error to a plain call {error:.1e}",
            )


def compiled(device: torch.device, sizes: Sizes, timer: Timer) -> Iterator[dict]:
    """One graph for every image size."""
    counter = CompileCounterWithBackend(sizes.compile_backend)
    torch.compiler.reset()
    torch.manual_seed(0)

    # gradients of the compiled layer against the layer's, at all sizes
    name = "torch.compile(fullgraph, dynamic) of ConditionalRoutedImageAttention"

    def compare() -> tuple[float, int]:
        layer = routed_layer(sizes.graph, "softmax", device, sizes.dtype)
        fast, worst = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter), 0.0
        counts = []
        for height, width in sizes.compiled:
            shape = (1, height, width, layer.dim)
            image, grad = (torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
            parameters = tuple(layer.parameters())
            found, expected = (
                forward_backward(f, [image], grad, parameters)() for f in (fast, layer)
            )
            worst = max(worst, relative_error(found, expected))
            # a first compilation may start anew, so that it counts twice
            counts.append(counter.frame_count)
        return worst, counts[-1] - counts[0]

    # what came of it
    result, why = attempt(on(kernels(device), compare))
    if why is not None:
        yield check(name, False, why)
        return
    worst, again = result
    detail = (
        f"{len(sizes.compiled)} image sizes, {again} recompilations, relative error of the "
        f"gradients {worst:.1e}"
    )
    yield check(name, again == 0 and worst <= 3e-2, detail)
