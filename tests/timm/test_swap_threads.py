"""One routed timm model in several threads: each forward sees its own map."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from colt5_vision import routed_layers
from tests.support.swap_cases import CASES, SIZES, at, build, close, image, routed, some


def in_threads(work, count=2):
    """Run ``work(i)`` in threads; their errors are raised here."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


@some("vit", "eva02", "beit", "sam")
def test_threads_share_a_model(case):
    model = routed(build(case, dtype=torch.float32))
    sizes = SIZES if case is CASES["vit"] else (None, None)
    patch = 16
    inputs = [
        image(case, size=s and (patch * s[0], patch * s[1]), seed=i, dtype=torch.float32)
        for i, s in enumerate(sizes)
    ]
    expected = [model(x).detach() for x in inputs]

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                close(model(inputs[i]), expected[i], 1e-5)

    in_threads(work)
    assert not any(layer.calls.exact for layer in routed_layers(model).values())


def test_forwards_that_interleave_in_two_threads_see_their_own_maps():
    """A wide image waits behind its first block until a high one has been embedded."""
    model = routed(build(CASES["vit"], depth=3))
    inputs = [at(size) for size in SIZES]
    expected = [model(x).detach() for x in inputs]
    first_block, second_embedded, first_done = (threading.Event() for _ in range(3))
    me = threading.local()

    def after_block(*_):
        if me.number == 0:
            first_block.set()
            assert second_embedded.wait(20)

    def after_embedding(*_):
        if me.number == 1:
            second_embedded.set()
            assert first_done.wait(20)

    model.blocks[0].register_forward_hook(after_block)
    model.patch_embed.register_forward_hook(after_embedding)

    def work(i):
        me.number = i
        if i == 1:
            assert first_block.wait(20)
        with torch.no_grad():
            close(model(inputs[i]), expected[i])
        if i == 0:
            first_done.set()

    in_threads(work)


def test_a_layers_attributes_are_its_own_when_the_last_thread_has_left():
    model, x = build(CASES["sam"]), image(CASES["sam"])
    expected, layer = model(x).detach(), model.blocks[-1].attn
    routed(model, 1.0)
    inside, leave = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(20)

    layer.proj.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(model, x)
        assert inside.wait(20)
        close(model(x).detach(), expected)
        assert layer.use_rel_pos is False
        leave.set()
        close(other.result().detach(), expected)
    assert layer.use_rel_pos is True


def test_threads_share_a_compiled_model():
    torch.compiler.reset()
    model = routed(build(CASES["vit"], depth=1))
    eager = copy.deepcopy(model)
    model.blocks[0].compile(fullgraph=True, backend="eager")
    inputs = [at(size) for size in SIZES]
    expected = [eager(x).detach() for x in inputs]
    with torch.no_grad():
        for x, y in zip(inputs, expected):
            close(model(x), y)

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                close(model(inputs[i]), expected[i])

    in_threads(work)


def test_a_compiled_block_never_takes_the_map_of_another_thread():
    """Two threads have embedded images of other sizes, of as many tokens, before a block runs."""
    torch.compiler.reset()
    model, tokens = routed(build(CASES["vit"], depth=1)), []
    eager, embedded, refused = copy.deepcopy(model), threading.Barrier(3), threading.Event()
    inputs = [at(size) for size in SIZES]
    eager.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model.blocks[0].compile(fullgraph=True, backend="eager")

    def hold(*_):
        embedded.wait(60)
        assert refused.wait(120)

    model.patch_embed.register_forward_hook(hold)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        expected = [eager(x) for x in inputs]
        others = [pool.submit(torch.no_grad()(model), x) for x in inputs]
        embedded.wait(60)
        with pytest.raises(Exception, match="forwards of several threads over maps of other sizes"):
            model.blocks[0](tokens[0])  # this thread has embedded nothing
        refused.set()
        for other, out in zip(others, expected):
            close(other.result(), out)


def test_a_block_compiled_apart_from_the_embedding_is_refused_without_a_forward():
    torch.compiler.reset()
    model = routed(build(CASES["vit"], depth=1))
    model.blocks[0].compile(fullgraph=True, backend="eager")
    tokens = torch.randn(1, 36, 64, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(Exception, match="compiled apart from what tells the size"):
        model.blocks[0](tokens)
