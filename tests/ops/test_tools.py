"""Every operator under the tools of torch: transforms, tracers, fake tensors, FLOP counters."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from colt5_vision import RoutedAttentionConfig, ops
from tests.support.operator_cases import CASES, MASK, randn, select
from tests.support.threads import another_thread_traces

every = pytest.mark.parametrize("name", CASES)


def directions(floats, seed=20):
    return tuple(randn(*x.shape, seed=seed + i) for i, x in enumerate(floats))


def partial_call(case):
    return lambda *floats: case.call(*floats, *case.rest)


def weighted(case):
    """A scalar of a case, smooth in all its inputs."""
    weight = randn(*case.call(*case.floats, *case.rest).shape, seed=30)

    def total(*floats):
        return (case.call(*floats, *case.rest) * weight).sum()

    return total


# forward-mode AD


@every
def test_jvp_is_the_adjoint_of_vjp(name):
    case = CASES[name]
    call, tangents = partial_call(case), directions(case.floats)
    out, moved = jvp(call, case.floats, tangents)
    torch.testing.assert_close(out, call(*case.floats))
    weight = randn(*out.shape, seed=40)
    _, pull = vjp(call, *case.floats)
    back = sum((g * t).sum() for g, t in zip(pull(weight), tangents))
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close((moved * weight).sum(), back)


@every
def test_dual_tensors(name):
    case = CASES[name]
    call, tangents = partial_call(case), directions(case.floats)
    want = jvp(call, case.floats, tangents)[1]
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, case.floats, tangents)
        torch.testing.assert_close(forward_ad.unpack_dual(call(*duals)).tangent, want)


@every
def test_jvp_of_grad_and_of_vmap(name):
    case = CASES[name]
    first, total = case.floats[0], weighted(case)
    small = directions((first,))[0]

    def slope(x):
        return grad(total)(x, *case.floats[1:])

    moved = jvp(slope, (first,), (small,))[1]
    step = 1e-5
    want = (slope(first + step * small) - slope(first - step * small)) / (2 * step)
    torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-6)
    per = vmap(lambda t: jvp(lambda x: total(x, *case.floats[1:]), (first,), (t,))[1])
    both = torch.stack([small, 2 * small])
    want = (grad(total)(*case.floats) * small).sum()
    torch.testing.assert_close(per(both), torch.stack([want, 2 * want]))


@pytest.mark.parametrize("name", [name for name in CASES if "biased" not in name])
def test_kernels_refuse_tangents(name, monkeypatch):
    monkeypatch.setattr(ops.backend, "INTERPRETED", True)
    case = CASES[name]
    operator = "routed_window_attention" if name == "window_attention" else name.split()[0]
    with pytest.raises(NotImplementedError, match=rf"^{operator}: .*backend='eager'"):
        jvp(
            lambda *x: case.call(*x, *case.rest, backend="triton"),
            case.floats,
            directions(case.floats),
        )


# torch.func


@every
def test_grad_is_autograds(name):
    case = CASES[name]
    total = weighted(case)
    leaves = [x.detach().requires_grad_() for x in case.floats]
    want = torch.autograd.grad(total(*leaves), leaves)
    found = grad(total, argnums=tuple(range(len(leaves))))(*case.floats)
    torch.testing.assert_close(found, want)


def stacked(case):
    """Two calls' inputs, stacked, and the dimensions of vmap."""
    other = [x + 0.1 * y for x, y in zip(case.floats, directions(case.floats))]
    rest = [x.flip(0) for x in case.rest]
    pairs = zip((*case.floats, *case.rest), (*other, *rest))
    return [torch.stack(pair) for pair in pairs]


@every
def test_vmap_is_a_loop(name):
    case = CASES[name]
    inputs = stacked(case)
    want = torch.stack([case.call(*(x[i] for x in inputs)) for i in range(2)])
    torch.testing.assert_close(vmap(case.call)(*inputs), want)
    last = [x.movedim(0, -1) for x in inputs]
    torch.testing.assert_close(vmap(case.call, in_dims=-1)(*last), want)
    only = vmap(lambda x: case.call(x, *case.floats[1:], *case.rest))(inputs[0])
    torch.testing.assert_close(only[0], case.call(*case.floats, *case.rest))


@every
def test_vmap_of_grad(name):
    """Per-sample gradients: what each sample alone gives."""
    case = CASES[name]
    inputs, many = stacked(case), len(case.floats)

    def total(*inputs):
        return case.call(*inputs).square().sum()

    slopes = grad(total, argnums=tuple(range(many)))
    found = vmap(slopes)(*inputs)
    for i in range(2):
        torch.testing.assert_close(tuple(g[i] for g in found), slopes(*(x[i] for x in inputs)))


@every
def test_jacobians_agree(name):
    case = CASES[name]
    call = lambda x: case.call(x, *case.floats[1:], *case.rest)
    torch.testing.assert_close(jacfwd(call)(case.floats[0]), jacrev(call)(case.floats[0]))


def test_per_sample_gradients_of_parameters():
    class Layer(torch.nn.Linear):
        def forward(self, x):
            gates = ops.soft_topk(super().forward(x).squeeze(-1), 3)
            q = (x * gates.unsqueeze(-1)).unflatten(-1, (2, 4)).transpose(1, 2)
            return ops.window_attention(q, q, q, grid_size=(4, 5), window_size=2)

    layer, x = Layer(8, 1).double(), randn(3, 20, 8)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, sample):
        return functional_call(layer, weights, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i : i + 1]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)


# twice differentiable


@every
def test_twice_differentiable_or_refused(name):
    case = CASES[name]
    leaves = [x.detach().requires_grad_() for x in case.floats]
    if case.twice:
        assert torch.autograd.gradgradcheck(partial_call(case), leaves)
        return
    slopes = torch.autograd.grad(weighted(case)(*leaves), leaves, create_graph=True)
    with pytest.raises(
        RuntimeError,
        match=r"^(routed_window|grouped)_attention: .*twice|^coordinate_descent: .*twice",
    ):
        torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)


@pytest.mark.parametrize("name", [name for name in CASES if "attention" in name])
def test_the_way_out_of_attention(name):
    case = CASES[name]
    leaves = [x.detach().requires_grad_() for x in case.floats]
    with sdpa_kernel(SDPBackend.MATH):
        plain = lambda *x: case.call(*x, *case.rest, backend="eager")
        torch.testing.assert_close(plain(*leaves), partial_call(case)(*leaves))
        assert torch.autograd.gradcheck(plain, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(plain, leaves, fast_mode=True)
    torch.testing.assert_close(plain(*leaves), partial_call(case)(*leaves))


# tracing


def by_name(case):
    """The call with its inputs named, as tracers want it."""
    names = ", ".join(f"x{i}" for i in range(len(case.floats) + len(case.rest)))
    return eval(f"lambda {names}: call({names})", {"call": case.call})


@every
def test_fake_tensors(name):
    case = CASES[name]
    want = case.call(*case.floats, *case.rest)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (*case.floats, *case.rest)]
        out = case.call(*fake)
    assert (out.shape, out.dtype, out.stride()) == (want.shape, want.dtype, want.stride())
    with FakeTensorMode(allow_non_fake_inputs=True):  # beside real ones, as weights may be
        assert case.call(*case.floats, *case.rest).shape == want.shape


@every
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(name, mode):
    case = CASES[name]
    inputs = (*case.floats, *case.rest)
    graph = make_fx(by_name(case), tracing_mode=mode)(*inputs)
    other = [x[0] for x in (s.flip(0) for s in stacked(case))]
    torch.testing.assert_close(graph(*other), case.call(*other))


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_jit_trace(name):
    case = CASES[name]

    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return case.call(*inputs)

    inputs = (*case.floats, *case.rest)
    traced = torch.jit.trace(Layer(), inputs, check_trace=False)
    other = [x[0] for x in (s.flip(0) for s in stacked(case))]
    torch.testing.assert_close(traced(*other), case.call(*other))


@every
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_old_onnx_exporter_is_refused_and_the_new_one_named(name, tmp_path):
    case = CASES[name]

    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return case.call(*inputs)

    with pytest.raises(NotImplementedError, match="^torch.onnx.export: expected dynamo=True"):
        inputs = (*case.floats, *case.rest)
        torch.onnx.export(Layer(), inputs, tmp_path / "layer.onnx", dynamo=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_jit_trace_of_sizes_that_are_read():
    """In a trace, sizes are tensors."""

    def call(x):
        height, width = x.shape[2:]
        q = x.flatten(2).mT.unsqueeze(1)
        return ops.window_attention(q, q, q, grid_size=(height, width), window_size=2)

    x = randn(2, 8, 4, 5)
    traced = torch.jit.trace(call, (x,), check_trace=False)
    torch.testing.assert_close(traced(2 * x), call(2 * x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_jit_trace_of_counts_that_are_sizes():
    def call(x):
        k = x.shape[-1] // 3
        descent = ops.coordinate_descent(x, k, n_iters=3)
        return ops.route_topk(x, k)[0], ops.soft_topk(x, k), descent

    x = randn(2, 12)
    traced = torch.jit.trace(call, (x,), check_trace=False)
    torch.testing.assert_close(traced(x.flip(0)), call(x.flip(0)))


# a graph holds no Python function, so none with a pair_bias
@pytest.mark.parametrize("name", [name for name in CASES if "biased" not in name])
def test_fx_records_one_call(name):
    case = CASES[name]
    traced = torch.fx.symbolic_trace(by_name(case))
    targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert getattr(ops, name.split()[0]) in targets
    torch.testing.assert_close(
        traced(*case.floats, *case.rest), case.call(*case.floats, *case.rest)
    )


@every
def test_flops(name):
    """Counted with gradients, the same on the meta device, and none where there are none."""
    case = CASES[name]

    def count(device):
        floats, rest = case.to(device=device)
        leaves = [x.detach().requires_grad_() for x in floats]
        with FlopCounterMode(display=False) as forward:
            out = case.call(*leaves, *rest)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    found = count("cpu")
    assert found == count("meta")
    assert (found[0] > 0) == case.products
    assert (found[1] > found[0]) == case.products


def test_flops_of_attention_are_those_of_its_pairs():
    q = torch.empty(2, 3, 1 + 70, 16, device="meta")
    routed = torch.empty(2, 9, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        ops.routed_window_attention(
            q, q, q, grid_size=(7, 10), window_size=4, routed_indices=routed, num_prefix_tokens=1
        )
    windows = (4 * 4) ** 2 * 2 + (4 * 2) ** 2 + (3 * 4) ** 2 * 2 + (3 * 2) ** 2
    pairs = windows + 70 * (1 + 9) + 71
    assert counter.get_total_flops() == 4 * 16 * 6 * pairs


def test_all_operators_have_a_formula():
    from torch.utils.flop_counter import flop_registry

    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("colt5_vision::")]
    assert len(names) == 15
    for name in names:
        packet = getattr(torch.ops.colt5_vision, re.split("::|[.]", name)[1])
        assert packet in flop_registry, name


# selection, which has no derivative


def test_selection_under_the_tools():
    scores = randn(2, 20, dtype=torch.float32)
    want = select(scores, MASK)
    traced = make_fx(lambda scores, mask: select(scores, mask))(scores, MASK)
    torch.testing.assert_close(traced(scores, MASK), want)
    torch.testing.assert_close(
        torch.jit.trace(select, (scores, MASK), check_trace=False)(scores, MASK), want
    )
    torch.testing.assert_close(
        torch.fx.symbolic_trace(lambda s, m: select(s, m))(scores, MASK), want
    )
    both = torch.stack([scores, -scores]), torch.stack([MASK, ~MASK])
    found = vmap(select)(*both)
    for i in range(2):
        torch.testing.assert_close(tuple(x[i] for x in found), select(both[0][i], both[1][i]))
    torch.testing.assert_close(jvp(lambda s: select(s, MASK), (scores,), (scores,))[0], want)
    with FakeTensorMode() as mode:
        found = select(mode.from_tensor(scores), mode.from_tensor(MASK))
    assert [x.shape for x in found] == [x.shape for x in want]


def test_counts_that_cannot_be_read_need_num_slots():
    scores, k = randn(2, 20), torch.tensor([2, 5])
    with pytest.raises(ValueError, match="^num_slots: needed"):
        vmap(ops.route_topk)(scores, k)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="^num_slots: needed"):
        ops.route_topk(mode.from_tensor(scores), mode.from_tensor(k))


# threads


@every
def test_values_are_checked_while_another_thread_traces(name):
    """What is traced is a thread's own matter."""
    case = CASES[name]
    want = case.call(*case.floats, *case.rest)
    with another_thread_traces():
        assert torch.equal(case.call(*case.floats, *case.rest), want)
        with pytest.raises(ValueError, match="^k: "):
            ops.soft_topk(randn(2, 5), torch.tensor([1.0, -1.0]))
        with pytest.raises(ValueError, match="^indices: "):
            ops.gather_normalize(randn(1, 5, 4), torch.tensor([[7]]), randn(4))


# compilers


@every
def test_compiled_whole(name):
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in case.floats]
    found = []
    for call in (compiled, case.call):
        out = call(*leaves, *case.rest)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*found)


@every
def test_compiled_jvp_is_right_or_refused(name):
    case = CASES[name]
    torch._dynamo.reset()

    def run(floats, tangents):
        return jvp(partial_call(case), floats, tangents)

    tangents = directions(case.floats)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(case.floats, tangents)
    torch.testing.assert_close(found, run(case.floats, tangents))


# nothing in a row


@every
def test_a_width_of_0_is_nothing_or_an_error_that_names_the_argument(name):
    """Channels, head_dim, or scores of a row."""
    case = CASES[name]
    width = case.floats[0].shape[-1]
    floats = [x[..., :0] if x.shape[-1] == width else x for x in case.floats]
    try:
        out = case.call(*floats, *case.rest)
    except ValueError as error:
        assert re.match(r"[a-z_]+(, [a-z_]+)*: expected .*, got ", str(error)), error
    else:
        assert out.isfinite().all()


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_head_dim_of_0_in_a_pretrained_model(scale):
    x = torch.empty(1, 2, 16, 0)
    for router in ("sampled", "grouped", "mean_query", "random", "grid", "window"):
        config = RoutedAttentionConfig(window_size=2, num_heavy_tokens_kv=3, router=router)
        with pytest.raises(ValueError, match="^q, k, v: expected a head_dim of at least 1"):
            config.attention()(x, x, x, grid_size=(4, 4), scale=scale)
