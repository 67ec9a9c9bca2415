"""Distillation of the routers of diffusers models, alone and in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colt5_vision import (
    distill_routers,
    route_attention,
    routed_layers,
    unroute_attention,
)
from tests.support.diffusers_cases import (
    CASES,
    arguments,
    build,
    config,
    every_family,
    run,
    some,
)
from tests.support.diffusers_models import MODELS, outputs
from tests.support.diffusers_models import build as tiny
from tests.support.diffusers_models import run as run_tiny


def learned(case, dtype=torch.float32, **how):
    model = build(case, dtype)
    route_attention(model, config(router="learned", **how))
    return model


def inputs(case, count=2, dtype=torch.float32):
    return [arguments(case, dtype=dtype, seed=seed) for seed in range(count)]


def weights(model):
    return {
        name: part.attention.correction[2].weight.clone()
        for name, part in routed_layers(model).items()
    }


@every_family
def test_routers_learn_and_nothing_else_changes(case):
    model, original = learned(case), build(case, torch.float32)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    history = distill_routers(model, inputs(case), steps=30, lr=3e-2, progress=False)
    assert len(history) == 30 and set(history[0]) == set(case.tokens)
    assert all(abs(ratio - 1) < 1e-4 for ratio in history[0].values())  # starts as router="sampled"
    mean = lambda part: sum(sum(step.values()) / len(step) for step in part) / len(part)
    assert mean(history[-10:]) < 0.99  # measured: 0.82 to 0.96
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state.items())
    assert all(weight.abs().max() > 0 for weight in weights(model).values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    unroute_attention(model)
    assert torch.equal(
        run(model, case, dtype=torch.float32), run(original, case, dtype=torch.float32)
    )


@some("sd15", "ddpm", "flux")
def test_the_teacher_is_full_attention(case):
    model, original = learned(case, torch.float64), build(case)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.sample))
    distill_routers(model, inputs(case, 1, torch.float64), steps=1, progress=False)
    torch.testing.assert_close(seen[0], run(original, case, seed=0), rtol=1e-9, atol=1e-9)


def test_resuming_gives_what_one_go_gives(tmp_path):
    case, how = CASES["sd15"], {"steps": 4, "save_every": 1, "progress": False}

    def stopping():
        yield inputs(case)[0]
        yield inputs(case)[1]
        raise KeyboardInterrupt

    def start():
        torch.manual_seed(0)
        return learned(case)

    first, second, one_go = start(), start(), start()
    with pytest.raises(KeyboardInterrupt):
        distill_routers(first, stopping(), checkpoint=tmp_path / "c.pt", **how)
    resumed = distill_routers(second, inputs(case), checkpoint=tmp_path / "c.pt", **how)
    history = distill_routers(one_go, inputs(case), **how)
    assert resumed == history
    assert all(
        torch.equal(weight, weights(one_go)[name]) for name, weight in weights(second).items()
    )


def test_layers_below_min_tokens_are_left_alone():
    case = CASES["sd15"]
    limit = max(case.tokens.values())
    model = learned(case, min_tokens=limit)
    history = distill_routers(model, inputs(case, 1), steps=2, progress=False)
    large = {name for name, tokens in case.tokens.items() if tokens >= limit}
    assert set(history[0]) == large and len(large) < len(case.tokens)
    assert {name for name, weight in weights(model).items() if weight.abs().max() > 0} == large


def test_errors_name_the_argument():
    case = CASES["ddpm"]
    with pytest.raises(TypeError, match="model: expected a model, such as pipe.unet, got str"):
        distill_routers("unet", [])
    model = build(case, torch.float32)
    route_attention(model, config())
    with pytest.raises(ValueError, match="model: has no learned router"):
        distill_routers(model, inputs(case))
    with pytest.raises(
        ValueError, match="inputs: expected an iterable of batches that starts over"
    ):
        distill_routers(learned(case), [], progress=False)
    with pytest.raises(ValueError, match="steps"):
        distill_routers(learned(case), inputs(case), steps=0)
    bad = inputs(case, 1)
    bad[0]["sample"] = bad[0]["sample"] * float("nan")
    model = learned(case)
    with pytest.raises(ValueError, match="inputs: batch 0 gives an error that is not finite"):
        distill_routers(model, bad, progress=False)
    assert all(weight.abs().max() == 0 for weight in weights(model).values())
    small = enable_small(case)
    with pytest.raises(ValueError, match="inputs: batch 0 reached no map that is routed"):
        distill_routers(small, inputs(case), progress=False)


def test_another_schedule_does_not_resume(tmp_path):
    case, how = CASES["sd15"], {"steps": 2, "progress": False, "checkpoint": tmp_path / "c.pt"}
    distill_routers(learned(case), inputs(case), **how)
    other = learned(case, schedule=[{"min_tokens": 100, "num_heavy_tokens_kv": 7}])
    with pytest.raises(ValueError, match="expected that of the checkpoint"):
        distill_routers(other, inputs(case), **how)


@pytest.mark.parametrize("name", ["ChromaTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_texts_of_different_lengths_are_no_obstacle(name):
    model, call = tiny(name), MODELS[name].call(MODELS[name].grid, 2)
    stock = run_tiny(model, call)
    route_attention(model, config(router="learned"))
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    history = distill_routers(model, [call], steps=8, lr=3e-2, progress=False)
    found = torch.cat([x.flatten() for x in outputs(seen[0])])
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    mean = [sum(step.values()) / len(step) for step in history]
    assert abs(mean[0] - 1) < 1e-4 and mean[-1] < 0.99


@some("sd15", "flux")
def test_autocast_changes_the_errors_little(case):
    ratios = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ratios.append(
                distill_routers(learned(case), inputs(case), steps=4, lr=3e-2, progress=False)[-1]
            )
    for name, ratio in ratios[0].items():
        assert abs(ratios[1][name] - ratio) < 0.1 * ratio, name


def enable_small(case):
    model = build(case, torch.float32)
    route_attention(model, config(router="learned", min_tokens=1024), sample_size=128)
    return model


WORKER = """
import sys, torch
from torch import distributed
from colt5_vision import distill_routers, routed_layers
from tests.diffusers.test_diffusers_distill import CASES, inputs, learned, weights

distributed.init_process_group("gloo")
rank, case = distributed.get_rank(), CASES["ddpm"]
torch.manual_seed(rank)  # routers start alike all the same
model = learned(case)
own = inputs(case, 4)[rank::2]
how = dict(steps=4, progress=True, checkpoint=sys.argv[1] + "/c.pt", save_every=4)
history = distill_routers(model, own, **how)
torch.save(weights(model), f"{sys.argv[1]}/{rank}.pt")
"""


def test_two_processes_train_one_router(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
    ]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(tmp_path / "worker.py"),
        str(tmp_path),
    ]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(
        torch.equal(weight, two[name]) and weight.abs().max() > 0 for name, weight in one.items()
    )
    assert done.stderr.count("4/4") >= 1 and (tmp_path / "c.pt").exists()
