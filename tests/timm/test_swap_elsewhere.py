"""Routed timm models under hooks and wrappers, inside other models, traced."""

import warnings

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colt5_vision import route_attention, routed_layers, unroute_attention, why_not
from colt5_vision._torch_internals import function_modes
from colt5_vision.checks import ROUTERS
from colt5_vision.swap.grouped import GROUPED
from colt5_vision.swap.learned import LEARNED
from colt5_vision.swap.reroute import NOT_CALLED, RerouteMode
from tests.support.marks import further
from tests.support.swap_cases import (
    CASES,
    SIZES,
    at,
    build,
    close,
    gradients,
    image,
    routed,
    some,
    trace,
    unrouted,
)


def user_wrapper(model):
    for block in model.blocks:
        inner = block.attn.forward
        block.attn.forward = lambda *a, inner=inner, **k: inner(*a, **k)
    return model


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


# accelerate.cpu_offload breaks stock BEiT and EVA-02
@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *((name, user_wrapper) for name in ("vit", "eva02", "beit", "sam")),
        *((name, dispatched) for name in ("vit", "eva02", "beit", "sam", "dinov3")),
        *((name, offloaded) for name in ("vit", "sam")),
    ],
)
def test_a_forward_on_the_instance_is_routed_before_or_after(name, wrap):
    case = CASES[name]
    x = image(case)
    with torch.no_grad():
        full, expected = build(case)(x), routed(build(case))(x)
        assert (full - expected).abs().max() > 1e-5
        close(routed(wrap(build(case)))(x), expected)
        model = wrap(routed(build(case)))
        close(model(x), expected)
        close(unrouted(model)(x), full)


def test_dataparallel_replicas_are_routed():
    """A replica shares hooks and gets parameters of its own."""
    model, x = routed(build(CASES["vit"])), image(CASES["vit"])
    replica = model._replicate_for_data_parallel()
    for name, module in model.named_children():
        copied = module._replicate_for_data_parallel()
        copied._parameters = dict(module._parameters)
        setattr(replica, name, copied)
    replica._parameters = dict(model._parameters)
    with torch.no_grad():
        assert torch.equal(replica(x), model(x))


def test_an_interrupted_forward_leaves_nothing_behind():
    """KeyboardInterrupt skips hooks: the mode must not take what others call."""
    model, x = routed(build(CASES["vit"])), image(CASES["vit"])
    expected = model(x).detach()
    norm = model.blocks[0].attn.proj

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    hook.remove()
    assert len(function_modes()) == 1
    q = torch.randn(1, 2, 36, 8)
    full = nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.equal(full, nn.functional.scaled_dot_product_attention(q, q, q))
    assert routed_layers(model)["blocks.0.attn"].calls.routed == 2
    with torch.no_grad():
        close(model(x), expected)
    assert function_modes() == []


def test_a_forward_that_fails_leaves_nothing_behind():
    model = routed(build(CASES["vit"]))
    expected = [model(at(size)).detach() for size in SIZES]

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.blocks[0].attn.proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(at(SIZES[0]))
    hook.remove()
    assert function_modes() == []
    with torch.no_grad():
        for size, out in zip(SIZES[::-1], expected[::-1]):
            close(model(at(size)), out)


@pytest.mark.parametrize("where", ["attention", "layer"])
@pytest.mark.parametrize("then", ["forward", "export", "unroute"])
def test_an_export_that_fails_harms_nothing(where, then):
    """It calls no hooks that leave: our mode stays, says nothing, and goes with the next act."""
    torch.compiler.reset()
    model = routed(build(CASES["vit"]), router="grouped")
    x = image(CASES["vit"])
    expected = model(x).detach()

    def fail(*_):
        raise ValueError("out of memory")

    # the attention refuses an open size, or a module of the layer fails
    of, open_size = "grid_size", {"x": {2: 16 * torch.export.Dim("rows", min=4, max=20)}}
    if where == "layer":
        of, open_size = "out of memory", None
        hook = model.blocks[0].attn.proj.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match=of):
            torch.export.export(model, (x,), dynamic_shapes=open_size, strict=False)
    if where == "layer":
        hook.remove()
    assert [type(mode) for mode in function_modes()] == [RerouteMode]

    # others do not mind, compiled or not
    q = torch.randn(1, 2, 36, 8)
    attend = nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(q, q, q), attend(q, q, q))
    compiled = torch.compile(lambda q: attend(q, q, q), fullgraph=True, backend="eager")
    close(compiled(q), attend(q, q, q))

    # the model does what it did, and takes the mode away
    if then == "export":
        close(torch.export.export(model, (x,), strict=False).module()(x).detach(), expected)
    elif then == "unroute":
        unroute_attention(model)
    else:
        with torch.no_grad():
            close(model(x), expected)
    assert function_modes() == []


def test_a_layer_called_past_its_hooks_is_told():
    model, x = build(CASES["vit"]), image(CASES["vit"])
    with torch.no_grad():
        report = route_attention(model, window_size=3, num_heavy_tokens_kv=0.25, min_tokens=0)
        assert "not called" not in str(report)
        block = model.blocks[1]
        block.forward = lambda x: x + block.attn.forward(block.norm1(x))
        model(x)
    assert report.not_called() == ["blocks.1.attn"]
    assert "1 routed, 0 exact\n  blocks.1.attn: not called" in str(report)


class Skip(TorchFunctionMode):
    """As diffusers' skip of attention scores: an attention gives its values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            return args[2]
        return func(*args, **(kwargs or {}))


class Count(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_modes_of_others_are_asked_first():
    model, x = build(CASES["vit"]), image(CASES["vit"])
    with torch.no_grad():
        with Skip():
            skipped = model(x)
        expected = routed(model)(x)
        with Skip():
            assert torch.equal(model(x), skipped)
        with Count() as count, torch.device("cpu"):
            assert torch.equal(model(x), expected)
    assert count.calls == 2
    assert routed_layers(model)["blocks.0.attn"].calls.exact == {NOT_CALLED: 1}


@pytest.mark.parametrize("before", [True, False])
@some("vit", "eva02", "sam")
def test_checkpoint_wrappers_before_or_after(case, before):
    def wrap(model):
        kind = type(model.blocks[0])
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, kind)
        )
        assert isinstance(model.blocks[0], CheckpointWrapper)
        return model

    plain, model = routed(build(case)).train(), build(case).train()
    model = routed(wrap(model)) if before else wrap(routed(model))
    assert list(routed_layers(model)) == list(routed_layers(plain))
    expected = gradients(plain, image(case))
    found = gradients(model, image(case))
    close({k.replace("._checkpoint_wrapped_module", ""): v for k, v in found.items()}, expected)


class Segmenter(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.encoder, self.head = backbone, nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.encoder(x))


HOLDERS = {
    "module": Segmenter,
    "sequential": lambda model: nn.Sequential(nn.Identity(), model),
    "parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("name", ["vit", *further("sam")])
def test_a_model_inside_another_is_found(name, hold):
    case = CASES[name]
    torch.manual_seed(0)
    model, x = hold(build(case)), image(case)
    with torch.no_grad():
        expected = model(x)
        before = trace(model)
        routed(model, 1.0)
        close(model(x), expected)
        routed(unrouted(model))
        assert (model(x) - expected).abs().max() > 1e-4
        unroute_attention(model)
        assert trace(model) == before or hold is HOLDERS["compiled"]
        close(model(x), expected)


@pytest.mark.parametrize("name", ["qwen3_vit_tiny", "test_vit"])
def test_classifiers_around_an_encoder(name):
    names = [n for n in timm.list_models("qwen3*") if not n.endswith("_enc")]
    model = timm.create_model(names[0] if name.startswith("qwen") else name)
    assert routed_layers(routed(model))


@pytest.mark.parametrize(
    ("name", "extract"),
    [  # torchvision cannot trace timm's own SAM
        *(("vit", extract) for extract in ("torchvision", "timm")),
        *(("dinov2-registers", extract) for extract in ("torchvision", "timm")),
        ("sam", "timm"),
    ],
)
def test_feature_extraction_by_tracing(name, extract):
    case = CASES[name]
    if extract == "torchvision":
        make = pytest.importorskip("torchvision.models.feature_extraction").create_feature_extractor
    else:
        make = timm_extractor
    fixed = {} if case is CASES["sam"] else {"dynamic_img_size": False}
    x = image(case)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = make(build(case, **fixed), {"blocks.1": "b"})(x)["b"]
        full = make(routed(build(case, **fixed), 1.0), {"blocks.1": "b"})(x)["b"]
        close(full, expected)
        model = routed(build(case, **fixed))
        few = make(model, {"blocks.1": "b"})(x)["b"]
        assert (few - expected).abs().max() > 1e-3
        assert routed_layers(model)["blocks.1.attn"].calls.routed > 0


class NoFloat64(TorchDispatchMode):
    """As on Apple's MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not [x for x in tree_leaves(out) if getattr(x, "dtype", None) == torch.float64], func
        return out


@pytest.mark.parametrize("router", ROUTERS)
def test_no_float64_is_made_where_there_is_none(router):
    queries = None if router in ("window", *GROUPED) else 0.5
    model = routed(build(CASES["vit"], torch.float32), router=router, num_heavy_tokens_q=queries)
    x = image(CASES["vit"], dtype=torch.float32)
    with NoFloat64(), torch.no_grad():
        model(x)


def test_a_head_of_zero_queries_is_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build(CASES["vit"], dtype)
        for block in model.blocks:
            block.attn.qkv.weight.data[:32] = 0
            block.attn.qkv.bias.data[:32] = 0
        routed(model)
        assert model(image(CASES["vit"], dtype=dtype)).isfinite().all()


class Fast(timm.layers.Attention):
    pass


def test_a_subclass_of_a_known_attention_is_routed():
    model = build(CASES["vit"])
    for block in model.blocks:
        block.attn.__class__ = Fast
    assert len(routed_layers(routed(model))) == 2


REFUSED = {
    "convit_tiny": "GPSA: it mixes two softmaxes by a gate",
    "shvit_s1": "SHSA: it does not call scaled_dot_product_attention",
    "resnest14d": "ResNet has no attention over a map|ResNest has no attention over a map",
    "skresnet18": "ResNet has no attention over a map",
    "xcit_nano_12_p8_224": "XCA: it attends over channels",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=REFUSED)
def test_refusals_say_why(name, reason):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=reason):
        route_attention(model, min_tokens=0)
    assert "" in why_not(model)


def test_why_not():
    assert why_not(build(CASES["vit"])) == {}
    left = why_not(build(CASES["sam"]))
    assert left == {"blocks.0.attn": "it attends in windows of its own"}
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        why_not(3)


def test_dynamic_quantisation_before_or_after():
    case, x = CASES["vit"], image(CASES["vit"], dtype=torch.float32)
    quantise = lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = quantise(routed(build(case, torch.float32))), quantise(build(case, torch.float32))
        assert torch.equal(models[0](x), routed(models[1])(x))


@pytest.mark.parametrize("before", [True, False])
def test_lora_before_or_after(before):
    """Its gradients are the stock model's when every key is routed."""
    peft = pytest.importorskip("peft")
    case = CASES["vit"]

    def adapted(model):
        torch.manual_seed(0)
        options = {"target_modules": ["qkv", "proj"], "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(**options)).double()

    def found(model):
        out = model(image(case))
        weights = [p for n, p in model.named_parameters() if "lora_" in n]
        return out.detach(), torch.autograd.grad(out.square().sum(), weights)

    plain, stock = build(case)(image(case)), found(adapted(build(case)))
    assert (stock[0] - plain).abs().max() > 1e-3
    for share in (1.0, 1 / 4):
        routes = lambda model, share=share: routed(model, share)
        model = adapted(routes(build(case))) if before else routes(adapted(build(case)))
        out, grads = found(model)
        if share == 1.0:
            close(out, stock[0], 1e-8)
            close(grads, stock[1], 1e-8)
        assert share == 1.0 or (out - stock[0]).abs().max() > 1e-6
        close(found(unrouted(model))[0], stock[0])


@pytest.mark.parametrize("router", LEARNED)
def test_state_dict_and_parameters_stay_the_models(router):
    model = build(CASES["vit"])
    state, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    kinds = [type(m) for m in model.modules()]
    routed(model, router=router)
    assert list(model.state_dict()) == state
    assert [n for n, _ in model.named_modules()] == names
    assert [type(m) for m in model.modules()] == kinds
    model.load_state_dict(build(CASES["vit"]).state_dict(), strict=True)
