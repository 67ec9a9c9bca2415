"""The examples, run small, as a user would: from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model",
    "test_colt5_vit",
    "--img-size",
    "48",
    "--limit",
    "32",
    "--batch-size",
    "8",
    "--device",
    "cpu",
]


def run(*args, launcher=(sys.executable,)):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "examples/image_classification.py", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240, env=env
    )


def test_train_and_resume_equals_one_go(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(*SMALL, "--epochs", 2, "--output", whole)
    assert done.returncode == 0, done.stderr
    for name in (
        "history.json",
        "results.md",
        "curve.png",
        "routing.png",
        "checkpoint/model.safetensors",
    ):
        assert (whole / name).stat().st_size > 0, name
    assert "epoch 1/2" in done.stderr  # the progress bar

    # the same run, killed after its first epoch
    code = (
        "import sys; sys.path.insert(0, 'examples'); import image_classification as m\n"
        "save = m.save_checkpoint\n"
        "def stop(*a): save(*a); raise KeyboardInterrupt\n"
        "m.save_checkpoint = stop; sys.exit(m.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *SMALL, "--epochs", "2", "--output", str(parts)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240, env=env
    )
    assert killed.returncode == 130 and "--resume" in killed.stderr
    resumed = run(*SMALL, "--epochs", 2, "--output", parts, "--resume")
    assert resumed.returncode == 0 and "resuming after epoch 1 of 2" in resumed.stdout, (
        resumed.stderr
    )
    a, b = (json.loads((folder / "history.json").read_text()) for folder in (whole, parts))
    assert [h["epoch"] for h in b] == [1, 2]
    assert abs(a[1]["loss"] - b[1]["loss"]) < 1e-4

    weights = parts / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cut = run(*SMALL, "--epochs", 3, "--output", parts, "--resume")
    assert (
        cut.returncode == 2
        and "error: --resume: cannot load" in cut.stderr
        and "Traceback" not in cut.stderr
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (60, 50, 3), np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


def test_a_folder_of_images_and_another_model(folder, tmp_path):
    args = [
        "--data",
        folder,
        "--img-size",
        64,
        "--batch-size",
        4,
        "--epochs",
        1,
        "--amp",
        "bf16",
        "--device",
        "cpu",
    ]
    done = run(*args, "--model", "resnet18", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no routed layer" in done.stdout


def test_what_the_user_can_mend_is_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "cats" / "0.png").write_bytes(b"not an image")
    cases = {
        ("--data", tmp_path / "nowhere"): "no such folder",
        ("--data", tmp_path / "empty"): "holds no class folders",
        ("--data", folder, "--img-size", 64, "--batch-size", 4): "cannot read image",
        ("--model", "colt6_vit"): "timm knows no model 'colt6_vit'",
        ("--img-size", 12): "--img-size",
        (
            "--data",
            folder,
            "--img-size",
            64,
            "--batch-size",
            4,
            "--workers",
            1,
        ): "cannot read image",
        ("--resume", "--output", tmp_path / "new"): "no checkpoint",
    }
    if not torch.cuda.is_available():
        cases["--device", "cuda"] = "--device: cuda is not available"
    for args, message in cases.items():
        failed = run("--device", "cpu", "--limit", 16, "--output", tmp_path / "out", *args)
        assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
        error = [line for line in failed.stderr.splitlines() if "error: " in line]
        assert len(error) == 1 and message in error[0], failed.stderr


def test_two_processes(tmp_path):
    # without --multi_gpu accelerate starts one process on a machine without a GPU
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    )
    done = run(*SMALL, "--epochs", 1, "--output", tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr and "4/4" not in done.stderr  # 32 digits, 8 a step and process
    assert (
        done.stdout.count("held-out accuracy") == 2
    )  # the epoch and the summary, by the main process only
