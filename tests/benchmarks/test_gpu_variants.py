"""Counts of benchmarks.gpu.variants against what the operator says and what its launches get."""

import pytest
import torch

from benchmarks.gpu import variants
from benchmarks.gpu.variant_kernels import INDEXED
from colt5_vision.ops import backend
from colt5_vision.ops.routed_window_attention import api

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="launches are kept, not made")


def counts(mode, keys):
    return variants.counts(mode, 128, keys, 128)


@pytest.mark.parametrize("keys", [4096, 1024])
def test_flops_are_the_operators(keys):
    shape = (1, variants.HEADS, variants.SIDE**2, 128)
    grid = [0, variants.SIDE, variants.SIDE, variants.WINDOW, variants.WINDOW, 1]
    wanted = api._flops(shape, shape, shape, (1, 1, keys), None, None, None, grid)
    assert counts(None, keys).flops == wanted


def test_bytes_of_the_gather_are_those_of_its_tensors():
    found = variants.recorded_call(None, 90, 128, 4096, torch.float16)
    gathered = sum(found[-1].args[name].nbytes for name in ("list_k", "list_v"))
    assert counts(None, 4096).memory - counts(INDEXED, 4096).memory == gathered


def test_one_loop_for_the_window_and_one_for_the_routed_keys():
    """The routed loop has no index and no mask, so it is the shorter one; nothing is spilled."""
    launch = variants.recorded_call(None, 90, 64, 1024, torch.float16)[-1]
    window, routed = variants.instructions(variants.compiled(launch, 90))
    assert routed < window


def test_the_page_says_that_nothing_ran():
    assert "Not run on a GPU" in variants.HEAD and "Not run on a GPU" in variants.RESULT.read_text()
