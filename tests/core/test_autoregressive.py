"""The autoregressive attention: strictly causal at every position, equal to a token-by-token twin,
and the module bars."""

import copy
import functools
import io
import pickle

import pytest
import torch
from colt5_attention.transformer_block import (
    ConditionalRoutedAutoregressiveAttention as Predecessor,
)
from torch.nn.functional import normalize

from colt5_vision.causal.attention import ConditionalRoutedAutoregressiveAttention
from colt5_vision.causal.routing import (
    CausalRouter,
    admit_queries,
    first_slots,
    key_limit,
    query_threshold,
    running_topk,
)
from colt5_vision.compat import convert_colt5_attention_state_dict
from colt5_vision.ops import soft_topk
from tests.support.autoregressive_twin import twin
from tests.support.marks import further

DIM, W = 16, 8
SMALL = {
    "light_dim_head": 8,
    "light_heads": 2,
    "light_window_size": W,
    "heavy_dim_head": 8,
    "heavy_heads": 2,
}
Attention = functools.partial(
    ConditionalRoutedAutoregressiveAttention, DIM, num_heavy_tokens_kv=5, **SMALL
)
SOFT = {
    "router_straight_through": False,
    "multiply_keys_by_score": True,
    "multiply_queries_by_score": True,
}
CASES = {
    "all": {},
    "queries": {"num_heavy_tokens_q": 3},
    "queries-2-rotary": {
        "num_heavy_tokens_q": 0.5,
        "num_routed_kv": 2,
        "rotary_emb": True,
        "num_heavy_tokens_kv": 11,
    },
    "queries-2-soft": {"num_heavy_tokens_q": 3, "num_routed_kv": 2, **SOFT},
    "narrow": {"num_heavy_tokens_q": 2, "heavy_window_size": 4, "use_null_q_tokens": False},
    "wide": {"num_heavy_tokens_q": 5, "heavy_window_size": 2 * W},
    "iterated": {"num_heavy_tokens_q": 3, "router_kwargs": {"n_iters": 10, "eps": 0.5}, **SOFT},
    "random": {"num_heavy_tokens_q": 3, "num_routed_kv": 2, "router": "random"},
    "grid": {"num_heavy_tokens_q": 3, "num_routed_kv": 2, "router": "grid"},
}
every_case = pytest.mark.parametrize("name", CASES)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


def build(name="queries", dtype=torch.float64, seed=0, **kwargs):
    """The module with every parameter off its initial zero."""
    torch.manual_seed(seed)
    module = Attention(**{**CASES[name], **kwargs})
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.to(dtype)


def tokens(batch, length, dtype=torch.float64, seed=1):
    return torch.randn(
        batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def some_mask(batch, length, seed=2):
    """Holes, padding on the left of one sample and on the right of another."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0, : length // 3] = False
    mask[-1, length - length // 3 :] = False
    return mask


def gradients(module, x, mask=None, call=None, **kwargs):
    """Output, and the gradients by x and the parameters of a loss that weighs each sample and token
    differently."""
    x = x.detach().clone().requires_grad_()
    out = (module if call is None else call)(x, mask=mask, **kwargs)
    loss = out * tokens(*x.shape[:2], dtype=out.dtype, seed=7)
    return out.detach(), torch.autograd.grad(loss.sum(), [x, *module.parameters()])


def changed_before(module, x, mask=None):
    """At how many positions p a change of token p alone changes an output before p: a batch of all
    changes at once."""
    length = x.shape[1]
    masks = {} if mask is None else {"mask": mask.expand(length, -1)}
    many = x.repeat(length, 1, 1)
    place = torch.arange(length)
    many[place, place] = 3 * tokens(1, length, x.dtype, seed=9)[0]
    base = module(x.expand(length, -1, -1).contiguous(), **masks)
    moved = (module(many, **masks) - base).abs().amax(-1) > 1e-12
    assert mask is not None or moved.diagonal().all(), (
        "a token that its own output does not hang on"
    )
    return moved.tril(-1).any(1).sum().item(), moved


@every_case
@masked_or_not
def test_no_change_reaches_back(name, masked):
    module = build(name)
    for length in (1, 5, 63, 64, 111):
        mask = some_mask(2, length)[:1] if masked else None
        before, moved = changed_before(module, tokens(1, length), mask)
        assert before == 0
        if length == 111 and not masked:
            assert moved[:W, 4 * W :].any(), "the far past is not seen at all"


@every_case
@masked_or_not
def test_no_gradient_reaches_forward(name, masked):
    """Sample i of a batch of copies asks for output i alone: its gradient is d out_i / d x_j of all
    j."""
    module = build(name)
    for length in (5, 64, 75):
        x = tokens(1, length).repeat(length, 1, 1).requires_grad_()
        mask = some_mask(2, length)[:1].expand(length, -1) if masked else None
        out = module(x, mask=mask)[torch.arange(length), torch.arange(length)]
        (grad,) = torch.autograd.grad((out * tokens(1, length, seed=5)[0]).sum(), x)
        reached = (grad != 0).any(-1)
        assert not reached.triu(1).any()
        assert masked or reached.diagonal().all()


def test_the_predecessor_leaks():
    """Its top-k of a window's own queries lets a later token push an earlier one out."""
    torch.manual_seed(0)
    theirs = Predecessor(DIM, num_heavy_tokens_q=3, num_heavy_tokens_kv=5, **SMALL).double()
    assert changed_before(theirs, tokens(1, 63))[0] >= 10
    ours = build("queries")
    assert changed_before(ours, tokens(1, 63))[0] == 0


@pytest.mark.parametrize(
    "name", [name for name in CASES if "rotary" not in name and name != "iterated"]
)
@masked_or_not
@torch.no_grad()
def test_equals_the_twin(name, masked):
    module = build(name, router_kwargs={"fetch_k_ratio": 1.25})
    for length in (5, 47):
        x, mask = tokens(2, length), some_mask(2, length) if masked else None
        out = module(x, mask=mask)
        for i in range(2):
            want = twin(module, x[i], None if mask is None else mask[i])
            torch.testing.assert_close(out[i], want.to(out.dtype), atol=1e-10, rtol=0)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("light", [W, 2 * W])
def test_parity_with_the_predecessor(rotary, light):
    """All queries, one route, one sample, tokens so short that no gate is capped."""
    given = {**SMALL, "light_window_size": light, "heavy_window_size": W, "rotary_emb": rotary}
    torch.manual_seed(0)
    theirs = Predecessor(DIM, num_heavy_tokens_q=W, num_heavy_tokens_kv=5, **given).double()
    ours = Attention(num_heavy_tokens_q=W, **given).double()
    ours.load_state_dict(convert_colt5_attention_state_dict(theirs.state_dict(), ours))
    for length in (24, 37):
        x = normalize(tokens(1, length), dim=-1)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError):
        theirs(x[:, : W - 3])  # the predecessor needs more than a window, ours does not
    assert ours(x[:, : W - 3]).isfinite().all()
    # what is left is the float32 of its frequencies
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6 if rotary else 1e-12, rtol=0)


@every_case
@masked_or_not
def test_a_batch_gives_what_its_samples_give(name, masked):
    module, x = build(name), tokens(3, 29)
    mask = some_mask(3, 29) if masked else None
    out, grads = gradients(module, x, mask)
    weight = tokens(3, 29, seed=7)
    total = [torch.zeros_like(p) for p in module.parameters()]
    for i in range(3):
        one = x[i : i + 1].clone().requires_grad_()
        alone = module(one, mask=None if mask is None else mask[i : i + 1])
        torch.testing.assert_close(alone[0], out[i])
        grad, *parts = torch.autograd.grad((alone * weight[i]).sum(), [one, *module.parameters()])
        torch.testing.assert_close(grad[0], grads[0][i])
        total = [a + b for a, b in zip(total, parts)]
    for a, b in zip(total, grads[1:], strict=True):
        torch.testing.assert_close(a, b)


@every_case
@pytest.mark.parametrize("poison", [3.0, float("nan"), float("inf")])
def test_masked_tokens_are_never_read(name, poison):
    module, x, mask = build(name), tokens(3, 29), some_mask(3, 29)
    mask[1] = False
    out, grads = gradients(module, x, mask)
    assert (
        (out[~mask] == 0).all() and (grads[0][~mask] == 0).all() and (out[mask] != 0).any(-1).all()
    )
    changed, changed_grads = gradients(module, torch.where(mask.unsqueeze(-1), x, poison), mask)
    assert torch.equal(changed, out) and all(
        torch.equal(a, b) for a, b in zip(changed_grads, grads)
    )
    assert all(grad.isfinite().all() for grad in grads)


# the others route or turn by absolute positions
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"random", "grid", "queries-2-rotary"}))
def test_padding_of_whole_windows_changes_nothing(name):
    module, x = build(name), tokens(2, 29)
    left = torch.cat([torch.full((2, 4 * W, DIM), float("nan"), dtype=x.dtype), x], 1)
    mask = torch.arange(29 + 4 * W).expand(2, -1) >= 4 * W
    out = module(left, mask=mask)[:, 4 * W :]
    width = module.heavy_window_size
    torch.testing.assert_close(out[:, width:], module(x)[:, width:])
    right = torch.cat([x, left[:, : 4 * W]], 1)
    torch.testing.assert_close(module(right, mask=mask.flip(1))[:, :29], module(x))


@every_case
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_dtypes_and_autocast(name, dtype, tolerance):
    module, x, mask = build(name, dtype), tokens(2, 29, dtype), some_mask(2, 29)
    out, grads = gradients(module, x, mask)
    want, want_grads = gradients(copy.deepcopy(module).double(), x.double(), mask)
    assert out.dtype == dtype and all(grad.dtype == dtype for grad in grads)
    assert (out - want).norm() <= tolerance * want.norm()
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert (grad - want_grad).norm() <= 5 * tolerance * want_grad.norm() + 1e-12
    if dtype == torch.bfloat16:
        module, x = module.float(), x.float()
        with torch.autocast("cpu", torch.bfloat16):
            out, grads = gradients(module, x, mask)
        assert (out - want).norm() <= tolerance * want.norm() and all(
            grad.dtype == torch.float32 for grad in grads
        )


@pytest.mark.parametrize("name", ["queries-2-rotary", *further("all", "queries-2-soft")])
def test_compile_traces_whole_at_two_lengths(name):
    torch.compiler.reset()
    module = build(name)
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    for length in (29, 44):
        x, mask = tokens(2, length), some_mask(2, length)
        got, want = gradients(module, x, mask, fast), gradients(module, x, mask)
        for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["queries-2-rotary", *further("all", "queries-2-soft")])
def test_export(name):
    """One program for any batch."""
    module = build(name).eval()
    shapes = {
        "x": {0: torch.export.Dim("batch", min=1, max=64)},
        "mask": {0: torch.export.Dim("batch", min=1, max=64)},
    }
    given = {"mask": some_mask(2, 29)}
    with torch.no_grad():
        program = torch.export.export(module, (tokens(2, 29),), given, dynamic_shapes=shapes)
        x, mask = tokens(5, 29, seed=3), some_mask(5, 29)
        torch.testing.assert_close(program.module()(x, mask=mask), module(x, mask=mask))


@every_case
def test_every_parameter_learns(name):
    module = build(name)
    module(tokens(3, 61)).square().mean().backward()
    for parameter_name, parameter in module.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), parameter_name
        assert (grad.flatten(1) if grad.ndim > 1 else grad[None]).abs().amax(-1).gt(0).all(), (
            parameter_name
        )
    module.zero_grad()
    module(tokens(1, 3)).sum().backward()  # no second window: a gradient of 0, not none
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_state_dict_copy_and_pickle():
    module, other, x = build("queries"), build("queries", seed=1), tokens(2, 29)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(x), module(x))
    assert {p.device.type for p in Attention(device="meta", **CASES["queries"]).parameters()} == {
        "meta"
    }


def test_counts_of_a_call_and_of_each_sample():
    module, x = build("queries"), tokens(3, 61)
    assert torch.equal(module(x, num_heavy_tokens_kv=9), build("queries", num_heavy_tokens_kv=9)(x))
    assert torch.equal(
        module(x, num_heavy_tokens_q=0.25), build("queries", num_heavy_tokens_q=2)(x)
    )
    count_q, count_kv = [1, 3, 2], [4, 2, 7]  # 7 exceeds the slots
    for name in ("queries", "queries-2-soft"):
        module = build(name)
        out = module(
            x, num_heavy_tokens_q=torch.tensor(count_q), num_heavy_tokens_kv=torch.tensor(count_kv)
        )
        for i in range(3):
            given = {"num_heavy_tokens_q": count_q[i], "num_heavy_tokens_kv": min(count_kv[i], 5)}
            torch.testing.assert_close(out[i : i + 1], module(x[i : i + 1], **given))
    shares = module(x, num_heavy_tokens_q=torch.tensor([0.125, 0.375, 0.25]))
    assert torch.equal(shares, module(x, num_heavy_tokens_q=torch.tensor(count_q)))


@pytest.mark.parametrize("name", ["all", "queries-2-soft", "iterated"])
@masked_or_not
def test_shares_of_the_past(name, masked):
    """Each window uses that share of the valid tokens before it: what a call with that number gives
    that window."""
    module, x = build(name, num_heavy_tokens_kv=11), tokens(2, 45)
    mask, share = some_mask(2, 45) if masked else None, [0.2, 0.7]
    out = module(x, mask=mask, num_heavy_tokens_kv=torch.tensor(share, dtype=torch.float64))
    numbers = set()
    for i in range(2):
        for window in range(1, 6):
            past = window * W if mask is None else int(mask[i, : window * W].sum())
            number = min(11, max(1, round(share[i] * past)))
            alone = module(
                x[i : i + 1],
                mask=None if mask is None else mask[i : i + 1],
                num_heavy_tokens_kv=torch.tensor([number]),
            )
            here = slice(window * W, (window + 1) * W)
            torch.testing.assert_close(out[i, here], alone[0, here])
            numbers.add(number)
    assert len(numbers) > 4 and 11 in numbers
    copies = changed_before(
        lambda x: module(x, num_heavy_tokens_kv=torch.full((len(x),), 0.2)), tokens(1, 40)
    )
    assert copies[0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_in_half_precision_count_as_exactly_as_they_are(dtype):
    share = torch.tensor([0.3, 0.7], dtype=dtype)
    past = torch.tensor([[1000, 3000, 300_000]] * 2)
    assert torch.equal(key_limit(share, past, 10**6), key_limit(share.double(), past, 10**6))


def test_a_poisoned_sample_and_an_empty_batch():
    module, x = build("queries"), tokens(3, 29)
    bad = x.clone()
    bad[1, 20] = float("nan")
    out = module(bad)
    assert torch.equal(out[[0, 2]], module(x)[[0, 2]]) and torch.equal(
        out[1, : 2 * W], module(x)[1, : 2 * W]
    )
    assert module(x[:0]).shape == (0, 29, DIM)
    assert torch.equal(module(x.mT.contiguous().mT), module(x))


def test_what_backward_keeps_grows_with_the_length():
    module, kept = build("queries-2-rotary", num_heavy_tokens_kv=6), []
    for length in (512, 1024, 2048):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(tokens(1, length))
        kept.append(sum(storages.values()))
        del out
    assert kept[2] / kept[1] < 2.1 and kept[1] / kept[0] < 2.1


def test_query_gates_are_those_of_a_soft_topk_of_the_window_before():
    """Of a window like the one before: gates and gradient are those of the soft top-k, which is not
    causal."""
    soft, hard = (CausalRouter(DIM, straight_through=straight) for straight in (False, True))
    logits = tokens(4, 1, seed=3)[:, 0].requires_grad_()
    valid, weight = some_mask(4, DIM), tokens(4, 1, seed=4)[:, 0]

    def gates(router):
        threshold = query_threshold(router, logits, valid, 3, None)
        return torch.where(valid, admit_queries(router, logits, valid, threshold, 3)[1], 0)

    want = soft_topk(logits, 3 * 9 / 8, mask=valid)
    torch.testing.assert_close(gates(soft), want)
    torch.testing.assert_close(gates(hard), valid.double())
    (grad,) = torch.autograd.grad((want * weight).sum(), logits)
    for router in (soft, hard):
        torch.testing.assert_close(
            torch.autograd.grad((gates(router) * weight).sum(), logits)[0], grad
        )


@pytest.mark.parametrize("k", [1, 3, 8, 20, 100])
def test_running_topk_equals_a_sort_of_each_prefix(k):
    draws = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 7, 5), generator=draws).double()  # ties
    valid = torch.rand(2, 7, 5, generator=draws) < 0.8
    indices, ok = running_topk(scores, valid, k)
    for b in range(2):
        for m in range(7):
            past = [j for j in range(5 * m + 5) if valid[b].flatten()[j]]
            want = sorted(past, key=lambda j: (-scores[b].flatten()[j], j))[:k]
            assert indices[b, m][ok[b, m]].tolist() == want


def test_first_slots():
    taken = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert first_slots(taken, 2).tolist() == [[1, 3], [4, 4], [0, 4]]


@pytest.mark.parametrize(
    "name, init, call",
    [
        ("dim", {"dim": 0}, None),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": 0.5}, None),
        ("num_heavy_tokens_kv", {"num_heavy_tokens_kv": 0}, None),
        ("num_heavy_tokens_q", {"num_heavy_tokens_q": 1.5}, None),
        ("num_heavy_tokens_q", {"num_heavy_tokens_q": 0}, None),
        ("num_routed_kv", {"num_routed_kv": 3}, None),
        ("light_window_size", {"light_window_size": 0}, None),
        ("heavy_window_size", {"heavy_window_size": W + 1}, None),
        ("heavy_window_size", {"heavy_window_size": 3 * W}, None),
        ("heavy_dim_head", {"heavy_dim_head": 7, "rotary_emb": True}, None),
        ("multiply_queries_by_score", {"multiply_queries_by_score": True}, None),
        ("router", {"router": "mean_query"}, None),
        ("router_kwargs", {"router_kwargs": {"cell_size": 3}}, None),
        ("router_kwargs", {"router_kwargs": {"num_routing_tokens": 3}}, None),
        ("x", {}, {"x": torch.randn(2, 5, DIM + 1)}),
        ("x", {}, {"x": torch.randn(2, 0, DIM)}),
        ("x", {}, {"x": torch.randn(5, DIM)}),
        ("mask", {}, {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        ("mask", {}, {"mask": torch.ones(2, 5)}),
        ("num_heavy_tokens_q", {}, {"num_heavy_tokens_q": 2}),
        (
            "num_heavy_tokens_q",
            {"num_heavy_tokens_q": 3},
            {"num_heavy_tokens_q": torch.tensor([1, 0])},
        ),
        ("num_heavy_tokens_kv", {}, {"num_heavy_tokens_kv": 0.5}),
        ("num_heavy_tokens_kv", {}, {"num_heavy_tokens_kv": torch.tensor([0.5, 1.5])}),
        ("num_heavy_tokens_kv", {}, {"num_heavy_tokens_kv": torch.tensor([1, 2, 3])}),
        ("cache", {}, {"cache": 3}),
    ],
)
def test_errors_name_the_argument(name, init, call):
    with pytest.raises((ValueError, TypeError), match=rf"^[\w\[\',\s]*\b{name}\b.*: "):
        module = ConditionalRoutedAutoregressiveAttention(
            **{"dim": DIM, "num_heavy_tokens_kv": 5, **SMALL, **init}
        )
        module(**{"x": torch.randn(2, 5, DIM), **call})
