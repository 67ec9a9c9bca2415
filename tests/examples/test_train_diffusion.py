"""The diffusion example, run small: from the command line, by several processes, and
interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.marks import exhaustive, further

for _name in ("accelerate", "diffusers.models", "mlxtend"):
    pytest.importorskip(_name)

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/train_diffusion.py"
SMALL = [
    "--size",
    "32",
    "--limit",
    "24",
    "--batch-size",
    "8",
    "--device",
    "cpu",
]  # three steps an epoch
# with --cpu accelerate starts one process whatever --num_processes says
TWO = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
HOW = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}


def run(*args, launcher=(sys.executable,)):
    return subprocess.run(
        [*launcher, EXAMPLE, *map(str, args)], check=False, capture_output=True, timeout=240, **HOW
    )


@pytest.fixture
def example(monkeypatch):
    import train_diffusion

    monkeypatch.setattr(train_diffusion, "DDIM_STEPS", 2)
    return train_diffusion


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("last", [1, *further(3)], ids=["within an epoch", "at its end"])
def test_an_interrupted_run_goes_on_as_if_it_were_not(example, tmp_path, monkeypatch, capsys, last):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.main([*SMALL, "--epochs", "2", "--output", str(whole)]) == 0
    step = example.Run.step

    def interrupted(run, epoch, number, stop):
        if len(run.losses) == last:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, epoch, number, stop)

    monkeypatch.setattr(example.Run, "step", interrupted)
    assert example.main([*SMALL, "--epochs", "2", "--output", str(parts)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert (
        len(state(parts)["losses"]) == last + 2
    )  # the step in progress, and the one that looks up
    monkeypatch.setattr(example.Run, "step", step)
    assert example.main([*SMALL, "--epochs", "2", "--output", str(parts), "--resume"]) == 0
    assert f"resuming after step {last + 2} of 6" in capsys.readouterr().out
    a, b = state(whole), state(parts)
    assert a["losses"] == b["losses"]
    assert all(
        torch.equal(p, q)
        for p, q in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True)
    )
    a, b = (
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (whole, parts)
    )
    assert [h["epoch"] for h in b] == [1, 2] and [h["held_out_loss"] for h in a] == [
        h["held_out_loss"] for h in b
    ]
    pictures = [p / "samples" / "epoch_002.png" for p in (whole, parts)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert not list(tmp_path.glob("**/*.part"))


def test_a_checkpoint_of_other_settings_or_cut_short_is_refused(example, tmp_path, capsys):
    args = [*SMALL, "--output", str(tmp_path), "--epochs"]
    assert example.main([*args, "1"]) == 0
    assert example.main([*args, "2", "--resume", "--keys", "9"]) == 2
    assert "error: --keys: the run to resume was made with 0.125, got 9" in capsys.readouterr().err
    assert example.main([*args, "2", "--resume"]) == 0  # more epochs are welcome
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:1000])
    assert example.main([*args, "3", "--resume"]) == 2
    assert "error: --resume: cannot load" in capsys.readouterr().err


@exhaustive
def test_two_processes_stop_at_ctrl_c_and_go_on_together_to_pictures_and_figures(
    example, tmp_path, capsys
):
    args = [
        *SMALL,
        "--limit",
        "96",
        "--batch-size",
        "4",
        "--fusion",
        "softmax",
        "--output",
        str(tmp_path),
        "--epochs",
    ]
    process = subprocess.Popen(
        [*TWO, EXAMPLE, *args, "400"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **HOW,
    )
    try:
        shown = ""
        while "loss=" not in shown and (more := process.stderr.read(1)):  # on the progress bar
            shown += more
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does at Ctrl-C
        _, error = process.communicate(timeout=60)
        assert "--resume" in error, error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    saved = state(tmp_path)
    steps, epochs = len(saved["losses"]), len(saved["history"])
    assert saved["settings"]["num_processes"] == 2 and 12 * epochs < steps <= 12 * (epochs + 1)

    done = run(*args, epochs + 1, "--resume", launcher=TWO)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count(f"resuming after step {steps} of {12 * epochs + 12}") == 1
    )  # the main process alone speaks
    assert len(state(tmp_path)["losses"]) == 12 * epochs + 12
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == epochs + 1
    picture = Image.open(tmp_path / "samples" / f"epoch_{epochs + 1:03d}.png")
    assert picture.size == (10 * 32, 14 + 4 * 32)
    assert Image.open(tmp_path / "curve.png").size[0] > 400
    results = (tmp_path / "results.md").read_text()
    assert "256 tokens: each sees 32 routed keys (12.5%)" in results and "images/s" in results

    assert example.main([*args, "9", "--resume"]) == 2
    assert "--num-processes: the run to resume was made with 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--size", "60"], "--size: expected a multiple of 8, at least 32, got 60"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--keys", "3/2"], "--keys: expected a share in (0, 1]"),
        (["--keys", "0"], "--keys: expected a number from 1 on, or a share in (0, 1]"),
        (["--limit", "7"], "--limit: expected 8 digits, a batch for each process, got 7"),
        (["--resume"], "--resume: no checkpoint"),
        (["--device", "cuda"], "--device: cuda is not available"),
    ],
)
def test_what_the_user_can_mend_is_one_line(example, args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = example.main([*SMALL, "--output", str(tmp_path / "new"), *args])
    except SystemExit as exit:  # argparse
        code = exit.code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "new").exists()
