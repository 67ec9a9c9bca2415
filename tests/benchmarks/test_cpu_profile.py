"""benchmarks.cpu --profile and --fit at tiny sizes: the steps are found, the fit is one."""

import json

import pytest
import torch

pytest.importorskip("colt5_attention")
pytest.importorskip("tomesd")

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import fit, parts, profile, targets
from benchmarks.gpu.measure import PASSES, Map
from colt5_vision.swap import cost
from colt5_vision.swap.tiles import tiles_of

SIZE = Map(32, 2, 16, window=8)
# steps that a part has beyond those of every part, by its name
OWN = {
    "operator": {"windows", "routed part", "join"},
    "layer, softmax": {"windows", "routed part", "join", "projections", "logits", "selection"},
    "layer, sum": {"windows", "routed part", "join", "projections", "logits", "selection"},
    "swap, sampled": {"windows", "routed part", "join", "probes", "selection"},
    "swap, grouped": {"routed part", "probes", "selection"},
}
NONE = {"operator": {"projections", "probes", "logits", "selection"}, "swap, grouped": {"windows"}}


@pytest.mark.parametrize("name", profile.PARTS)
@pytest.mark.parametrize("what", PASSES)
def test_every_step_has_its_share(name, what):
    # as many routed keys as a window has tell the parts apart by their order alone
    for share in (32, 16):
        calls, flops = profile.Part(name, Map(32, 2, 16, window=8, share=share)).make()
        calls[what]()
        found = profile.shares(calls[what])
        assert tuple(found) == profile.STEPS
        assert sum(found.values()) == pytest.approx(1)
        for step in OWN[name] | {"gather", "rest"}:
            assert 0 < found[step] < 1, (step, share)
        for step in NONE.get(name, ()):
            assert found[step] == 0, (step, share)
        assert flops > 0


def test_a_step_is_as_long_as_it_takes(monkeypatch):
    """What a named function does is its step's, forward and backward; what nobody names is rest."""

    class Slow(torch.nn.Linear):
        pass

    layer, x = Slow(512, 512), torch.randn(512, 512)

    def call():
        y = layer(x.requires_grad_())
        return torch.autograd.grad((y @ y.mT).sum(), x)

    found = profile.shares(call)
    assert found["projections"] > 0.05 and found["rest"] > 0.05
    assert found["projections"] + found["rest"] == pytest.approx(1)
    assert torch.nn.Linear.forward.__name__ == "forward"  # as it was
    assert not hasattr(torch.nn.Linear.forward, "__wrapped__")

    monkeypatch.setitem(profile.NAMED, "colt5_vision.router:CoordinateDescentRouter.gone", "logits")
    with pytest.raises(LookupError, match="CoordinateDescentRouter.gone: the library has no such"):
        profile.shares(call)


def test_a_call_that_was_stopped_in_a_step_does_not_show():
    whole = dict.fromkeys(profile.STEPS, 0.0)
    usual = whole | {"windows": 0.75, "rest": 0.25}
    stopped = whole | {"windows": 0.03, "join": 0.96, "rest": 0.01}
    found = profile.middle([usual, stopped, usual])
    assert found == pytest.approx(usual)


def test_the_table_says_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "_QUERIES", 64)
    how = ["--profile", "--quick", "--output", str(tmp_path), "--parts", "operator"]
    assert command.main([*how, "swap, sampled", "--sides", "16"]) == 0
    assert command.main([*how, "--sides", "24"]) == 0  # beside what is there
    rows = json.loads((tmp_path / "profile_cpu_quick.json").read_text())["rows"]
    text = (tmp_path / "profile_cpu_quick.md").read_text()
    assert text in capsys.readouterr().out
    assert [(row["part"], row["size"]["side"], row["pass"]) for row in rows] == [
        (name, side, what)
        for name, side in (("operator", 16), ("operator", 24), ("swap, sampled", 16))
        for what in PASSES
    ]
    for row in rows:
        assert row["ms"] > 0 and row["bound"] > 0 and row["over_sdpa"] > 0
        cells = [f"{row['ms']:.0f}", f"{row['bound']:.0%}", f"{row['over_sdpa']:.2f}"]
        assert f"{row['pass']} | {' | '.join(cells)} |" in text


def test_the_fit_finds_the_constants_that_made_the_times():
    given, rows = {}, []
    for what in PASSES:
        given[what] = {}
        for kind, amounts in cost.AMOUNTS.items():
            names = list(amounts(cost.Work(1, 1, 1, 1, 1)))
            given[what][kind] = dict.fromkeys(names, 0.0)
            given[what][kind] |= {"products": 3e-12, "copied": 2e-9, "calls": 4e-3}
            for size in fit.MAPS:
                parts = amounts(fit.work_of(size))
                time = sum(given[what][kind][name] * n for name, n in parts.items())
                rows.append((what, kind, fit.work_of(size), time))
    found = fit.fitted(rows)
    for what, kind, work, time in rows:
        parts = cost.AMOUNTS[kind](work)
        guess = sum(found[what][kind][name] * n for name, n in parts.items())
        assert guess == pytest.approx(time, rel=0.02)
        assert all(value >= 0 for value in found[what][kind].values())

    # one row that another process got in the way of does not move the others
    worst = max(range(len(rows)), key=lambda i: rows[i][:2] == rows[0][:2] and rows[i][3])
    rows[worst] = (*rows[worst][:3], 2 * rows[worst][3])
    found = fit.fitted(rows)
    for i, (what, kind, work, time) in enumerate(rows):
        parts = cost.AMOUNTS[kind](work)
        guess = sum(found[what][kind][name] * n for name, n in parts.items())
        assert i == worst or guess == pytest.approx(time, rel=0.15)


def test_the_library_reads_what_the_fit_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "QUICK", fit.QUICK[:2])
    monkeypatch.setattr(fit, "_SECONDS", 0.0)
    assert command.main(["--fit", "--quick", "--output", str(tmp_path)]) == 0
    path = tmp_path / "costs.json"
    assert f"export {cost.VARIABLE}={path}" in capsys.readouterr().out
    monkeypatch.setenv(cost.VARIABLE, str(path))
    found = cost.known_costs()[("cpu", torch.float32)]
    assert found.threads == torch.get_num_threads()
    assert found.seconds("full", cost.Work(256, 32, 64, 16, 16)) > 0


def test_the_targets_are_listed_beside_what_was_measured(tmp_path, monkeypatch, capsys):
    calls = (lambda: None, lambda: None, lambda: None)
    some = [targets.Target("a", 0.0, lambda: calls, 2.0), targets.Target("b", 1e9, lambda: calls)]
    monkeypatch.setattr(targets, "targets", lambda quick: some)
    assert command.main(["--targets", "--quick", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "targets_cpu_quick.json").read_text())["rows"]
    assert [row["met"] for row in rows] == [True, False]
    text = capsys.readouterr().out
    for row, verdict in zip(rows, ("met", "not met, above the ceiling")):
        share = f"{row['ratio'] / 2:.0%}" if row["bound"] else "–"
        ceiling = f"{row['ceiling']:.2f}"
        assert f">= {row['least']:.3g} | {share} | {ceiling} | {verdict} |" in text


@pytest.mark.parametrize("index", range(11))
def test_the_calls_of_a_target_run(index, monkeypatch):
    monkeypatch.setattr(targets, "fixed", lambda side, keys: Map(16, 2, 16, window=8))
    every = targets.targets(quick=True)
    assert len(every) == 11
    for call in every[index].make():
        call()


@pytest.mark.parametrize("side", [8, 11])
def test_the_parts_of_a_ceiling_are_the_pairs_of_the_operator(side, monkeypatch):
    size = Map(side, 2, 16, batch=2, window=4, share=4)
    sides = [4] * (side // 4) + [side % 4]
    pairs = {"windows": sum((h * w) ** 2 for h in sides for w in sides)}
    pairs["operator"] = pairs["windows"] + side**2 * (side**2 // 4)
    pairs["layer"] = pairs["operator"]
    pairs["sampled"] = pairs["operator"] + 2 * parts.PROBES * side**2
    found = []

    def attend(q, k, v, attn_mask=None):
        found.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return v

    monkeypatch.setattr(parts, "scaled_dot_product_attention", attend)
    for name, number in pairs.items():
        found.clear()
        getattr(parts, name)(size, targets.FORWARD)()
        assert sum(found) == 2 * size.heads * number, name

    # of tiles, each of which has as many keys, and four probes
    found.clear()
    parts.grouped(size, targets.FORWARD)()
    tiles, area = tiles_of((side, side), (4, 4), None).shape
    number = tiles * (area * (side**2 // 4) + 4 * side**2)
    assert sum(found) == 2 * size.heads * number
