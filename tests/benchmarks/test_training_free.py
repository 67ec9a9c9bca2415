"""The study of routing without training: every variant attends, keeps to its keys, and the report
is what was measured."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("diffusers.models")

from benchmarks import training_free
from benchmarks.training_free_report import Record, write_report

GRID, PREFIX = (12, 12), 1
FACTORS = {kind: [0.5, 1.0, 2.0] for kind in ("error", "entropy")}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 2, PREFIX + 144, 8, generator=generator).unbind(0)


@pytest.mark.parametrize("name", training_free.VARIANTS)
def test_a_variant_attends_and_is_full_attention_where_every_key_is_routed(name):
    q, k, v = tensors()
    full, call = (
        scaled_dot_product_attention(q, k, v),
        {"grid_size": GRID, "num_prefix_tokens": PREFIX},
    )
    out = training_free.make(name, 4, 1 / 4, 1, FACTORS)(q, k, v, **call)
    assert (
        out.shape == full.shape
        and out.isfinite().all()
        and not torch.allclose(out, full, atol=1e-3)
    )
    # what is pooled stands for itself where nothing is left to pool; a window has no keys to route
    if name != "window only" and "pooled" not in name and "counted" not in name:
        torch.testing.assert_close(
            training_free.make(name, 4, 1.0, 1, FACTORS)(q, k, v, **call), full
        )


def test_the_report_is_of_what_was_measured_and_goes_on(tmp_path):
    record = Record(tmp_path / "training_free_cpu.json", resume=False)
    record.notes["machine"] = "a machine"
    cosines = {("1/16", "first sampled"): (0.91, 0.95), ("1/16", "sampled"): (0.98, 0.99)}
    for (share, name), values in cosines.items():
        for draw, value in enumerate(values):
            record.measure(lambda value=value: value, "vit", "china", 1036, name, share, draw)
    text = write_report(record, tmp_path, "first sampled", "sampled")
    assert "| 1/16 | sampled | 0.9850 | 0.9800 | 2 | 0.9800 | 0.9850 |" in text
    assert (tmp_path / "training_free_cpu.md").read_text() == text
    assert (tmp_path / "training_free_cpu.png").stat().st_size > 1000
    again = Record(tmp_path / "training_free_cpu.json", resume=True)
    again.measure(lambda: pytest.fail("measured twice"), "vit", "china", 1036, "sampled", "1/16", 0)
    assert json.loads((tmp_path / "training_free_cpu.json").read_text())["rows"] == again.rows
