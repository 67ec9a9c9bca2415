"""Token by token with a cache: what the whole sequence gives, at a size that does not grow."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from colt5_vision.causal.cache import AutoregressiveCache
from colt5_vision.causal.routing import Threshold
from tests.core.test_autoregressive import (
    DIM,
    W,
    build,
    every_case,
    masked_or_not,
    some_mask,
    tokens,
)
from tests.support.marks import further


def decode(module, x, mask, prompt, chunk, **counts):
    """A prompt at once, the rest in chunks: all outputs, and the last cache."""

    def part(start, end):
        return {"x": x[:, start:end], "mask": None if mask is None else mask[:, start:end]}

    out, cache = module(**part(0, prompt), return_cache=True, **counts)
    outs = [out]
    for start in range(prompt, x.shape[1], chunk):
        out, cache = module(**part(start, start + chunk), cache=cache)
        outs.append(out)
    return torch.cat(outs, 1), cache


@every_case
@masked_or_not
@torch.no_grad()
def test_decoding_equals_the_full_pass(name, masked):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module, x = build(name, dtype), tokens(3, 45, dtype)
        mask = some_mask(3, 45) if masked else None
        want = module(x, mask=mask)
        # within, at and behind the borders of windows of 4, 8 and 16; one, several and many tokens
        # at a time
        for prompt, chunk in ((1, 1), (5, 1), (8, 3), (16, 7), (17, 40), (44, 1)):
            got, cache = decode(module, x, mask, prompt, chunk)
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)
            assert cache.position == 45
        # and the cache of the whole is that of the parts
        whole = module(x, mask=mask, return_cache=True)[1]
        torch.testing.assert_close(
            module(x[:, :9], cache=whole)[0], module(x[:, :9], cache=cache)[0]
        )


@torch.no_grad()
def test_counts_of_each_sample_are_kept():
    module, x = build("queries-2-soft"), tokens(3, 45)
    counts = {
        "num_heavy_tokens_q": torch.tensor([1, 3, 2]),
        "num_heavy_tokens_kv": torch.tensor([4, 1, 5]),
    }
    want = module(x, **counts)
    assert not torch.allclose(want, module(x))
    torch.testing.assert_close(decode(module, x, None, 11, 2, **counts)[0], want)
    shares = {"num_heavy_tokens_kv": torch.tensor([0.04, 0.1, 0.9], dtype=torch.float64)}
    for mask in (None, some_mask(3, 45)):
        want = module(x, mask=mask, **shares)
        torch.testing.assert_close(decode(module, x, mask, 11, 2, **shares)[0], want)
        torch.testing.assert_close(decode(module, x, mask, 3, 1, **shares)[0], want)
    whole_number = {"num_heavy_tokens_q": 1, "num_heavy_tokens_kv": 9}
    torch.testing.assert_close(
        decode(module, x, None, 11, 2, **whole_number)[0], module(x, **whole_number)
    )


def tensors(cache):
    for field in dataclasses.fields(cache):
        value = getattr(cache, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, torch.Tensor):
                yield part


@torch.no_grad()
def test_the_cache_does_not_grow():
    module = build("queries-2-rotary")
    for prompt in (1, 40, 400):
        _, cache = decode(module, tokens(2, prompt + 2 * W), None, prompt, 1)
        held = sum(part.numel() for part in tensors(cache))
        assert (
            held <= 2 * (2 * 2 * W + W + 11 + 10) * 2 * 16
        )  # samples · tokens · keys and values of both heads
        stored = sum(part.untyped_storage().nbytes() for part in tensors(cache))
        _, fresh = module(tokens(2, prompt), return_cache=True)
        assert (
            sum(part.untyped_storage().nbytes() for part in tensors(fresh)) <= 8 * 3 * held
            and stored <= 8 * 3 * held
        )


@torch.no_grad()
def test_one_cache_is_continued_in_several_ways():
    module, x = build("queries"), tokens(3, 30)
    cache = module(x[:, :13], return_cache=True)[1]
    other = tokens(3, 17, seed=8)
    first = module(x[:, 13:], cache=cache)[0]
    torch.testing.assert_close(
        module(other, cache=cache)[0], module(torch.cat([x[:, :13], other], 1))[:, 13:]
    )
    assert torch.equal(module(x[:, 13:], cache=cache)[0], first)
    for same in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(module(x[:, 13:], cache=same)[0], first)
    chosen = torch.tensor([2, 0, 2, 1])
    torch.testing.assert_close(module(x[chosen, 13:], cache=cache.select(chosen))[0], first[chosen])
    counts = {
        "num_heavy_tokens_q": torch.tensor([1, 3, 2]),
        "num_heavy_tokens_kv": torch.tensor([4, 1, 5]),
    }
    cache = module(x[:, :13], return_cache=True, **counts)[1].select(chosen)
    torch.testing.assert_close(
        module(x[chosen, 13:], cache=cache)[0], module(x, **counts)[chosen, 13:]
    )
    assert isinstance(cache.threshold, Threshold) and cache.light.shape[1] == 4


def test_gradients_pass_through_a_cache():
    module, x = build("queries-2-soft"), tokens(2, 30).requires_grad_()
    weight = tokens(2, 30, seed=5)
    wanted = [x, *module.parameters()]
    want = torch.autograd.grad((module(x) * weight).sum(), wanted)
    got = torch.autograd.grad((decode(module, x, None, 13, 6)[0] * weight).sum(), wanted)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    module, x = build("queries", torch.float32), tokens(2, 30, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = decode(module, x, None, 13, 1)[0], module(x)
    assert (got - want).norm() <= 0.02 * want.norm()


def test_a_cache_of_another_module_or_batch_is_refused():
    module, x = build("queries"), tokens(3, 9)
    cache = module(x, return_cache=True)[1]
    for other, given in ((module, x[:2]), (build("queries-2-rotary"), x), (build("all"), x)):
        with pytest.raises(ValueError, match="^cache: expected one of this module and batch"):
            other(given, cache=cache)
    with pytest.raises(ValueError, match="^num_heavy_tokens_q, num_heavy_tokens_kv: a cache keeps"):
        module(x, cache=cache, num_heavy_tokens_kv=3)
    with pytest.raises(TypeError, match="^cache: expected an AutoregressiveCache"):
        module(x, cache=(1, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.position = 0
    assert (
        isinstance(cache, AutoregressiveCache)
        and cache.pending.shape[1] == 1
        and x.shape[-1] == DIM
    )


@pytest.mark.parametrize("name, begun", [("queries", 3), *further(("queries", 11), ("all", 3))])
@torch.no_grad()
def test_steps_compile_whole_over_many_windows(name, begun):
    """A handful of graphs serves all steps: torch stops at 8 of one function."""
    module, x = build(name, torch.float32), tokens(2, 6 * W, dtype=torch.float32)
    counter = CompileCounter()
    torch.compiler.reset()
    step = torch.compile(module, fullgraph=True, backend=counter)
    want = module(x)
    out, cache = module(x[:, :begun], return_cache=True)
    for i in range(begun, x.shape[1]):
        out, cache = step(x[:, i : i + 1], cache=cache)
        torch.testing.assert_close(out[:, 0], want[:, i])
    assert counter.frame_count <= 8
