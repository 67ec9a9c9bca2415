"""Every module under torch.compile, torch.export and DistributedDataParallel."""

import functools

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.support.marks import further
from tests.support.module_cases import (
    CASES,
    apply,
    assert_same,
    build,
    every_module,
    gradients,
    image,
    some_mask,
)


def compiled(case, backend, dynamic=None):
    torch.compiler.reset()
    module = build(case)
    return module, torch.compile(
        functools.partial(apply, case, module), fullgraph=True, backend=backend, dynamic=dynamic
    )


@every_module
def test_compile_traces_whole_and_gives_the_same(case):
    module, fast = compiled(case, "aot_eager")
    x, mask = image(), some_mask()
    assert_same(
        gradients(case, module, x, mask, fast),
        gradients(case, module, x, mask),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "name, dynamic",
    [
        ("softmax-q", None),
        ("sum-q", True),
        *further(("softmax-cells", True), ("sequence-q-rotary", True), ("cross-q-queried", None)),
    ],
)
def test_compile_with_dynamic_shapes(name, dynamic):
    """Dynamic from the second size on (None) or from the start."""
    case = CASES[name]
    module, fast = compiled(case, "aot_eager", dynamic)
    for batch, (height, width) in enumerate([(9, 7), (12, 5)], 2):
        x = image(batch, height, width)
        assert_same(
            gradients(case, module, x, None, fast), gradients(case, module, x), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["softmax-q", *further("sum-q", "sequence-2-soft")])
def test_inductor_gives_the_same(name):
    case = CASES[name]
    module, fast = compiled(case, "inductor")
    x, mask = image(), some_mask()
    assert_same(
        gradients(case, module, x, mask, fast),
        gradients(case, module, x, mask),
        atol=1e-5,
        rtol=1e-4,
    )


def native(case, x):
    """A map (B, H, W, C) as the module takes it."""
    return {"tokens": x.flatten(1, 2), "last": x, "first": x.permute(0, 3, 1, 2)}[case.layout]


# cells whose number may be 1 make a range of heights that torch cannot prove: it finds one itself
CELLS = "softmax-cells", "sequence-2-soft", "cross-q-blocks"


@every_module
def test_export_of_any_batch_and_height(case):
    """Of a sequence: of any length above its numbers of slots; a row of the map has more, 7
    tokens."""
    module, cells = build(case).eval(), any(case is CASES[name] for name in CELLS)
    least = 7 if case.layout == "tokens" else 1
    height = torch.export.Dim.DYNAMIC if cells else torch.export.Dim("height", min=least)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch"), 2 if case.layout == "first" else 1: height},)
        program = torch.export.export(
            module, (native(case, image(2)),), dynamic_shapes=shapes
        ).module()
        for batch, rows in ((2, 9), (5, 13), (1, 4 if cells else 2)):
            x = native(case, image(batch, rows))
            torch.testing.assert_close(program(x), module(x))


def loss_gradients(case, module, call, x):
    apply(case, call, x).square().mean().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def ddp_worker(rank, name, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        case, x = CASES[name], image(4)
        module = build(case, seed=rank)  # rank 0's parameters are broadcast
        call = nn.parallel.DistributedDataParallel(module)
        grads = loss_gradients(case, module, call, x[2 * rank : 2 * rank + 2])
        torch.save(pytree.tree_map(torch.clone, grads), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_ddp_processes_give_the_gradients_of_the_whole_batch(tmp_path):
    name = "block-softmax-q"
    torch.multiprocessing.spawn(ddp_worker, (name, str(tmp_path)), nprocs=2)
    module = build(CASES[name])
    want = loss_gradients(CASES[name], module, module, image(4))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), want, atol=1e-6, rtol=1e-4)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, mask):
        return self.module(x, mask=mask) * 2


@every_module
def test_a_graph_of_torch_fx_has_one_node_for_it(case):
    module, x, mask = build(case), image(), some_mask()
    traced = torch.fx.symbolic_trace(Around(module))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    for size in (slice(None), slice(1, 6)):
        some, valid = x[:, size], mask[:, size]
        want = 2 * apply(case, module, some, valid)
        torch.testing.assert_close(apply(case, traced, some, valid), want)
