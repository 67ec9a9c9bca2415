"""What the examples share: options, folders and checkpoints."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from support import checkpoints
from support.command_line import Help, UserError, above_zero, cause, set_aside
from support.digits import draw_digits


def test_the_help_has_defaults_that_say_something(capsys):
    parser = argparse.ArgumentParser(formatter_class=Help)
    parser.add_argument("--lr", type=above_zero, default=0.5, help="a rate")
    parser.add_argument("--data", help="a folder")
    parser.add_argument("--resume", action="store_true", help="go on")
    told = parser.format_help()
    assert "a rate (default: 0.5)" in told and told.count("default") == 1
    for wrong in ("0", "-1", "nan", "inf", "fast"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--lr", wrong])
        assert f"--lr: expected a number above 0, got '{wrong}'" in capsys.readouterr().err


def test_an_older_run_is_set_aside_once(tmp_path, capsys):
    names = ("checkpoint.pt", "samples", "curve.png")
    set_aside(tmp_path, *names)
    assert not (tmp_path / "before").exists() and not capsys.readouterr().out
    for content in ("first", "second"):
        (tmp_path / "checkpoint.pt").write_text(content)
        (tmp_path / "samples").mkdir()
        (tmp_path / "others.txt").write_text("kept")
        set_aside(tmp_path, *names)
        assert (tmp_path / "before" / "checkpoint.pt").read_text() == content
        assert {p.name for p in tmp_path.iterdir()} == {"before", "others.txt"}
        assert f"moved the run in {tmp_path}" in capsys.readouterr().out


def test_an_error_has_its_cause_in_a_line():
    assert cause(RuntimeError("Error in loading:\n\tsize mismatch for a\n\tfor b")) == (
        "Error in loading: size mismatch for a"
    )
    assert cause(ValueError("one\ntwo")) == "one" and cause(KeyError()) == "KeyError"


def test_a_checkpoint_is_of_the_same_settings_and_survives_a_full_disk(tmp_path, monkeypatch):
    path, taken = tmp_path / "checkpoint.pt", []
    checkpoints.save_checkpoint(path, {"settings": {"seed": 1}, "losses": [2.0]})
    assert checkpoints.load_checkpoint(path, {"seed": 1}, taken.append)["losses"] == [2.0]
    with pytest.raises(UserError, match="^--seed: the run to resume was made with 1, got 2"):
        checkpoints.load_checkpoint(path, {"seed": 2}, taken.append)
    assert len(taken) == 1

    def full(state, file):
        file.write_bytes(b"half")
        raise RuntimeError("unexpected pos 199360 vs 199252")

    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write a checkpoint .* the one before is whole"):
        checkpoints.save_checkpoint(path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_drawn_digits_stand_in_named_columns(tmp_path):
    images = np.zeros((20, 7, 7), np.uint8)
    images[13] = 255  # a 3, in the second row
    draw_digits(tmp_path / "drawn.png", images, scale=8)
    drawn = np.array(Image.open(tmp_path / "drawn.png"))
    assert drawn.shape == (14 + 2 * 56, 10 * 56)
    assert (drawn[14 + 56 :, 3 * 56 : 4 * 56] == 255).all() and drawn[14:].sum() == 255 * 56**2
    heads = drawn[:14].reshape(14, 10, 56)
    assert (heads.min((0, 2)) < 128).all() and (heads[:, :, :10] == 255).all()
