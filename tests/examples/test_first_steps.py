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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_help_says_what_it_costs_and_leaves(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert "\nCosts: " in text and "\nLeaves " in text
    commands = [line for line in text.splitlines() if line.startswith("    ")]
    assert all(line.count("examples/") == 1 for line in commands) and len(commands) > 1
