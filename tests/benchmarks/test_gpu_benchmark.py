"""benchmarks/gpu on the CPU: every step at tiny sizes, with what needs a GPU replaced. No figure
here is a measurement."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, every_operator, measure, report, sweep
from benchmarks.gpu.attention import (
    flex_raster,
    flex_windows,
    from_windows,
    inputs,
    ours,
    pairs,
    partitioned,
    to_windows,
)
from colt5_vision import ops
from colt5_vision.ops import backend
from tests.support.gpu_steps import CPU, TINY, CpuTimer, failures, run


@pytest.fixture
def timer():
    return CpuTimer(CPU, TINY.seconds, most=3)


def test_timed_steps_make_rows_targets_and_files(timer, tmp_path):
    steps = ["selection", "router", "attention", "grouped", "ceilings", "layer", "gates"]
    records = run(steps, timer)
    assert not failures(records)
    timed = [r for r in records if r["kind"] == "timing"]
    for record in timed:
        if record["reason"] is None and record["peer"]:
            assert 0 < record["ratio"] < math.inf
            assert (
                record["ours_timing"]["q1_ms"]
                <= record["ours_timing"]["median_ms"]
                <= record["ours_timing"]["q3_ms"]
            )
            assert len(record["ours_timing"]["raw_ms"]) == record["ours_timing"]["repeats"] == 3
    # cuDNN's attention is not on a CPU: a row with the reason, and no failure of ours
    broken = [r for r in timed if r["peer"] == "full, SDPA cuDNN"]
    assert broken
    assert all(
        r["reason"].startswith("full, SDPA cuDNN: RuntimeError: ") and r["ratio"] is None
        for r in broken
    )

    targets = report.targets(records, TINY)
    assert len(targets) == 12
    assert all(
        math.isfinite(target["measured"]) and target["met"] in (True, False) for target in targets
    )
    found = {
        "machine": {"device": "No GPU: a test"},
        "command": "a test",
        "seconds": 1.0,
        "suffix": "",
        "targets": targets,
        "records": records,
    }
    as_json, as_markdown = report.write(found, tmp_path / "results")
    assert as_json.name == "gpu_no_gpu_a_test.json"
    assert json.loads(as_json.read_text())["records"] == records
    text = as_markdown.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(records) + len(targets) + 2 + len(
        {r["step"] for r in timed}
    )  # and the headers
    assert all(target["name"] in text for target in targets)


def test_targets_come_from_the_records():
    size = TINY.maps[0]
    layer = {
        "name": f"whole layer, {size}",
        "ours": "layer, fusion softmax",
        "peer": "dense layer, SDPA flash",
    }

    def targets(ours_ms, ratio):
        found = {
            layer["ours"]: measure.Timing([ours_ms]),
            layer["peer"]: measure.Timing([ours_ms * ratio]),
        }
        records = [
            measure.row(layer["name"], what, found, layer["ours"], layer["peer"])
            for what in measure.PASSES
        ]
        return {t["name"]: t for t in report.targets(records, TINY)}

    forward = "layer, fusion softmax, forward"
    training = "layer, fusion softmax, forward + backward, to the dense layer"
    good, bad = targets(7.9, 6.5), targets(8.1, 5.5)
    assert (good[forward]["met"], good[training]["met"]) == (True, True)
    assert (bad[forward]["met"], bad[training]["met"]) == (False, False)
    assert bad[forward]["measured"] == 8.1
    assert good["layer, fusion sum, forward"]["met"] is None  # not measured
    # one twentieth of the layer is what routing may take
    found = {"routing alone": measure.Timing([1.0]), "layer": measure.Timing([19.0])}
    records = [measure.row("routing", "forward", found, "routing alone", "layer")]
    share = {t["name"]: t for t in report.targets(records, TINY)}[
        "routing's share of the layer, forward"
    ]
    assert share["met"] is False
    assert share["measured"] == pytest.approx(100 / 19)


def test_correctness_steps(timer):
    records = run(["graphs", "compiled", "opcheck"], timer)
    assert not failures(records)
    assert sum(r["name"].startswith("CUDA graph") for r in records) == 6
    assert "0 recompilations" in next(r["detail"] for r in records if r["step"] == "compiled")


def test_opcheck_takes_what_really_comes(timer, monkeypatch):
    def operator(name, announced):
        def double(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return 2 * x

        made = torch.library.custom_op(f"gpu_benchmark_test::{name}", double, mutates_args=())
        made.register_fake(lambda x, mask: x.new_empty(announced(x)))
        made.register_autograd(lambda ctx, grad: (2 * grad, None))
        return made

    good, wrong = operator("good", lambda x: x.shape), operator("wrong", lambda x: (1,))
    operator("idle", lambda x: x.shape)
    x = torch.randn(3, requires_grad=True)
    calls = {
        "good": lambda: good(x * 1, None),
        "wrong": lambda: wrong(x * 1, None),
        "raises": lambda: good(1, None),
    }
    monkeypatch.setattr(correctness, "NAMESPACE", "gpu_benchmark_test")
    monkeypatch.setattr(every_operator, "cases", lambda device, dtype: calls)
    records = {r["name"]: r for r in run(["opcheck"], timer)}
    assert {name: r["verdict"] for name, r in records.items()} == {
        "raises, forward and backward": "failed",
        "opcheck gpu_benchmark_test.good.default": "passed",
        "opcheck gpu_benchmark_test.wrong.default": "failed",
        "opcheck of the others": "not run",
    }
    assert "idle" in records["opcheck of the others"]["detail"]
    with correctness._Calls() as seen:
        good(x * 1, None)
    ((args, _),) = seen.kept.values()
    assert args[0].requires_grad


def test_a_graph_that_forgets_its_inputs_fails(timer, monkeypatch):
    def stale(call):
        return (lambda: None), call()

    monkeypatch.setattr(timer, "capture", stale)
    records = run(["graphs"], timer)
    assert {r["verdict"] for r in records} == {"failed"}


def test_flex(timer):
    records = run(["flex"], timer)
    assert not failures(records)
    # both orders give what ours gives; there is no backward on the CPU, which becomes a reason
    same = [r for r in records if r["name"].endswith("gives the same")]
    assert [r["verdict"] for r in same] == ["passed"] * 2
    rows = [r for r in records if r["kind"] == "timing" and r["peer"]]
    assert [(r["what"], r["ratio"] is not None) for r in rows if r["reason"] is None] == [
        ("forward", True)
    ] * 2
    assert all("backward" in r["reason"] for r in rows if r["what"] != "forward")


def test_masks_and_pairs_agree_with_the_definition():
    size = TINY.maps[0]
    x, _, routed = inputs(size, CPU, torch.float64)
    token = torch.arange(size.tokens)
    window = token // size.side // size.window * 2 + token % size.side // size.window
    allowed = (window[:, None] == window).expand(size.batch, -1, -1).clone()
    assert pairs(size, routed)["window"] == int(allowed.sum())
    dense = torch.nn.functional.scaled_dot_product_attention
    alone = dense(*x, attn_mask=allowed.unsqueeze(1))
    torch.testing.assert_close(partitioned(size)(*x), alone, rtol=1e-6, atol=1e-9)
    for sample, some in enumerate(routed):
        allowed[sample, :, some] = True
    count = pairs(size, routed)
    assert (count["union"], count["full"]) == (int(allowed.sum()), allowed.numel())
    expected = dense(*x, attn_mask=allowed.unsqueeze(1))
    torch.testing.assert_close(ours(size, routed)(*x), expected)
    assert torch.equal(from_windows(to_windows(x[0], size), size), x[0])
    for prepare in (flex_raster, flex_windows):
        make_mask, attend = prepare(size, routed, TINY)
        found = attend(make_mask())(*(t.float() for t in x))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_failing_call_of_ours_fails_the_run_and_a_peers_does_not(timer):
    def broken():
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB\nmore")

    found = timer.compare(
        {"ours": lambda: lambda: None, "peer": lambda: broken, "unprepared": broken}
    )
    record = measure.row("x", "forward", found, "ours", "peer")
    assert record["reason"] == "peer: RuntimeError: CUDA out of memory. Tried to allocate 1 TiB"
    assert (record["failed"], record["ratio"], record["peer_timing"]) == (False, None, None)
    assert record["ours_timing"]["repeats"] == 3
    assert isinstance(found["unprepared"], str)
    record = measure.row("x", "forward", found, "peer", "ours")
    assert record["failed"]
    assert "out of memory" in report.line(record)

    calls = iter(range(5))

    def later():
        if next(calls) > 3:
            raise RuntimeError("late")

    assert (
        timer.compare({"a": lambda: later, "b": lambda: lambda: None})["a"] == "RuntimeError: late"
    )


def test_a_backend_is_chosen_for_the_backward_too(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(backend.requested_backend())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(backend.requested_backend())
            return grad

    x = torch.randn(3)
    measure.both(Identity.apply, [x], x, backend="eager")["forward + backward"]()
    assert seen == ["eager", "eager"]
    assert backend.requested_backend() == "auto"


def test_errors_are_seen_by_relative_error():
    a = torch.ones(4)
    assert measure.relative_error(a, a) == 0
    assert measure.relative_error([a, None], [a, None]) == 0
    assert measure.relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert measure.relative_error(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    with pytest.raises(ValueError, match="1 results, expected 2"):
        measure.relative_error([a], [a, a])


def test_kernel_tests_need_pytest_and_say_so(timer, monkeypatch):
    monkeypatch.setattr(correctness.importlib.util, "find_spec", lambda name: None)
    (record,) = run(["tests"], timer)
    assert (record["verdict"], record["detail"]) == (
        "not run",
        "pytest and hypothesis not installed",
    )


def test_kernel_tests_are_counted(timer, tmp_path, monkeypatch):
    body = (
        "def test_good(): pass\ndef test_bad(): assert {}\nimport pytest\n@pytest.mark.skip\ndef "
        "test_no(): pass\n"
    )
    file = tmp_path / "test_some.py"
    monkeypatch.setattr(correctness, "KERNEL_TESTS", file)
    for value, verdict, detail in (
        ("1", "passed", "2 passed, 0 failures, 0 errors, 1 skipped; pytest's status 0"),
        ("0", "failed", "1 passed, 1 failures, 0 errors, 1 skipped; pytest's status 1"),
    ):
        file.write_text(body.format(value))
        (record,) = run(["tests"], timer)
        assert (record["verdict"], record["detail"]) == (verdict, detail)


def test_sanitizer_verdicts(timer, monkeypatch):
    monkeypatch.setattr(correctness, "_sanitizer", lambda: None)
    (record,) = run(["sanitizer"], timer)
    assert (record["verdict"], record["detail"], record["failed"]) == (
        "not run",
        "not present",
        False,
    )
    verdict = correctness.sanitizer_verdict
    assert (
        verdict("m", 0, "soft_topk: ran\n========= ERROR SUMMARY: 0 errors\n")["verdict"]
        == "passed"
    )
    assert verdict(
        "m", 86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n"
    )["failed"]
    assert verdict("m", 1, "Traceback\nImportError: no\n========= ERROR SUMMARY: 0 errors\n")[
        "failed"
    ]
    assert (
        verdict("m", 1, "========= Error: Device not supported. Please refer to\n")["verdict"]
        == "not run"
    )


def test_sweep_takes_the_hook(timer, monkeypatch):
    asked, sizes = [], (replace(TINY.maps[0], batch=1),)

    class Launches:
        @staticmethod
        def config(kind, head_dim, architecture):
            return {}

    monkeypatch.setattr(ops, "attention_tiles", Launches, raising=False)
    monkeypatch.setattr(sweep, "CANDIDATES", ((64, 64, 4, 2),))
    monkeypatch.setattr(
        sweep,
        "ours",
        lambda *_: lambda *x: asked.append(Launches.config("forward", 8, 90)) or x[0] + 0,
    )
    records = list(sweep.sweep(CPU, TINY, timer, sizes))
    assert [r["name"] for r in records if r["kind"] == "check"] == [
        f"best {kind}, head_dim 8" for kind in sweep.KINDS
    ]
    chosen = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    assert chosen in asked
    assert Launches.config("forward", 8, 90) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "more", [[], ["--quick"], ["--sweep"], ["--only", "layer"], ["--records", "records"]]
)
def test_without_a_gpu_nothing_is_measured_or_written(more, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([*more, "--output", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().out == "No GPU here: nothing was measured, nothing was written.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_torch_triton_einops_and_nothing_else():
    """The image of GPU machines has timm, too, and no network to install more."""
    others = "diffusers transformers torchvision matplotlib PIL colt5_attention tomesd pytest timm"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others.split()!r}))
from benchmarks.gpu.__main__ import main
sys.exit(main(["--quick"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "No GPU here" in done.stdout, done.stderr


def test_every_step_has_its_time_and_all_fit_eight_minutes():
    assert set(command.FULL_SECONDS) == set(command.STEPS) - {"sweep"}
    assert sum(command.FULL_SECONDS.values()) <= 480
    assert sum(command.QUICK_SECONDS.values()) <= 120


def test_what_matters_most_comes_first():
    """A run that is cut short has it: correctness, attention, the layer, gates."""
    assert list(command.FULL_SECONDS)[:5] == ["tests", "opcheck", "attention", "layer", "gates"]
    assert list(command.QUICK_SECONDS)[:4] == ["opcheck", "attention", "layer", "gates"]


def test_a_process_that_dies_or_hangs_leaves_its_records_and_a_failure(tmp_path):
    done, records = (
        '{"step": "layer", "kind": "check", "failed": false}',
        tmp_path / "records.jsonl",
    )
    write = (
        f"import pathlib, time, os; pathlib.Path({str(records)!r}).write_text({done!r} + chr(10)); "
    )
    for what, text in (
        ("os.kill(os.getpid(), 11)", "status -11"),
        ("time.sleep(60)", "ended after its 2 s"),
    ):
        found = command.run_child(
            [command.sys.executable, "-c", write + what], records, 2, ["layer", "gates"]
        )
        assert [r["failed"] for r in found] == [False, True]
        assert text in found[1]["detail"]
        assert found[1]["name"] == "step layer gates (nothing of gates)"
    found = command.run_child(
        [command.sys.executable, "-c", write + "pass"], records, 20, ["layer"]
    )
    assert [r["failed"] for r in found] == [False]


def test_main_writes_whatever_failed_and_says_so(tmp_path, monkeypatch, capsys):
    timing = {"ours": measure.Timing([1.0]), "peer": measure.Timing([2.0])}
    seen = []

    def run_child(argv, records, seconds, names):
        # what comes from now on, and what was there before, is kept if the run ends here
        assert records.parent.is_dir() and tmp_path in records.parents
        assert seen == [] or list(tmp_path.glob("*.json"))
        seen.append(names)
        bad = names == ["tests"]
        return [
            {"step": names[0], **measure.check("kernel tests", not bad, "told")},
            {"step": names[0], **measure.row("x", "forward", timing, "ours", "peer")},
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        report, "machine", lambda device, commit: {"device": "NVIDIA Test 1", "commit": commit}
    )
    monkeypatch.setattr(command, "run_child", run_child)
    assert command.main(["--output", str(tmp_path), "--commit", "abc"]) == 1
    assert seen == [[name] for name in command.FULL_SECONDS]
    assert "failed | told" in (tmp_path / "gpu_nvidia_test_1.md").read_text()
    assert "1 failed\n  failed: kernel tests: told" in capsys.readouterr().out
    assert command.main(["--output", str(tmp_path), "--only", "layer"]) == 0
    assert command.main(["--output", str(tmp_path), "--quick"]) == 0
    assert seen[-1] == list(command.QUICK_SECONDS)
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {
        "gpu_nvidia_test_1.json",
        "gpu_nvidia_test_1_part.json",
        "gpu_nvidia_test_1_quick.json",
    }
    assert not list(tmp_path.glob("gpu_unfinished*"))
