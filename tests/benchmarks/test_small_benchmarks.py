"""Benchmarks of one file: they run, and say what they measured."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import busy, video
from tests.support.swap_cases import CASES, build, picture


def test_the_table_of_a_video_has_a_ratio_for_each_window(tmp_path, monkeypatch, capsys):
    options = ["--grid", "2", "6", "8", "--heads", "1", "--head-dim", "16", "--output"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.video", *options, str(tmp_path)])
    video.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines if "|" in line}
    assert rows["full SDPA"][1].strip() == "1"
    for name in ("windows of 1 x 16 x 16", "windows of 3 x 8 x 8"):
        assert float(rows[name][1]) > 0
    assert (tmp_path / "video.md").read_text().splitlines() == lines


def test_a_process_times_its_steps():
    times = busy.measured({"OMP_NUM_THREADS": "1"}, 0)
    assert len(times) == 3 and min(times) > 0


def test_growth_is_the_slope_of_what_was_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("colt5_attention")
    pytest.importorskip("tomesd")
    from benchmarks import growth

    for power in (0.5, 1.0, 1.2):
        values = {side: 3 * side ** (2 * power) for side in (64, 128, 512)}
        assert growth.slope(values) == pytest.approx(power)

    # both kinds of a part, one after the other, into one file
    how = ["--sides", "16", "32", "--keys", "64", "--rounds", "1", "--output", str(tmp_path)]
    growth.main([*how, "--parts", "operator", "swap, sampled", "--kinds", "ms"])
    monkeypatch.setattr(growth, "memory", lambda part, size, what: 2.0**20 * size.tokens**1.1)
    growth.main([*how, "--parts", "operator", "--kinds", "MiB", "--million"])
    rows = json.loads((tmp_path / "growth_cpu.json").read_text())["rows"]
    assert [row.get("kind") for row in rows] == ["MiB"] * 2 + ["ms"] * 4 + [None]
    for row in rows[:-1]:
        small, large = row["values"]["16"], row["values"]["32"]
        assert row["exponent"] == pytest.approx(math.log(large / small) / math.log(4))
    text = capsys.readouterr().out
    assert (
        "| operator | forward | MiB | 256 | 1024 | 1.100 | **not met** |".replace(
            "256 | 1024", f"{256**1.1:.4g} | {1024**1.1:.4g}"
        )
        in text
    )
    million = 2.0**20 * 1024**2.2 + 4 * 64 * 1024**2
    assert f"{million / 2**30:.2f} GiB at the peak" in text


def test_trained_routers_stand_beside_what_they_started_from(tmp_path):
    """Rows of each size and router; a second run trains no more."""
    distilled = pytest.importorskip("benchmarks.distilled")
    model = build(CASES["vit"], torch.float32).eval()
    x = {size: picture(size=(size, size), seed=1) for size in (64, 96)}
    study = distilled.Study(
        "toy of a ViT",
        64,
        model,
        2,
        [picture(seed=seed) for seed in (2, 3)],
        {size: [lambda one=one: model(one).detach()] for size, one in x.items()},
        lambda out, full: ((out - full).norm() / full.norm()).item(),
    )
    args = SimpleNamespace(steps=4, draws=2, min_tokens=0, output=tmp_path)
    rows = distilled.rows_of(study, args)
    assert [row[2] for row in rows] == [f'`"{one}"`' for one in distilled.ROUTERS for _ in x]
    for row in rows:
        assert 0 < float(row[4]) <= float(row[5]) and float(row[6]) > 0
        assert (row[3] == "–") == ("learned" not in row[2])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = distilled.rows_of(study, args)
    assert [row[:6] for row in again] == [row[:6] for row in rows]
    assert {path.name for path in written} == {"toy_64_learned_4.pt", "toy_64_learned_grouped_4.pt"}
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
