"""The six examples of the predecessor's README run on ours as printed but for the import."""

import importlib.metadata
import re

import pytest
import torch

TEXT = importlib.metadata.metadata("colt5-attention").get_payload()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MADE = {  # what each example leaves, by the name of its last call
    "block_out": (2, 32768, 512),
    "cross_attn_out": (1, 1024, 512),
    "attn_out": (2, 8192, 512),
    "out": (1, 32, 256, 256),
    "logits": (1, 1000),
    "values": (1024, 10),
}


def test_there_are_six():
    assert len(EXAMPLES) == len(MADE) == 6


@pytest.mark.parametrize(
    "code, name, shape", [(code, *item) for code, item in zip(EXAMPLES, MADE.items())], ids=MADE
)
def test_example(monkeypatch, code, name, shape):
    """On the CPU: ``.cuda()`` is left out."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    assert code.count("colt5_attention") == 1
    made = {}
    with torch.no_grad():
        exec(code.replace("colt5_attention", "colt5_vision.compat"), made)  # noqa: S102
    assert made[name].shape == shape and made[name].isfinite().all()
