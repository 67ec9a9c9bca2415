"""Context parallelism: a sequence over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = """
import sys, warnings
import torch
from torch import distributed
from diffusers import ContextParallelConfig
from colt5_vision import route_attention, unroute_attention
from tests.support.diffusers_models import MODELS, build, run

torch.set_num_threads(1)
warnings.simplefilter("ignore", RuntimeWarning)
distributed.init_process_group("gloo")
torch._C._accelerator_getAccelerator = lambda: torch.device("cpu")  # as one of an accelerator
results = {}

def compare(key, name, **how):
    model, call = build(name), MODELS[name].call(MODELS[name].grid, 1) | {"return_dict": False}
    call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :4]  # an even number
    call.pop("encoder_hidden_states_mask", None)
    stock = run(model, call)
    report = route_attention(model, window_size=2, min_tokens=1, **how)
    alone = run(model, call)
    report.reset_calls()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    together = run(model, call)
    results[key] = (stock, alone, together, report.calls.routed, dict(report.calls.exact))
    report.reset_calls()
    model(**call)
    return report.calls

compare("all", "WanTransformer3DModel", num_heavy_tokens_kv=1.0)
calls = compare("grid", "WanTransformer3DModel", num_heavy_tokens_kv=0.25, router="grid")
assert not calls.routed and "gradients of full attention" in str(calls.exact), calls
compare("text", "QwenImageTransformer2DModel", num_heavy_tokens_kv=0.25)
torch.save(results, f"{sys.argv[1]}/{distributed.get_rank()}.pt")
"""


def test_ulysses_gives_each_process_whole_sequences_to_route(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for key in ("all", "grid"):
            _, alone, together, routed, exact = found[key]
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
            assert routed and not exact
        stock, alone, together, routed, exact = found["text"]
        torch.testing.assert_close(together, stock, rtol=1e-5, atol=1e-5)
        assert (alone - stock).abs().max() > 1e-4 and not routed
        assert list(exact) == [
            "context parallelism puts parts of the text between parts of the map"
        ]
