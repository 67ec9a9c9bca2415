"""benchmarks.scaling: its counts against PyTorch's, its tables against docs/scaling.md."""

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarks import scaling
from colt5_vision._torch_internals import flash_cpu, flash_cpu_backward
from colt5_vision.ops.routed_window_attention import eager

DOCS = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
SMALL = scaling.Setup(
    img_size=96,
    in_chans=3,
    patch_size=8,
    stem="patch",
    embed_dim=128,
    depth=3,
    num_heads=2,
    window_size=4,
    num_heavy_tokens_kv=1 / 8,
    num_heavy_ff_tokens=1 / 4,
    num_classes=10,
)
CONV = replace(SMALL, stem="conv")
# torch counts the fused attention of GPUs, not that of the CPU
CPU_ATTENTION = {
    flash_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    flash_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


def loss_of(setup, device, batch=1):
    torch.manual_seed(0)
    model = setup.create(device)
    x = torch.randn(batch, setup.in_chans, setup.img_size, setup.img_size, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


@pytest.mark.parametrize(
    "setup", [SMALL, CONV, *scaling.SETUPS], ids=["patch", "conv", *range(len(scaling.SETUPS))]
)
def test_flops_are_those_that_pytorch_counts(setup):
    """Attention, an operator of ours, included.

    The models of the tables run on the meta device, at their full size.
    """
    model, loss = loss_of(setup, "cpu" if setup.depth == 3 else "meta")
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    forward, backward = scaling.forward_flops(setup), scaling.backward_flops(setup)
    seen = sum(forward.values()) + sum(backward.values())
    assert counter.get_total_flops() == pytest.approx(seen, rel=1e-9)
    assert sum(forward[part] for part in scaling.ATTENTION) > 0.01 * seen
    if setup in scaling.SETUPS:
        return
    model.set_grad_checkpointing()
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    again = scaling.checkpointing_flops(setup)
    assert counter.get_total_flops() == pytest.approx(seen + again, rel=1e-9)


@pytest.mark.parametrize("side", [16, 18])
def test_flops_of_attention_are_those_of_the_operator_inside(side):
    """``FlopCounterMode`` within the operator, in plain torch: it sees fused attention, called for
    two parts."""
    setup = replace(SMALL, img_size=8 * side, num_heavy_tokens_kv=32, depth=1)
    heads, width = setup.num_heads, setup.embed_dim // setup.num_heads
    q, k, v = (torch.randn(1, heads, setup.tokens, width) for _ in range(3))
    routed, geometry = (
        torch.randperm(setup.tokens)[None, None, :32],
        eager.Geometry(0, side, side, (4, 4), 0.1),
    )
    weights = torch.zeros(1, 1, 32)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
        out, lse = eager.forward(q, k, v, routed, weights, None, None, geometry)
    forward = counted.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
        eager.backward(out, q, k, v, routed, weights, None, None, out, lse, geometry)
    backward = counted.get_total_flops()
    want, grads = (
        sum(flops(setup)[part] for part in scaling.ATTENTION)
        for flops in (scaling.forward_flops, scaling.backward_flops)
    )
    assert forward == want
    # the log weights' gradient is 8 more features of the routed keys
    assert grads <= backward < 1.1 * grads


def kept_for_backward(setup, checkpointing):
    """Bytes that autograd keeps of one image in bfloat16, other than parameters, on a CUDA device
    that is not there."""
    model = setup.create().to(torch.bfloat16)
    model.set_grad_checkpointing(checkpointing)
    own = [*model.named_parameters(), *model.named_buffers()]
    kept = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = {
            name: torch.empty_like(x, device="cuda").requires_grad_(x.requires_grad)
            for name, x in own
        }
        weights = {x.untyped_storage()._cdata for x in own.values()}
        x = torch.empty(
            1, setup.in_chans, setup.img_size, setup.img_size, device="cuda", dtype=torch.bfloat16
        )

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage  # alive: no other gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.func.functional_call(model, own, (x,))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("setup", scaling.SETUPS, ids=range(len(scaling.SETUPS)))
def test_activations_are_those_that_autograd_keeps(setup):
    """At full size: fake CUDA tensors take the path of a GPU, its fused norm and our kernels'
    operators."""
    want = scaling.ACTIVATION * scaling.saved_elements(setup)
    assert kept_for_backward(setup, False) == pytest.approx(want, rel=0.04)  # rotary tables, logits
    want = scaling.saved_elements(setup, checkpointing=True) - scaling.block_elements(
        setup
    )  # it is run again later
    assert kept_for_backward(setup, True) == pytest.approx(scaling.ACTIVATION * want, rel=0.02)


def test_the_page_shows_what_the_script_prints():
    """If this fails: replace the tables of the page by what ``python -m benchmarks.scaling``
    prints."""
    assert DOCS.count(scaling.tables()) == 1


def test_the_page_has_no_table_of_its_own():
    assert "---" not in DOCS.replace(scaling.tables(), "")


def test_what_the_page_concludes():
    def images(setup, sharded):
        """A GPU, from which communication hides among 64."""
        sent = (
            sum(scaling.gather_scatter_bytes(setup, 64))
            if sharded
            else scaling.all_reduce_bytes(setup, 64)
        )
        return sent / scaling.overlap_seconds(setup, sharded) / scaling.link_rate(64)

    first, *others = (
        [images(setup, sharded) for sharded in (False, True)] for setup in scaling.SETUPS
    )
    assert max(map(max, others)) < min(first) and max(first) < scaling.SETUPS[0].global_batch / 64
    assert max(map(max, others[1:])) < 1  # latents


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="fully_shard takes the accelerator, gloo the CPU"
)
def test_the_snippet_of_the_page_shards_a_model(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names = {}
    meet = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=meet, rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        exec(code.replace("base", "tiny"), names)  # noqa: S102
        parameters = list(names["model"].parameters())
        names["model"](torch.randn(1, 3, 64, 64)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(
        isinstance(p, DTensor) and p.grad.dtype == p.dtype == torch.float32 for p in parameters
    )
