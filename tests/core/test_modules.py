"""The bars that every module must meet: sizes, masks, dtypes, batches, checkpoints."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from colt5_vision import ConditionalRoutedFeedForward
from tests.support.module_cases import (
    CASES,
    DIM,
    apply,
    assert_near,
    assert_same,
    build,
    every_module,
    gradients,
    image,
    some,
    some_mask,
)


@every_module
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 3), (4, 4), (9, 14), (33, 2)])
def test_any_size(case, height, width):
    module, x = build(case), image(2, height, width)
    out, grads = gradients(case, module, x)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert (out != 0).any(-1).all(), "a token without an output"


@every_module
def test_device_and_dtype_of_the_parameters(case):
    module = case.build(device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in module.parameters()} <= {("meta", torch.float64)}
    assert {n: p.shape for n, p in module.named_parameters()} == {
        n: p.shape for n, p in case.build().named_parameters()
    }
    with pytest.raises(ValueError, match="give dtype instead"):
        case.build(router_kwargs={"dtype": torch.float64})


@every_module
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_gives_what_its_samples_give(case, masked):
    module, x = build(case), image(4)
    mask = some_mask(4) if masked else None
    out, grads = gradients(case, module, x, mask)
    singles = [
        gradients(case, module, x[i : i + 1], None if mask is None else mask[i : i + 1], at=i)
        for i in range(4)
    ]
    torch.testing.assert_close(out, torch.cat([one[0] for one in singles]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        grads[0], torch.cat([one[1][0] for one in singles]), atol=1e-5, rtol=1e-5
    )
    for grad, *parts in zip(grads[1:], *(one[1][1:] for one in singles), strict=True):
        torch.testing.assert_close(grad, sum(parts), atol=1e-4, rtol=1e-4)


@every_module
@pytest.mark.parametrize("poison", [3.0, float("nan"), float("inf")])
def test_masked_tokens_are_never_read(case, poison):
    module, x, mask = build(case), image(), some_mask()
    out, grads = gradients(case, module, x, mask)
    assert torch.equal(out[~mask], x[~mask] if case.residual else torch.zeros_like(x[~mask]))
    assert (grads[0][~mask] == 0).all() and (grads[0][mask] != 0).any(-1).all()
    changed, changed_grads = gradients(
        case, module, torch.where(mask.unsqueeze(-1), x, poison), mask
    )
    assert torch.equal(changed[mask], out[mask])
    assert all(torch.equal(a, b) for a, b in zip(changed_grads, grads))


@some("block", "block-softmax-q", "block-sequence")
def test_the_block_keeps_the_residual_of_masked_tokens(case):
    module, x, mask = build(case), image().requires_grad_(), some_mask()
    weight = image(seed=5)
    (grad,) = torch.autograd.grad((apply(case, module, x, mask) * weight).sum(), x)
    assert torch.equal(grad[~mask], weight[~mask]), "the residual's gradient and no other"


@every_module
def test_a_wholly_masked_sample(case):
    module, x, mask = build(case), image(), some_mask()
    mask[1] = False
    out, grads = gradients(case, module, x, mask)
    assert torch.equal(out[1], x[1] if case.residual else torch.zeros_like(x[1]))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1] == 0).all()
    others = torch.tensor([0, 2])
    torch.testing.assert_close(out[others], apply(case, module, x[others], mask[others]))


@every_module
@pytest.mark.parametrize("left", [1, 3])
def test_fewer_valid_tokens_than_slots(case, left):
    """Few valid tokens in the corner of a map, or first in a sequence, give what those tokens alone
    give."""
    module, x = build(case), image()
    mask = torch.zeros(3, 9, 7, dtype=torch.bool)
    mask[:, :1, :left] = True
    out, grads = gradients(case, module, x, mask)
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(
        out[:, :1, :left], apply(case, module, x[:, :1, :left]), atol=1e-5, rtol=1e-5
    )


@every_module
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_of_none(case, masked):
    out, grads = gradients(case, build(case), image(0), some_mask(0) if masked else None)
    assert out.shape == (0, 9, 7, DIM)
    assert all((grad == 0).all() for grad in grads)


@every_module
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_sample_leaves_the_others_unharmed(case, poison):
    module, x = build(case), image()
    bad = x.clone()
    bad[1, 2, 3] = poison
    out, grads = gradients(case, module, bad)
    want, want_grads = gradients(case, module, x)
    assert out[1].isnan().any()
    assert torch.equal(out[[0, 2]], want[[0, 2]]) and torch.equal(
        grads[0][[0, 2]], want_grads[0][[0, 2]]
    )


@every_module
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_dtypes(case, dtype, tolerance):
    module, x, mask = build(case, dtype), image(dtype=dtype), some_mask()
    out, grads = gradients(case, module, x, mask, **case.precise)
    want, want_grads = gradients(
        case, copy.deepcopy(module).double(), x.double(), mask, **case.precise
    )
    assert out.dtype == dtype and want.dtype == torch.float64
    assert_near(out, want, tolerance)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype
        assert_near(grad, want_grad, 5 * tolerance)


@every_module
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_is_close_to_float32(case, masked):
    module, x, mask = build(case), image(), some_mask() if masked else None
    want, want_grads = gradients(case, module, x, mask, **case.precise)
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(case, module, x, mask, **case.precise)
    assert_near(out, want, 0.03)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad, want_grad, 0.15)


@every_module
def test_memory_formats(case):
    if case.layout == "tokens":
        module, x = build(case), image().flatten(1, 2)
        variants = [x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0]]
    else:
        module, x = build(case), image()
        x = x.permute(0, 3, 1, 2).contiguous() if case.layout == "first" else x
        variants = [
            x.contiguous(memory_format=torch.channels_last),
            torch.stack([x, x], -1)[..., 0],
            x.flip(2).flip(2),
        ]
        variants += [x.transpose(2, 3).contiguous().transpose(2, 3), x[:1].expand_as(x)]
    for variant in variants:
        want = module(variant.contiguous())
        torch.testing.assert_close(module(variant), want, atol=1e-6, rtol=1e-5)
    assert sum(not variant.is_contiguous() for variant in variants) >= 2


@every_module
def test_every_parameter_learns(case):
    module = build(case)
    apply(case, module, image()).square().mean().backward()
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), name
        assert (grad.flatten(1) if grad.ndim > 1 else grad[None]).abs().amax(-1).gt(0).all(), name


@every_module
def test_state_dict_copy_and_pickle(case):
    module, other, x = build(case), build(case, seed=1), image()
    want = apply(case, module, x)
    assert not torch.allclose(apply(case, other, x), want)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(apply(case, same, x), want)


@every_module
def test_gradient_checkpointing(case):
    module, x, mask = build(case), image(), some_mask()

    def call(x, mask):
        return checkpoint(functools.partial(apply, case, module), x, mask, use_reentrant=False)

    assert_same(
        gradients(case, module, x, mask, call), gradients(case, module, x, mask), rtol=0, atol=0
    )


@every_module
def test_counts_are_overridden_per_call(case):
    """A count given with the call does what the same count given to the constructor does, and
    leaves the module alone."""
    names = [name for name in case.build().__dict__ if name.startswith("num_heavy")]
    module, x = build(case), image()
    names = ["num_heavy_ff_tokens", "num_heavy_attn_tokens_kv"] if case.residual else names
    before = apply(case, module, x)
    for name in names:
        if name == "num_heavy_tokens_q" and module.num_heavy_tokens_q is None:
            continue
        for count in (1, 0.5):
            other = build(case._replace(build=functools.partial(case.build, **{name: count})))
            out = apply(case, module, x, **{name: count})
            assert torch.equal(out, apply(case, other, x))
            assert not torch.allclose(out, before)
        with pytest.raises(ValueError, match="^num_.*tokens.*: expected"):
            apply(case, module, x, **{name: 0})
    assert torch.equal(apply(case, module, x), before)


@pytest.mark.parametrize("straight_through", [True, False])
def test_feed_forward_equals_the_reference(straight_through):
    case = CASES["ff-tokens"]
    case = case._replace(
        build=functools.partial(case.build, router_straight_through=straight_through)
    )
    module, x, mask = build(case, torch.float64), image(dtype=torch.float64), some_mask()
    mask[1], mask[1, 0, :2] = False, True  # fewer valid tokens than slots
    got = apply(case, module, x, mask)
    flat = torch.where(mask.unsqueeze(-1), x, 0).flatten(1, 2)
    routing = module.router(flat, num_tokens=6, mask=mask.flatten(1))
    for b in range(3):
        gates = dict(zip(routing.indices[b, 0].tolist(), routing.gates[b, 0]))
        assert sum(gate > 0 for gate in gates.values()) == (2 if b == 1 else 6)
        for i, token in enumerate(flat[b]):
            want = module.light_ff(token) + gates.get(i, 0) * module.heavy_ff(token)
            torch.testing.assert_close(got[b].flatten(0, 1)[i], want * mask[b].flatten()[i])


@some("block", "block-softmax-q", "block-sequence")
def test_the_block_is_its_two_parts_with_residuals(case):
    module, x, mask = build(case), image(), some_mask()
    inner = case._replace(residual=False)
    mid = x + apply(inner, module.conditional_attn, x, mask)
    want = mid + apply(inner, module.conditional_ff, mid, mask)
    torch.testing.assert_close(apply(case, module, x, mask), want)


@pytest.mark.parametrize(
    "name, init, call",
    [
        ("x", {}, {"x": torch.randn(2, 5, DIM + 1)}),
        ("x", {}, {"x": torch.randn(5, DIM)}),
        ("x", {}, {"x": torch.randn(2, 4, 5, DIM)}),
        ("x", {}, {"x": torch.ones(2, 5, DIM, dtype=torch.long)}),
        ("mask", {}, {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        ("mask", {}, {"mask": torch.ones(2, 5)}),
        ("num_heavy_tokens", {}, {"num_heavy_tokens": 1.5}),
        *[
            ("num_heavy_tokens", {"num_heavy_tokens": bad}, None)
            for bad in (0, float("nan"), 1.5, True, None)
        ],
        ("light_ff_mult", {"light_ff_mult": 0}, None),
        ("heavy_ff_mult", {"heavy_ff_mult": float("inf")}, None),
        ("router", {"router": "best"}, None),
        ("num_routing_tokens", {"router_kwargs": {"num_routing_tokens": 2}}, None),
        ("dim", {"dim": -1}, None),
    ],
)
def test_feed_forward_errors_name_the_argument(name, init, call):
    with pytest.raises((ValueError, TypeError), match=rf"^[\w\[\']*\b{name}\b.*: "):
        module = ConditionalRoutedFeedForward(**{"dim": DIM, "num_heavy_tokens": 2, **init})
        module(**{"x": torch.randn(2, 5, DIM), **call})
