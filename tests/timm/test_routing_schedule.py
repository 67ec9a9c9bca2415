"""``routing_schedule=steps``: the model counts its training forwards and starts with many keys."""

import copy
import io

import pytest
import timm
import torch
from timm.models import FeatureListNet, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import colt5_vision.models  # noqa: F401
from colt5_vision import ConditionalRoutedImageAttention, RoutingSchedule
from colt5_vision.schedule import CarriedSchedule
from tests.support.marks import further

STEPS = 10
SMALL = ["test_colt5_vit", "test_colt5_pyramid"]
FUSIONS = ["softmax", "sum"]
COUNT = "stem.schedule.forwards"
both = pytest.mark.parametrize("name", SMALL)
fused = pytest.mark.parametrize("fusion", FUSIONS)


def build(name=SMALL[0], fusion="softmax", steps=STEPS, seed=0, **more):
    torch.manual_seed(seed)
    # few keys: a pyramid's last stages are full attention
    return timm.create_model(
        name, fusion=fusion, routing_schedule=steps, num_classes=3, num_heavy_tokens_kv=2, **more
    )


def images(batch=2, seed=1):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def attentions(model):
    return [m for m in model.modules() if isinstance(m, ConditionalRoutedImageAttention)]


def factors(model):
    (found,) = {m.key_factor for m in attentions(model)}
    return found


def keys_routed(model):
    """A list that fills with the keys of the first attention, call by call."""
    routed, router = [], attentions(model)[0].attend.kv_router
    router.register_forward_hook(lambda m, args, found: routed.append(found.indices.shape[-1]))
    return routed


def expected_factors(fusion, steps=STEPS, forwards=STEPS + 2):
    """Those of a schedule that a training script steps."""
    layer = ConditionalRoutedImageAttention(16, num_heavy_tokens_kv=2, fusion=fusion)
    schedule, seen = RoutingSchedule(layer), []
    for step in range(forwards):
        schedule.step(min(1.0, step / steps), step)
        seen.append(layer.key_factor)
    return seen


def train(model, optimizer, forwards, first=0):
    """Train as a script that knows of no schedule, and list the factors it got."""
    seen = []
    for step in range(first, first + forwards):
        cross_entropy(model(images(seed=step)), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(factors(model))
    return seen


@both
@fused
def test_a_script_that_knows_nothing_of_it_trains_with_many_keys_first(name, fusion):
    model = build(name, fusion)
    routed, optimizer = keys_routed(model), create_optimizer_v2(model, opt="sgd", lr=0.01)
    seen = train(model, optimizer, STEPS + 2)
    assert seen == expected_factors(fusion) and seen[0] == 16 and seen[-3:] == [1] * 3
    tokens = 64 if name == "test_colt5_vit" else 256
    assert routed == [min(2 * factor, tokens) for factor in seen]
    assert model.state_dict()[COUNT] == STEPS + 2


@both
def test_evaluation_and_forwards_without_gradients_are_not_counted(name):
    model, plain = build(name, stem="patch"), build(name, steps=None, stem="patch")
    plain.load_state_dict(model.state_dict())
    routed, x = keys_routed(model), images()
    model(x)
    with torch.no_grad():
        model(x)
        for _ in range(3):  # an evaluation after an interruption
            torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    model(x)
    model.train()(x)
    assert routed == [32, 32, 2, 2, 2, 2, 32] and model.stem.schedule.forwards == 2


@both
@fused
def test_only_a_schedule_has_a_buffer(name, fusion):
    without = build(name, fusion, steps=None)
    assert set(build(name, fusion).state_dict()) - set(without.state_dict()) == {COUNT}
    routed = keys_routed(without)
    without(images())
    assert routed == [2]


@both
def test_weights_go_between_models_with_and_without_a_schedule(name):
    model, without = build(name), build(name, steps=None, seed=1)
    for _ in range(4):
        model(images())
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(without.eval()(images()), model.eval()(images()))
    model.load_state_dict(without.state_dict())  # weights without a count start anew
    assert model.stem.schedule.forwards == 0
    model.train()(images())
    assert factors(model) == 16
    with pytest.raises(RuntimeError, match="blocks"):  # all else is as strict as ever
        without.load_state_dict({**model.state_dict(), "stem.blocks.forwards": torch.zeros(())})


@both
@fused
@pytest.mark.parametrize("stop", [0, 3, 8])
def test_a_resumed_training_is_the_one_that_was_not_interrupted(name, fusion, stop):
    whole = build(name, fusion)
    seen = train(whole, torch.optim.SGD(whole.parameters(), 0.01), STEPS)

    first = build(name, fusion)
    before = train(first, torch.optim.SGD(first.parameters(), 0.01), stop)
    second = build(name, fusion, seed=1)
    second(images())  # it has counted, and read, on its own
    second.load_state_dict(first.state_dict())
    after = train(second, torch.optim.SGD(second.parameters(), 0.01), STEPS - stop, stop)
    assert before + after == seen
    torch.testing.assert_close(second.state_dict(), whole.state_dict())


@both
def test_timms_own_training_saves_and_resumes_it(name, tmp_path):
    model = build(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    average = ModelEmaV3(model, decay=0.9)
    seen = []
    for step in range(4):
        seen += train(model, optimizer, 1, step)
        average.update(model, step=step)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), max_history=1
    )
    saver.save_checkpoint(0)

    again = build(name, seed=1)
    optimizer = create_optimizer_v2(again, opt="adamw", lr=1e-3)
    resume_checkpoint(again, str(tmp_path / "last.pth.tar"), optimizer, log_info=False)
    seen += train(again, optimizer, STEPS - 4, 4)
    assert seen == expected_factors("softmax", forwards=STEPS)

    # the weights of the average, in a model for evaluation
    final = build(name, steps=None, seed=2)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    final.load_state_dict(saved["state_dict_ema"])
    torch.testing.assert_close(final.eval()(images()), average.module(images()))


@both
@fused
def test_copies_taken_while_it_runs(name, fusion):
    model = build(name, fusion)
    for _ in range(3):
        model(images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    swa = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    ema = ModelEmaV3(model)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False), swa.module, ema.module]
    for _ in range(2):
        model(images())
    ema.update(model)
    own = {name for name, _ in model.named_modules()}
    for other in copies:
        # their own counts, whatever the original does; and no layer of the original inside
        assert {m.key_factor for m in attentions(other)} == {1}
        routed = keys_routed(other)
        other.eval()(images())
        assert routed == [2] and {name for name, _ in other.named_modules()} == own
    assert [int(c.stem.schedule.forwards) for c in copies] == [3, 3, 3, 5]
    for other, done in zip(copies, (3, 3, 3, 5)):
        other.train()(images())  # trained on, each goes on by itself
        assert factors(other) == expected_factors(fusion)[done]
        assert other.stem.schedule.forwards == done + 1
    assert model.stem.schedule.forwards == 5 and factors(model) == expected_factors(fusion)[4]


@both
@fused
def test_checkpointed_blocks_count_once_and_run_again_with_their_own_keys(name, fusion):
    gradients = []
    for enable in (False, True):
        model = build(name, fusion, stem="patch")
        model.set_grad_checkpointing(enable)
        for _ in range(STEPS // 2 - 1):
            model(images()).sum().backward()
        model.zero_grad()
        # the second forward has other keys than the first, which runs again after it
        loss = model(images(seed=2)).square().sum()
        before = factors(model)
        loss = loss + model(images(seed=3)).square().sum()
        if fusion == "softmax":
            assert before != factors(model)
        loss.backward()
        assert model.stem.schedule.forwards == STEPS // 2 + 1
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_checkpoint_of_the_whole_model_counts_once():
    model, seen = build(), []
    for _ in range(STEPS):
        checkpoint(model, images(), use_reentrant=False).sum().backward()
        seen.append(factors(model))
    assert seen == expected_factors("softmax", forwards=STEPS)
    assert model.stem.schedule.forwards == STEPS


@pytest.mark.parametrize(
    ("name", "fusion"),
    [
        ("test_colt5_vit", "softmax"),
        *further(
            ("test_colt5_vit", "sum"),
            ("test_colt5_pyramid", "softmax"),
            ("test_colt5_pyramid", "sum"),
        ),
    ],
)
def test_a_compiled_model_compiles_once_a_factor(name, fusion):
    model, eager, counter = build(name, fusion), build(name, fusion), CompileCounter()
    compiled, seen, graphs = torch.compile(model, backend=counter), [], []
    for step in range(2 * STEPS):
        x = images(seed=step)
        out, expected = compiled(x), eager(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        seen.append(factors(model))
        graphs.append(counter.frame_count)
    assert seen == expected_factors(fusion, forwards=2 * STEPS)
    # a step adds graphs only when its factor is new
    new = [step for step in range(1, 2 * STEPS) if graphs[step] > graphs[step - 1]]
    assert all(seen[step] not in seen[:step] for step in new)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
    assert model.stem.schedule.forwards == 2 * STEPS


@pytest.mark.parametrize("name", ["test_colt5_vit", *further("test_colt5_pyramid")])
def test_in_evaluation_it_stays_out_of_the_graph(name):
    model, x = build(name).eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@both
@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook", "fx"])
def test_feature_extractors_count_too(name, feature_cls):
    extra = {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 1)}
    model = build(name, **extra)
    routed, seen = keys_routed(model), expected_factors("softmax")
    for _ in range(STEPS + 2):
        features = model(images())
        features = list(features.values()) if isinstance(features, dict) else features
        sum(f.sum() for f in features).backward()
    tokens = 64 if name == "test_colt5_vit" else 256
    assert routed == [min(2 * factor, tokens) for factor in seen]
    (schedule,) = (m for m in model.modules() if isinstance(m, CarriedSchedule))
    assert schedule.forwards == STEPS + 2
    routed.clear()
    model.eval()(images())
    assert routed == [2]


@both
def test_checkpointed_feature_extractors_count_once(name):
    model = build(name, features_only=True, feature_cls="list", out_indices=(0, 1))
    assert isinstance(model, FeatureListNet)
    model.set_grad_checkpointing(True)
    for _ in range(3):
        sum(f.sum() for f in model(images())).backward()
    assert {n: int(t) for n, t in model.named_buffers() if n.endswith("forwards")} == {
        "stem.schedule.forwards": 3
    }


def test_pruned_levels_are_let_go():
    model = build()
    gone = model.blocks[3].attn
    model.prune_intermediate_layers([1])
    model(images()).sum().backward()
    assert factors(model) == 16 and gone.key_factor == 1


def test_the_count_is_read_only_where_others_have_written_it(monkeypatch):
    model, reads, item = build(), [], torch.Tensor.__int__
    schedule = model.stem.schedule

    def reading(x):
        reads.extend([1] if x is schedule.forwards else [])
        return item(x)

    monkeypatch.setattr(torch.Tensor, "__int__", reading)
    for _ in range(3):
        model(images())
    assert len(reads) == 1
    for change in (
        lambda: schedule.forwards.fill_(7),
        lambda: model.load_state_dict({**model.state_dict(), COUNT: torch.tensor(7)}),
        lambda: setattr(schedule, "forwards", torch.tensor(7)),
    ):
        change()
        reads.clear()
        for _ in range(2):
            model(images())
        assert len(reads) == 1 and item(schedule.forwards) == 9


def test_other_dtypes_devices_and_fake_tensors():
    model = build().to(torch.bfloat16)
    model(images().bfloat16())
    assert model.stem.schedule.forwards.dtype == torch.int64
    assert build(device="meta").stem.schedule.forwards.is_meta
    meta = build().to("meta")
    assert meta(images().to("meta")).shape == (2, 3)
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model.stem(torch.randn(2, 3, 64, 64)).shape == (2, 64, 8, 8)
    assert model.stem.schedule.forwards == 0


def test_functional_calls_count_but_not_those_of_many_models_at_once():
    model, x = build(stem="patch"), images()
    stem, done = model.stem, model.stem.schedule.forwards
    weights = {n: p.detach() for n, p in stem.named_parameters()}

    def loss(weights, x):
        return functional_call(stem, weights, (x,)).square().sum()

    stem(x).square().sum().backward()
    found = grad(loss)(weights, x)
    torch.testing.assert_close(found, {n: p.grad for n, p in stem.named_parameters()})
    vmap(grad(loss), (None, 0))(weights, x.unsqueeze(1))
    assert done == 3 and factors(model) == expected_factors("softmax")[2]

    many = {n: torch.stack([t, t]) for n, t in stem.named_buffers()}
    vmap(lambda buffers: functional_call(stem, {**weights, **buffers}, (x,)))(many)
    assert done == 3 and many["schedule.forwards"].tolist() == [3, 3]


def test_a_second_schedule_is_refused():
    with pytest.raises(ValueError, match="model: .* carries its own"):
        RoutingSchedule(build())
    RoutingSchedule(build(steps=None))


@both
@pytest.mark.parametrize("steps", [0, -1, 10.0, True, "10", float("nan"), (10,)])
def test_bad_steps_are_named(name, steps):
    with pytest.raises((TypeError, ValueError), match="^routing_schedule: expected an integer"):
        build(name, steps=steps)


def test_a_model_without_routed_attention_has_nothing_to_schedule():
    with pytest.raises(ValueError, match="^model"):
        CarriedSchedule(nn.Linear(2, 2), STEPS)
    assert CarriedSchedule(nn.Linear(2, 2), None).forwards is None
