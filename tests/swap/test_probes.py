"""What a few queries with full attention tell SampledAttention."""

import pytest
import torch
import torch.nn.functional as F

from colt5_vision.swap import probes
from colt5_vision.swap.sampled import SampledAttention
from tests.support.attention_cases import randn
from tests.support.dense import dense_attention, window_of
from tests.swap.test_sampled import GRID, TOKENS, close, routed_keys, routing, some_mask, tensors


@pytest.mark.parametrize("masked", [False, True])
def test_importance_is_the_part_in_the_outputs_beyond_the_window(masked):
    q, k, v = tensors(2)
    mask = some_mask(2, 2) if masked else torch.ones(2, TOKENS + 2, dtype=torch.bool)
    found = routing().probe(
        q, k, v, grid_size=GRID, num_prefix_tokens=2, key_mask=mask if masked else None
    )
    p = ((q @ k.mT) * 8**-0.5).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    assert found.rows.sort().values.tolist() == list(range(TOKENS))
    out = (p @ v)[:, :, 2:][:, :, found.rows]
    close(found.out.where(found.valid, 0), out.where(found.valid, 0))
    window = window_of(*GRID, 3)
    p = p[:, :, 2:, 2:] * (window[:, None] != window) * mask[:, None, 2:, None]
    part = p.square().sum(2)
    mean = (part.sqrt().unsqueeze(-1) * v[:, :, 2:]).sum(2, keepdim=True) / part.sqrt().sum(-1)[
        ..., None, None
    ]
    expected = (part * (v[:, :, 2:] - mean).square().sum(-1)).sum(1).sqrt()
    close(found.importance.exp()[mask[:, 2:]], expected[mask[:, 2:]])


def test_values_all_alike_leave_nothing_to_choose():
    q, k, v = tensors()
    v = v[:, :, :1].expand_as(v)
    part = routing(6)
    assert all(x.isfinite().all() for x in routed_keys(part, q, k, v, grid_size=GRID))
    close(part(q, k, v, grid_size=GRID), v)


def test_few_probes_help_the_queries_around_them(monkeypatch):
    """Queries of three kinds, a probe for each and more."""
    monkeypatch.setattr(probes, "_PROBES", 12)
    q, k, v = tensors(sharpness=0.7)
    q = q[:, :, torch.arange(TOKENS) % 3] + 0.1 * randn(*q.shape, seed=5)
    full = F.scaled_dot_product_attention(q, k, v)
    part, call = routing(8, window=1), {"grid_size": GRID}
    found = routed_keys(part, q, k, v, **call)
    plain = dense_attention(q, k, v, GRID, 1, *found, own=False)
    error = lambda x: (x - full).square().mean().sqrt().item()
    assert error(part(q, k, v, **call)) < 0.5 * error(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_far_from_all_probes_stay_finite(dtype):
    """In units of the probes' spread they are farther than float16 can count."""
    rows = probes.morton_order(32, 32, "cpu")[(torch.arange(64) * 2 + 1) * 1024 // 128]
    q, k, v = (3 * randn(1, 2, 1024, 16, seed=seed) for seed in range(3))
    q[:, :, rows] = 0.01
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = SampledAttention(window_size=8, num_heavy_tokens_kv=64)(q, k, v, grid_size=(32, 32))
    assert out.isfinite().all()
