"""The autoregressive example, run small: from the command line, and interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.marks import further

pytest.importorskip("mlxtend")

ROOT = Path(__file__).parents[2]
QUICK = ["--quick", "--device", "cpu"]  # three steps an epoch, two epochs


@pytest.fixture
def example(monkeypatch):
    import train_autoregressive

    return train_autoregressive


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_from_the_command_line_to_pictures_and_figures(tmp_path):
    command = [
        sys.executable,
        "examples/train_autoregressive.py",
        *QUICK,
        "--output",
        str(tmp_path),
    ]
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, "timeout": 240}
    done = subprocess.run(command, check=False, capture_output=True, **how)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stderr  # the progress bar
    assert (
        "held-out bits per pixel: routed" in done.stdout
        and "pixels/s with the cache" in done.stdout
    )
    assert Image.open(tmp_path / "samples.png").size == (560, 14 + 224)
    assert Image.open(tmp_path / "curve.png").size[0] > 400
    results = (tmp_path / "results.md").read_text()
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("counts of greys", "counts at each pixel", "window only", "routed"):
        assert f"| {name} |" in results
    assert len(history) == 2 and f"{history[1]['held_out']['routed']:.3f}" in results
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("last", [1, *further(2)], ids=["within an epoch", "at its end"])
def test_an_interrupted_run_goes_on_as_if_it_were_not(example, tmp_path, monkeypatch, capsys, last):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.main([*QUICK, "--output", str(whole)]) == 0
    step = example.Run.step

    def interrupted(run, epoch, number):
        if len(run.losses) == last:
            os.kill(os.getpid(), signal.SIGINT)
        step(run, epoch, number)

    monkeypatch.setattr(example.Run, "step", interrupted)
    assert example.main([*QUICK, "--output", str(parts)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(state(parts)["losses"]) == last + 1  # the step in progress ends
    monkeypatch.setattr(example.Run, "step", step)
    assert example.main([*QUICK, "--output", str(parts), "--resume"]) == 0
    assert f"resuming after step {last + 1} of 6" in capsys.readouterr().out
    a, b = state(whole), state(parts)
    assert a["losses"] == b["losses"] and [h["held_out"] for h in a["history"]] == [
        h["held_out"] for h in b["history"]
    ]
    for name in example.MODELS:
        assert all(torch.equal(a[name][0][key], value) for key, value in b[name][0].items())
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()


def test_training_learns_and_the_bits_are_those_of_the_pixels(example):
    given = example.parse([*QUICK, "--epochs", "6", "--size", "14"])
    assert (given.epochs, given.size, given.dim) == (6, 14, 16)  # what is given stays
    args = example.parse([*QUICK, "--limit", "64"])
    run = example.Run(args)
    assert run.symbols[:, 0].min() >= example.LEVELS and run.symbols[:, 1:].max() < example.LEVELS
    assert set(map(tuple, run.symbols.tolist())).isdisjoint(map(tuple, run.held_out.tolist()))
    before = run.judge()
    for number in range(8):
        run.step(0, number)
    after = run.judge()
    assert all(after[name] < before[name] - 0.2 for name in example.MODELS)
    model, some = run.models["routed"], run.held_out[:3]
    probability = model(some[:, :-1])[0].softmax(-1).gather(2, some[:, 1:, None])
    torch.testing.assert_close(model.bits(some), -probability.log2().mean())
    # counts: as good as they can be, and the entropy of four equal greys is two bits
    run.symbols = torch.cat(
        [torch.full((400, 1), 16), torch.arange(400)[:, None].expand(-1, 49) % 4], 1
    )
    run.held_out = run.symbols
    assert all(1.99 < bits < 2.03 for bits in run.controls().values())


def test_sampling_with_the_cache_draws_what_sampling_without_draws(example):
    run = example.Run(example.parse(QUICK))
    for number in range(3):
        run.step(0, number)
    model, digits = run.models["routed"], torch.arange(10)
    with_cache = model.sample(digits, 0)
    assert with_cache.shape == (10, 49) and torch.equal(
        with_cache, model.sample(digits, 0, cached=False)
    )
    assert not torch.equal(with_cache, model.sample(digits, 1))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--dim", "12"], "--dim: expected a multiple of 8, got 12"),
        (["--queries", "0"], "--queries: expected a share in (0, 1], got 0"),
        (["--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--limit", "7", "--quick"], "--limit: expected at least a batch of 8 digits, got 7"),
        (["--resume"], "--resume: no checkpoint"),
        (["--device", "cuda"], "--device: cuda is not available"),
    ],
)
def test_what_the_user_can_mend_is_one_line(example, args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = example.main(["--device", "cpu", "--output", str(tmp_path / "new"), *args])
    except SystemExit as exit:  # argparse
        code = exit.code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_other_settings_or_cut_short_is_refused(example, tmp_path, capsys):
    args = [*QUICK, "--output", str(tmp_path), "--epochs"]
    assert example.main([*args, "1"]) == 0
    assert example.main([*args, "2", "--resume", "--seed", "3"]) == 2
    assert "error: --seed: the run to resume was made with 0, got 3" in capsys.readouterr().err
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:1000])
    assert example.main([*args, "2", "--resume"]) == 2
    assert "error: --resume: cannot load" in capsys.readouterr().err
