"""The Python of docs/diffusers.md runs as printed, on a tiny pipeline in place of the real one."""

import re
from pathlib import Path

import pytest
import torch

from colt5_vision import routed_layers

pytest.importorskip("diffusers.models")

import diffusers

from tests.support.diffusers_pipes import pipeline

TEXT = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_snippet_runs(monkeypatch, tmp_path):
    pipe, call = pipeline("sdxl").to(torch.float32), diffusers.StableDiffusionXLPipeline.__call__
    small = {"height": 512, "width": 512, "num_inference_steps": 1, "output_type": "pil"}
    kind = diffusers.StableDiffusionXLPipeline
    monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr(kind, "to", lambda self, device: self)
    monkeypatch.setattr(
        kind, "__call__", lambda self, prompt, **how: call(self, prompt, **how | small)
    )
    monkeypatch.chdir(tmp_path)
    # as on the GPU that the page is about: no costs are known, so that 1,024 tokens decide
    monkeypatch.setattr("colt5_vision.swap.config.known_costs", dict)
    assert len(BLOCKS) == 3
    for code in BLOCKS:
        exec(code.replace("steps=100", "steps=2"), {})  # each on its own  # noqa: S102
    assert routed_layers(pipe)
