"""benchmarks/cpu at tiny sizes: every row is there, its figures are the timer's. Nothing here
judges a speed."""

import itertools
import json
import math
import re
import statistics
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("colt5_attention")
pytest.importorskip("tomesd")

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import memory, report
from benchmarks.cpu.attention import Attention
from benchmarks.cpu.cases import SHARE, SPEED
from benchmarks.cpu.gates import Gates
from benchmarks.cpu.layers import FUSIONS, PEERS, Growth, Layer, fixed, ours, routing
from benchmarks.cpu.peers import sinkhorn, sorted_projection
from benchmarks.cpu.selection import Selection
from benchmarks.cpu.timing import Timer
from benchmarks.gpu.measure import PASSES, Map
from colt5_vision.compat.relaxations import gumbel_sinkhorn

CASES = (
    Gates((1, 1), rows=2, n=512, k=32),
    Selection((1,), rows=2, n=512, k=32),
    Attention((1, 1), Map(16, 2, 8, window=8)),
    Growth((1,), sides=(16, 32, 64), keys=64, window=8),
    Layer((1, 1), fixed(16, 64, window=8)),
    Layer((1, 1), fixed(32, 64, window=8)),
)


class FakeTimer(Timer):
    """Every call is made once, and takes as long as the test says."""

    def __init__(self):
        super().__init__(fewest=4, most=4)
        self.called, self.round = set(), {}

    def seconds(self, name: str) -> float:
        return 1e-3 * (1 + sum(map(ord, name)) % 97)

    def once(self, name, call):
        if call not in self.called:
            self.called.add(call)
            call()
        self.round[call] = self.round.get(call, -1) + 1
        return self.seconds(name) * (1 + 0.1 * self.round[call])

    def probe(self, case, variant, what, threads, limit):
        return {"peak_bytes": len(variant) << 20, "seconds": 0.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(report as read from JSON, Markdown, the timer) of a run of the command."""
    timer, folder = FakeTimer(), tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "QUICK", CASES)
        patch.setattr(command, "Timer", lambda: timer)
        assert command.main(["--quick", "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        f"cpu_quick.{ending}" for ending in ("json", "md", "png")
    }
    return (
        json.loads((folder / "cpu_quick.json").read_text()),
        (folder / "cpu_quick.md").read_text(),
        timer,
    )


def test_every_row_is_there_and_its_figures_are_the_timers(results):
    found, _, timer = results
    assert found["complete"]
    assert [(row["case"], row["pass"]) for row in found["rows"]] == [
        (str(c), p) for c in CASES for p in c.passes
    ]
    cases = {str(case): case for case in CASES}
    for row in found["rows"]:
        case = cases[row["case"]]
        assert list(row["variants"]) == list(case.makers())
        assert row["threads"] == (case.threads or torch.get_num_threads())
        for name, entry in row["variants"].items():
            assert entry["note"] is None
            assert entry["peak_bytes"] == (len(name) << 20 if case.probed else None)
            # the first call is to warm up
            assert entry["raw"] == pytest.approx(
                [timer.seconds(name) * (1 + 0.1 * i) for i in range(1, 5)]
            )
            assert entry["median"] == statistics.median(entry["raw"])
            assert entry["q1"] <= entry["median"] <= entry["q3"]
            if row["group"] == "gates" and row["pass"] == PASSES[0]:
                assert 0 <= entry["error"] < 1e-4
            else:
                assert entry["error"] is None
        assert [(r["kind"], r["ours"], r["other"]) for r in row["ratios"]] == case.ratios()
        for ratio in row["ratios"]:
            mine, other = timer.seconds(ratio["ours"]), timer.seconds(ratio["other"])
            assert 0 < ratio["q1"] <= ratio["q3"] < math.inf
            assert ratio["median"] == pytest.approx(
                other / mine if ratio["kind"] == SPEED else mine / other
            )


def test_markdown_says_what_json_says(results):
    found, text, _ = results
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    for row in found["rows"]:
        if row["group"] not in report.ABOUT:
            continue
        column = f"over {row['ratios'][0]['ours']}"
        header = next(line for line in lines if line[0] == "case" and column in line)
        for name, entry in row["variants"].items():
            (cells,) = (
                some
                for some in lines
                if len(some) == len(header) and some[:3] == [row["case"], row["pass"], name]
            )
            cells = dict(zip(header, cells, strict=True))
            assert cells["ms"] == report.figures(entry, 1e3)
            assert float(cells["MiB"]) == entry["peak_bytes"] / 2**20
            expected = {
                f"over {r['ours']}": r
                for r in row["ratios"]
                if r["kind"] == SPEED and r["other"] == name
            }
            for column in header:
                if column.startswith("over "):
                    ratio = expected.get(column)
                    assert cells[column] == (
                        "–" if ratio is None else report.figures(ratio, unit="x")
                    )
    shares = [r for row in found["rows"] for r in row["ratios"] if r["kind"] == SHARE]
    assert len(shares) == 4 * len(FUSIONS)
    assert all(report.figures(ratio, 100, " %") in text for ratio in shares)
    assert found["machine"]["torch"] == torch.__version__
    assert {
        "cpu",
        "cores",
        "threads",
        "memory_gib",
        "python",
        "colt5_attention",
        "tomesd",
        "date",
    } <= set(found["machine"])
    assert all(f"{value}" in text for value in found["machine"].values())


@pytest.mark.parametrize("power", [1.0, 1.2])
def test_growth_is_the_slope_of_the_rounds(power, results, monkeypatch):
    found, _, timer = results

    def seconds(name):
        return int(name.split()[-1]) ** (2 * power)

    monkeypatch.setattr(timer, "seconds", seconds)
    (case,) = (case for case in CASES if isinstance(case, Growth))
    record = timer.measure(case, PASSES[0], 1.0, lambda _: None)
    fixed_number, share = (
        report.growth(case, record)[: len(FUSIONS)],
        report.growth(case, record)[len(FUSIONS) :],
    )
    for growth in fixed_number:
        assert growth["exponent"]["median"] == pytest.approx(power)
        assert (growth["sides"], growth["met"]) == ([16, 32, 64], power <= report.MOST_GROWTH)
    assert [growth["met"] for growth in share] == [None] * len(FUSIONS)
    text = report.markdown({**found, "growth": fixed_number})
    assert ("**not met**" in text) == (power > report.MOST_GROWTH)
    # two sizes are no slope, and of fewer sizes than asked nothing is said to be met
    for name in case.series()["fusion sum"].values():
        del record["variants"][name]["raw"]
    assert [g["layer"] for g in report.growth(case, record)].count("fusion sum") == 0


def test_memory_is_what_the_call_adds():
    (layer,) = (case for case in CASES if str(case).startswith("32x32"))
    seen = memory.probe(layer, "fusion softmax", PASSES[1], 1, 60)
    assert seen["seconds"] > 0
    # n x 2 logits and what is made of them, against one output
    gates = Gates((1, 1), rows=8, n=1 << 17, k=1 << 10)
    one = 4 * gates.rows * gates.n
    peaks = {
        n: memory.probe(gates, n, PASSES[0], 1, 60)["peak_bytes"]
        for n in ("soft_topk", "Sinkhorn, 20 iterations")
    }
    if sys.platform == "linux":
        assert 0.9 * one < peaks["soft_topk"] < 3 * one
        assert 4 * one < peaks["Sinkhorn, 20 iterations"] < 12 * one


def test_a_call_that_fails_or_takes_too_long_says_so():
    bad = replace(CASES[0], k=-1)
    assert "k" in memory.probe(bad, "soft_topk", PASSES[0], 1, 60)["failed"]
    long = memory.probe(
        Gates((1, 1), rows=8, n=1 << 17, k=64), "Sinkhorn, 50 iterations", PASSES[1], 1, 0.01
    )
    assert "more than" in long["too_long"]
    (record,) = (Timer(1, 1).measure(bad, what, 1.0, lambda _: None) for what in PASSES[:1])
    assert "soft_topk" in record["failed"]
    assert record["variants"]["soft_topk"]["note"].startswith("failed: ")


def test_what_does_not_fit_is_left_out_with_its_reason():
    wide = Layer((1, 1), fixed(512, 1024))
    assert "GiB" in wide.unfit(next(name for name in PEERS if "tomesd" in name), PASSES[0])
    assert "pairs" in wide.unfit("full SDPA", PASSES[0])
    assert not any(wide.unfit(f"fusion {fusion}", what) for fusion in FUSIONS for what in PASSES)
    timer, costs = FakeTimer(), {"full SDPA": 0.3}
    timer.probe = lambda case, variant, what, threads, limit: {
        "peak_bytes": None,
        "seconds": costs.get(variant, 9.0),
    }
    record = timer.measure(CASES[2], PASSES[0], 1.0, lambda _: None)
    assert (
        record["variants"]["full SDPA"]["note"]
        == "4 rounds do not fit the time: one call took 0.3 s"
    )
    assert "median" in record["variants"]["routed_window_attention"]  # ours is always measured
    assert record["ratios"] == []


def test_rounds_take_turns_and_a_failing_call_leaves():
    turns, clock = [], itertools.count()

    class Turns(Timer):
        def once(self, name, call):
            turns.append(name)
            call()
            return float(next(clock))

    failing = iter(range(2))

    def late():
        if next(failing, None) is None:
            raise RuntimeError("late")

    times, failed = Turns(3, 5).rounds({"a": lambda: None, "b": late, "c": lambda: None}, 0.0)
    assert turns == ["a", "b", "c", "a", "b", "c", "a", "b", "c", "a", "c"]
    assert (list(times), [len(values) for values in times.values()]) == (["a", "c"], [3, 3])
    assert failed == {"b": "RuntimeError: late"}


def test_an_interruption_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    class Interrupted(FakeTimer):
        def measure(self, case, *rest):
            if isinstance(case, Attention):
                raise KeyboardInterrupt
            return super().measure(case, *rest)

    monkeypatch.setattr(command, "QUICK", CASES)
    monkeypatch.setattr(command, "Timer", Interrupted)
    assert command.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "Interrupted" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        f"cpu_quick_part.{ending}" for ending in ("json", "md", "png")
    }
    found = json.loads((tmp_path / "cpu_quick_part.json").read_text())
    assert (found["complete"], [row["group"] for row in found["rows"]]) == (
        False,
        ["gates", "gates", "selection"],
    )
    assert "Not complete" in (tmp_path / "cpu_quick_part.md").read_text()


def test_the_real_run_has_the_rows_that_are_asked_for():
    said = {str(case) for case in command.FULL}
    assert {
        "64x64, 1024 keys",
        "128x128, 1024 keys",
        "256x256, 1024 keys",
        "512x512, 1024 keys",
        "64² to 512²",
    } <= said
    assert "8 x 65536, k = 1152, eps 1" in said
    assert {
        m[0] for m in (re.match(r"\d+x\d+, 6 x 64.*keys 1/16", text) for text in said) if m
    } == {
        "109x109, 6 x 64, batch 1, window 14, keys 1/16",
        "64x64, 6 x 64, batch 1, window 16, keys 1/16",
    }
    assert command.FULL_SECONDS <= 570
    assert command.QUICK_SECONDS <= 50
    with pytest.raises(SystemExit):
        command.main(["--seconds", "0"])


def test_peers_compute_what_they_are_named_after():
    scores = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k, eps in ((20, 1.0), (37.5, 0.3)):
        plain = sinkhorn(scores, k, n_iters=50, eps=eps)
        torch.testing.assert_close(plain, gumbel_sinkhorn(scores, k, n_iters=50, eps=eps))
        sums = sorted_projection(scores, k, eps=eps)
        torch.testing.assert_close(sums.sum(-1), torch.full((3,), float(k), dtype=torch.float64))
        # the nearest point of the capped simplex: clipped at the threshold that halving finds
        torch.testing.assert_close(sums, (scores / eps - _threshold(scores / eps, k)).clamp(0, 1))
    x = scores[:1, :12].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sorted_projection(s, 4.5), x)


def _threshold(s, k):
    """By halving an interval."""
    low, high = s.amin(-1, keepdim=True) - 1, s.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        enough = (s - middle).clamp(0, 1).sum(-1, keepdim=True) >= k
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def test_peers_of_the_layer_share_its_work():
    """Where every key is taken all of them are full attention; and the router alone chooses what
    the layer chooses."""
    size = Map(16, 2, 32, window=8, share=1)
    layer = Layer((1, 1), size)
    x = layer._input()
    module = ours(size, "softmax")
    with torch.no_grad():
        full = PEERS["full SDPA"](module.attend, size)(x)
        torch.testing.assert_close(module(x), full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            PEERS["ToDo, subsampled to as many keys"](module.attend, size)(x), full
        )
    some = replace(size, share=4)
    for fusion in FUSIONS:
        module = ours(some, fusion)
        routes = 1 + (fusion == "sum")
        assert routing(module, some)(x).shape == (1, routes, 64)
    with pytest.raises(ValueError, match="keys: expected a divisor of 16 x 16 tokens, got 100"):
        fixed(16, 100)
