"""The examples, run small, as a user would: from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

AcceleratorState = pytest.importorskip("accelerate.state").AcceleratorState

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
    whole, parts = tmp_path / "whole", tmp_path / "with space"
    done = run(*SMALL, "--epochs", 2, "--output", whole)
    assert done.returncode == 0, done.stderr
    for name in (
        "history.json",
        "results.md",
        "settings.json",
        "curve.png",
        "validation.png",
        "routing.png",
        "checkpoint/model.safetensors",
    ):
        assert (whole / name).stat().st_size > 0, name
    assert "epoch 1/2" in done.stderr  # the progress bar
    assert "32 images to train, 32 held out, 10 classes (0, 1, 2" in done.stdout
    assert "; 36 tokens an image, 5 of them routed keys\n" in done.stdout  # an eighth
    assert "| is, seen as | 0 |" in (whole / "results.md").read_text()

    # the same run, asked to stop in its first epoch
    code = (
        "import os, signal, sys; sys.path.insert(0, 'examples'); import image_classification as m\n"
        "step = m.Run.step\n"
        "def stop(run, *a):\n"
        "    if len(run.losses) == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(run, *a)\n"
        "m.Run.step = stop; sys.exit(m.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *SMALL, "--epochs", "2", "--output", str(parts)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240, env=env
    )
    assert killed.returncode == 130, killed.stderr
    assert f"--epochs 2 --output '{parts}' --resume" in killed.stderr
    resumed = run(*SMALL, "--epochs", 2, "--output", parts, "--resume")
    assert "resuming after epoch 0 and 3 steps of 2" in resumed.stdout, resumed.stderr
    a, b = (json.loads((folder / "history.json").read_text()) for folder in (whole, parts))
    assert [h["epoch"] for h in b] == [1, 2]
    assert all(abs(one["loss"] - two["loss"]) < 1e-4 for one, two in zip(a, b))


@pytest.fixture
def example(monkeypatch):
    """The program in this process, whose options an Accelerator would remember."""
    import image_classification

    yield image_classification
    AcceleratorState._reset_state(reset_partial_state=True)


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


def test_a_folder_of_images_and_another_model(example, folder, tmp_path, capsys):
    (folder / "cats" / "9.png").write_bytes(b"not an image")
    (folder / ".ipynb_checkpoints").mkdir()
    args = ["--data", folder, "--img-size", 64, "--batch-size", 4, "--epochs", 1]
    args += ["--model", "resnet18", "--amp", "bf16", "--device", "cpu", "--skip-broken"]
    args += ["--output", tmp_path / "out"]
    assert example.main([*map(str, args)]) == 0
    told = capsys.readouterr().out
    assert "1 of 9 files are broken and left out" in told
    assert "7 images to train, 1 held out, 2 classes (cats, dogs); resnet18, 11.18 M" in told
    assert "no routing.png: model: expected a model with routed attention" in told
    assert (tmp_path / "out" / "validation.png").exists()

    # the line that loads it does, and a second run loses nothing
    line = told.partition("load it: ")[2].strip()
    model = eval(line, {"timm": example.timm})
    assert model.fc.out_features == 2
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["classes"] == ["cats", "dogs"] and settings["img_size"] == 64
    assert example.main([*map(str, args)]) == 0
    assert f"moved the run in {tmp_path / 'out'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "before" / "checkpoint" / "model.safetensors").exists()

    # what a resumed run may not change, and a checkpoint that is cut
    birds = folder / "birds"
    birds.mkdir()
    Image.new("RGB", (9, 9)).save(birds / "0.png")
    assert example.main([*map(str, args), "--resume"]) == 2
    assert "--data: the run to resume had the classes ['cats', 'dogs'], now" in (
        capsys.readouterr().err
    )
    shutil.rmtree(birds)
    assert example.main([*map(str, args), "--resume", "--model", "resnet34"]) == 2
    assert "--model: the run to resume was made with resnet18" in capsys.readouterr().err
    weights = tmp_path / "out" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert example.main([*map(str, args), "--resume"]) == 2
    assert "error: --resume: cannot load" in capsys.readouterr().err


def test_pictures_are_turned_as_their_camera_says(example, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "phone.jpg", exif=turned)
    from support.folders import read_image

    assert read_image(tmp_path / "phone.jpg").size == (40, 60)


def test_what_the_user_can_mend_is_one_line(example, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "full").mkdir(parents=True)
    (folder / "dogs" / "0.png").rename(tmp_path / "half" / "full" / "0.png")
    (tmp_path / "half" / "void").mkdir()
    (folder / "cats" / "0.png").write_bytes(b"not an image")
    small = ("--data", folder, "--img-size", 64, "--batch-size", 4)
    cases = {
        ("--data", tmp_path / "nowhere"): "no such folder",
        ("--data", tmp_path / "empty"): "holds no class folders",
        ("--data", tmp_path / "half"): "Found no valid file for the classes void",
        small: "cannot read image",
        (*small, "--workers", 1): "cannot read image",
        ("--model", "colt6_vit"): "timm knows no model 'colt6_vit'; try",
        ("--model", "vit_tny_patch16_224"): "vit_tiny_patch16_224",
        ("--model", "colt5_vit_tiny_patch16_224.a1"): "--model: cannot make",
        (*small, "--pretrained", "--model", "resnet18.b9"): "--model: cannot make resnet18.b9",
        ("--img-size", 12): "--img-size",
        ("--lr", -1): "--lr: expected a number above 0",
        ("--workers", -1): "--workers: expected at least 0",
        ("--seed", -1): "--seed: expected at least 0",
        ("--weight-decay", "nan"): "--weight-decay: expected at least 0",
        ("--output", folder / "cats" / "0.png"): "--output: cannot make the folder",
        ("--resume", "--output", tmp_path / "new"): "no checkpoint",
        ("--device", "cuda"): "--device: cuda is not available",
    }
    for args, message in cases.items():
        first = ("--device", "cpu", "--limit", 16, "--output", tmp_path / "out")
        try:
            code = example.main([*map(str, (*first, *args))])
        except SystemExit as exit:  # argparse
            code = exit.code
        error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert code == 2 and len(error) == 1 and message in error[0], (args, error)


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
