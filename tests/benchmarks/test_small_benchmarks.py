"""Benchmarks of one file: they run, and say what they measured."""

import json
import math
import sys

import pytest

from benchmarks import busy, video


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
