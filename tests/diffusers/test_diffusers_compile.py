"""Routed diffusers models compiled whole and block by block, and with gradient checkpointing."""

from functools import partial

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from colt5_vision import (
    route_attention,
    routed_layers,
    unroute_attention,
)
from colt5_vision.swap.report import NEVER_ROUTED
from tests.support.diffusers_cases import (
    CASES,
    arguments,
    build,
    close,
    config,
    every_family,
    flux,
    pixart,
    run,
    sd3,
    some,
    unet,
)
from tests.support.marks import further


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def enable(model, share=0.25, size=None, **how):
    route_attention(model, config(share, **how), sample_size=size)
    return model


def compiled(model):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


def one_block():
    plain = {"block_out_channels": (16,), "mid_block_type": None}
    return unet(**plain, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",))


def one_map():
    blocks = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    }
    return diffusers.UNet2DModel(
        **blocks, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, sample_size=16
    )


EVEN = ((26, 42), (42, 26), (18, 24))
SHALLOW = {
    "sd15": CASES["sd15"]._replace(make=one_block),
    "ddpm": CASES["ddpm"]._replace(make=one_map),
    "pixart": CASES["pixart"]._replace(make=partial(pixart, num_layers=1), sizes=EVEN),
    "sd3": CASES["sd3"]._replace(make=partial(sd3, num_layers=1), sizes=EVEN),
}
FLUX = CASES["flux"]._replace(make=partial(flux, num_layers=1, num_single_layers=1))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("sd15", "learned"),
        ("sd3", "sampled"),
        *further(("sd15", "sampled"), ("ddpm", "sampled"), ("pixart", "sampled")),
    ],
)
def test_one_graph_serves_all_sizes_as_many_as_the_stock_model_makes(name, router):
    case = SHALLOW[name]
    sizes, graphs = (case.sizes[0], case.sizes[2]), []
    for model in (build(case), enable(build(case), router=router)):
        expected = [run(model, case, size) for size in sizes]
        fast, counter = compiled(model)
        for size, out in zip(sizes, expected, strict=True):
            close(run(fast, case, size), out)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0]


def test_flux_compiled_whole_reads_the_size_of_each_call():
    model = enable(build(FLUX))
    sizes = (FLUX.size, (18, 24), FLUX.size)
    expected = [run(model, FLUX, size) for size in sizes]
    fast, _ = compiled(model)
    for size, out in zip(sizes, expected, strict=True):
        close(run(fast, FLUX, size), out)


SEVERAL = (
    (26, 42),
    (42, 26),
    (18, 24),
    (24, 18),
    (30, 30),
    (34, 22),
    (38, 26),
    (40, 28),
    (44, 20),
    (22, 46),
)


@pytest.mark.parametrize(
    ("case", "more"), [(FLUX, 2), *further((SHALLOW["sd15"], 0))], ids=["flux", "sd15"]
)
def test_blocks_compiled_one_by_one_make_no_graph_for_each_size(case, more):
    graphs = []
    for routed in (False, True):
        torch.compiler.reset()
        model, eager = build(case), build(case)
        if routed:
            enable(model), enable(eager)
        counter = CompileCounterWithBackend("eager")
        for block in model.modules():
            if type(block).__name__ in ("BasicTransformerBlock", *model._repeated_blocks):
                block.compile(fullgraph=True, dynamic=True, backend=counter)
        for size in SEVERAL:
            close(run(model, case, size), run(eager, case, size))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs[1] <= graphs[0] + more


def told_of(warned):
    return [w for w in warned if NEVER_ROUTED in str(w.message)]


@pytest.mark.parametrize("which", ["compiled", "in place"])
def test_routing_is_switched_after_compiling(which, recwarn):
    case = SHALLOW["pixart"]
    model = build(case)
    expected = run(model, case)
    few = run(enable(build(case)), case)
    if which == "in place":
        model.compile(fullgraph=True, backend="eager")
        fast = model
    else:
        fast = torch.compile(model, fullgraph=True, backend="eager")
    close(run(fast, case), expected)
    report = route_attention(fast, config())
    assert set(routed_layers(model)) == set(routed_layers(fast)) == {"transformer_blocks.0.attn1"}
    assert not report.calls.compiled and "not counted" not in str(report)
    close(run(fast, case), few)
    assert report.calls.compiled and not report.calls.routed and not report.calls.exact
    assert "calls in compiled graphs are not counted" in str(report) and not told_of(recwarn)
    unroute_attention(fast)
    close(run(fast, case), expected)


def test_a_layer_whose_forward_alone_is_compiled_is_routed(recwarn):
    case = SHALLOW["pixart"]
    expected = run(enable(build(case)), case)
    model = build(case)
    attn = model.transformer_blocks[0].attn1
    attn.forward = torch.compile(attn.forward, backend="eager")
    report = route_attention(model, config())
    for _ in range(2):
        close(run(model, case), expected)
    assert report.calls.compiled or report.calls.routed == 2
    assert not told_of(recwarn)


def test_a_compiled_model_keeps_its_schedule():
    case = SHALLOW["pixart"]
    rules = [
        {"min_timestep": 600, "full": True},
        {"max_tokens": 100, "num_heavy_tokens_kv": 0.5},
    ]
    model = enable(build(case), schedule=rules)
    calls = [arguments(case, size) for size in ((26, 26), (13, 21))]
    calls += [call | {"timestep": torch.full_like(call["timestep"], 900)} for call in calls]
    with torch.no_grad():
        expected = [model(**call, return_dict=False)[0] for call in calls]
        fast = compiled(model)[0]
        close([fast(**call, return_dict=False)[0] for call in calls], expected)


def gradients(model, *calls):
    """Of the sum of the losses of several forwards, in training mode."""
    model.train().zero_grad()
    torch.manual_seed(3)
    sum(model(**call, return_dict=False)[0].square().mean() for call in calls).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_family
def test_checkpointing_gives_the_same_gradients(case):
    sizes = case.sizes[:2]  # transposed ones, both in flight
    model = enable(build(case))
    expected = gradients(model, *(arguments(case, size) for size in sizes))
    full = gradients(build(case), *(arguments(case, size) for size in sizes))
    assert any((expected[name] - full[name]).abs().max() > 1e-4 for name in full)
    ran, count = [], len(case.tokens)
    for processor in routed_layers(model).values():
        processor.attention.register_forward_hook(lambda *_: ran.append(1))
    model.enable_gradient_checkpointing()
    for _ in range(2):
        ran.clear()
        close(gradients(model, *(arguments(case, size) for size in sizes)), expected)
        again = 0 if case is CASES["ddpm"] else count  # diffusers does not checkpoint its attention
        assert len(ran) == len(sizes) * (count + again)


@some("sd15", "pixart", "sd35", "flux")
def test_checkpointing_is_the_stock_models_when_every_key_is_routed(case):
    stock, model = build(case), enable(build(case), 1.0)
    for each in (stock, model):
        each.enable_gradient_checkpointing()
    call = arguments(case)
    close(gradients(model, call), gradients(stock, call))


@some("sd15", "flux")
def test_checkpointing_with_a_run_between_forward_and_backward(case):
    model = enable(build(case)).train()
    expected = gradients(model, arguments(case, case.sizes[0]))
    model.enable_gradient_checkpointing()
    model.zero_grad()
    loss = model(**arguments(case, case.sizes[0]), return_dict=False)[0].square().mean()
    run(model, case, case.sizes[1])
    loss.backward()
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)
