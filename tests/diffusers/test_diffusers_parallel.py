"""Several processes: context and tensor parallelism, which share the heads, and DDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys, warnings
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from colt5_vision import distill_routers, route_attention, routed_layers
from tests.diffusers.test_diffusers_parallel import ROUTED, TENSOR
from tests.support.diffusers_cases import CASES, arguments, config, spread
from tests.support.diffusers_cases import build as build_case
from tests.support.diffusers_models import MODELS, build, run, wan

torch.set_num_threads(1)
warnings.simplefilter("ignore", RuntimeWarning)
distributed.init_process_group("gloo")
torch._C._accelerator_getAccelerator = lambda: torch.device("cpu")  # as one of an accelerator
ULYSSES, RING = ContextParallelConfig(ulysses_degree=2), ContextParallelConfig(ring_degree=2)
WAN, QWEN = "WanTransformer3DModel", "QwenImageTransformer2DModel"
results = {}

def call(name):
    given = MODELS[name].call(MODELS[name].grid, 1) | {"return_dict": False}
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :4]  # an even number
    given.pop("encoder_hidden_states_mask", None)
    return given

def route(model, **how):
    torch.manual_seed(0)
    report = route_attention(model, **{"window_size": 2, "min_tokens": 1} | how)
    for layer in routed_layers(model).values():
        if how.get("router") == "learned":
            torch.nn.init.normal_(layer.attention.correction[-1].weight, std=3)
    return report

def compare(key, name, model=None, parallel=ULYSSES, **how):
    model, given = build(name) if model is None else model, call(name)
    stock = run(model, given)
    report = route(model, **how)
    alone = run(model, given)
    report.reset_calls()
    model.enable_parallelism(config=parallel)
    together = run(model, given)
    results[key] = (stock, alone, together, report.calls.routed, dict(report.calls.exact))
    return model, report

# Ulysses: every process has all tokens of some heads
for key, how in ROUTED.items():
    compare(key, WAN, **how)
anything = ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)
three = spread(wan(num_attention_heads=3))
compare("three heads", WAN, three, anything, num_heavy_tokens_kv=0.25, router="learned")
compare("text", QWEN, num_heavy_tokens_kv=0.25)
compare("grouped", WAN, num_heavy_tokens_kv=0.25, router="grouped")

# tensor parallelism: likewise, with the text
tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
for key, how in TENSOR.items():
    compare(key, QWEN, parallel=TensorParallelConfig(tp_degree=2), **how)

model, report = compare("gradients", WAN, num_heavy_tokens_kv=0.25)
report.reset_calls()
with torch.enable_grad():
    out = model(**call(WAN))[0].detach().flatten()
found = (*results["gradients"][:2], out, report.calls.routed, dict(report.calls.exact))
results["gradients"] = found

model, _ = compare("distilled", WAN, num_heavy_tokens_kv=0.25, router="learned")
weights = [layer.attention.correction[-1].weight for layer in routed_layers(model).values()]
before = torch.cat(weights).detach().clone()
history = distill_routers(model, [call(WAN)], steps=2, lr=0.1, progress=False)
weights = [layer.attention.correction[-1].weight for layer in routed_layers(model).values()]
results["weights"] = (history, before, torch.cat(weights).detach())

# ring attention is refused in either order
refused = []
def refuse(function, *args, **how):
    try:
        function(*args, **how)
    except ValueError as error:
        refused.append(str(error))
model = build(WAN)
route(model)
model.enable_parallelism(config=RING)
refuse(run, model, call(WAN))
model = build(WAN)
model.enable_parallelism(config=RING)
refuse(route_attention, model, min_tokens=1)
results["ring"] = refused

# DDP: a router that no forward uses has no gradient
losses = []
for how in ({"min_tokens": 200}, {"schedule": [{"min_timestep": 400, "full": True}]}, {}):
    model = build_case(CASES["sd15"], torch.float32).train()
    route_attention(model, config(router="learned", **how))
    parallel = DistributedDataParallel(model)
    for seed in range(2):
        given = arguments(CASES["sd15"], dtype=torch.float32, seed=seed)
        loss = parallel(**given, return_dict=False)[0].square().mean()
        loss.backward()
        losses.append(loss.detach())
results["ddp"] = losses
torch.save(results, f"{sys.argv[1]}/{distributed.get_rank()}.pt")
"""
ROUTED = {
    "all": {"num_heavy_tokens_kv": 1.0},
    "sampled": {"num_heavy_tokens_kv": 0.25},
    "some queries": {"num_heavy_tokens_kv": 0.25, "num_heavy_tokens_q": 0.5},
    **{
        router: {"num_heavy_tokens_kv": 0.25, "router": router}
        for router in ("learned", "mean_query", "grid")
    },
}
TENSOR = {f"tensor, {name}": ROUTED[name] for name in ("all", "sampled", "learned")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, str(folder / "worker.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("key", [*ROUTED, "three heads", *TENSOR])
def test_processes_that_share_the_heads_route_them_to_the_keys_of_one(results, key):
    for found in results:
        stock, alone, together, routed, exact = found[key]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert routed and not exact
        assert key.endswith("all") or (alone - stock).abs().max() > 1e-3


REASONS = {
    "text": "context parallelism puts parts of the text between parts of the map",
    "gradients": "context parallelism computes gradients of full attention",
    "grouped": "heads in several processes, which router='grouped' cannot take",
}


@pytest.mark.parametrize("key", REASONS)
def test_what_context_parallelism_takes_apart_is_exact_and_counted(results, key):
    for found in results:
        stock, _, together, routed, exact = found[key]
        torch.testing.assert_close(together, stock, rtol=1e-5, atol=1e-5)
        assert not routed and list(exact) == [REASONS[key]]


def test_routers_are_distilled_under_ulysses(results):
    (history, before, weights), (other, _, same) = (found["weights"] for found in results)
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
