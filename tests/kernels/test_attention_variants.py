"""The kernels that benchmarks.gpu.variants compares are right, else their counts say nothing."""

import pytest
import torch

from benchmarks.gpu import variants
from colt5_vision.ops import backend
from tests.support.attention_cases import dense, distinct, leaves, operator

DTYPE = torch.float32 if backend.INTERPRETED else torch.float16


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_equals_dense_attention(name, device, launches):
    inputs = [x.detach().to(device) for x in leaves(1, 2, 63, 32, dtype=DTYPE)]
    call = {"grid_size": (7, 9), "window_size": 4, "num_prefix_tokens": 0}
    call["routed_indices"] = distinct((1, 1), 20, 63, seed=5).to(device)
    with variants.variant(variants.VARIANTS[name]):
        found = operator(**call)(*inputs, None)
    call["routed_indices"] = call["routed_indices"].cpu()
    wanted = dense(**call)(*(x.cpu().double() for x in inputs), None)
    limit = 2e-6 if torch.float32 == DTYPE else 4e-3
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=limit)
    assert ("variant_kernel" in launches) == (variants.VARIANTS[name] is not None)
    assert ("gather_kernel" in launches) == (name != "by index")
