"""Benchmarks of one file: they run, and say what they measured."""

import sys

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
