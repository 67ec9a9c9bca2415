"""Several processes: context and tensor parallelism, which share the heads, and DDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.support import parallel_worker
from tests.support.parallel_worker import GRADIENTS, ROUTED, TENSOR, TEXT

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory, worker_id):
    """What each of two processes found; made once for all of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "parallel"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            done = subprocess.run(
                [*launch, parallel_worker.__file__, str(folder)],
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


HISTORY = ["history, all", "history, sampled"]


@pytest.mark.parametrize("key", [*ROUTED, "three heads", *TEXT, *HISTORY, *TENSOR])
def test_processes_that_share_the_heads_route_them_to_the_keys_of_one(results, key):
    for found in results:
        stock, alone, together, routed, exact = found["routed"][key]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert routed and not exact
        if key.endswith("all"):
            torch.testing.assert_close(together, stock, rtol=1e-5, atol=1e-5)
        else:
            assert (alone - stock).abs().max() > 1e-3


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_of_processes_add_up_to_those_of_one(results, key):
    for found in results:
        (alone, together), routed, exact = found["gradients"][key]
        for one, several in zip(alone, together, strict=True):  # of the model, of the routers
            assert one.abs().max() > 0
            torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
        assert routed and not exact


def test_compiled_blocks_are_routed_alike_forward_and_backward(results):
    for found in results:
        for one, several in zip(*found["compiled"], strict=True):
            scale = float(one.abs().max())
            torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-5 * scale)


REASONS = {
    "a plan of one's own": "context parallelism by a plan that diffusers has not made for this "
    "model",
    "grouped": "heads in several processes, which router='grouped' cannot take",
    "schedule": "the schedule says so",
}


@pytest.mark.parametrize("key", REASONS)
def test_what_context_parallelism_keeps_exact_is_counted(results, key):
    for found in results:
        stock, _, together, routed, exact = found["exact"][key]
        torch.testing.assert_close(together, stock, rtol=1e-5, atol=1e-5)
        assert not routed and list(exact) == [REASONS[key]]


def test_a_processor_that_exchanges_nothing_is_left_to_its_part(results):
    for found in results:
        before, after, routed, exact = found["unexchanged"]
        assert torch.equal(after, before) and not routed
        assert list(exact) == ["12 keys are not a map of 4 x 6 tokens and its other tokens"]


def test_context_parallelism_is_as_it_was_when_routing_is_undone(results):
    for found in results:
        assert torch.equal(*found["undone"])


def test_routers_are_distilled_under_ulysses(results):
    (history, before, weights), (other, _, same) = (found["distilled"] for found in results)
    assert torch.equal(weights, same) and len(history) == len(other) == 2
    assert (weights - before).abs().min() > 1e-3
    assert all(0 < ratio < 100 for step in history for ratio in step.values())


def test_ring_attention_is_refused(results):
    for found in results:
        assert len(found["ring"]) == 2
        assert all("ring attention gives every process a part" in text for text in found["ring"])


def test_ddp_trains_a_model_whose_routers_no_forward_uses(results):
    for found in results:
        assert len(found["ddp"]) == 6 and all(loss.isfinite() for loss in found["ddp"])
