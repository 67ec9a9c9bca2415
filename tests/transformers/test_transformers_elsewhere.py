"""Routed transformers models: what cannot be routed, threads, checkpointing, compiled, saved."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf

from colt5_vision import route_attention, routed_layers, unroute_attention, why_not
from tests.support.transformers_cases import CASES, SMALL, VIT, build, run

HOW = {"window_size": 3, "num_heavy_tokens_kv": 0.25, "min_tokens": 0}
some = pytest.mark.parametrize(
    "name", ["Dinov2Model", "DINOv3ViTModel", "BeitModel", "SamVisionModel", "VideoMAEModel"]
)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@some
def test_threads_share_a_model(name):
    case, model = CASES[name], build(CASES[name])
    route_attention(model, **HOW)
    sizes = ((20, 28), (28, 20)) if case.size == (20, 28) else (case.size, case.size)
    inputs = [case.inputs(size=size, seed=i) for i, size in enumerate(sizes)]
    expected = [run(model, x) for x in inputs]

    def work(i):
        for _ in range(10):
            close(run(model, inputs[i]), expected[i])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


@some
def test_copies_and_pickles(name):
    model, inputs = build(CASES[name]), CASES[name].inputs()
    route_attention(model, router="learned", **HOW)
    expected, file = run(model, inputs), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, inputs), expected)
        unroute_attention(twin)
    assert torch.equal(run(model, inputs), expected)


def test_save_pretrained_is_unharmed(tmp_path):
    model, inputs = build(CASES["Dinov2Model"]), CASES["Dinov2Model"].inputs()
    expected = run(model, inputs)
    model.save_pretrained(tmp_path / "before")
    route_attention(model, router="learned", **HOW)
    model.save_pretrained(tmp_path)
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    plain = hf.Dinov2Model.from_pretrained(tmp_path).eval()
    assert torch.equal(run(plain, inputs), expected)
    assert routed_layers(plain) == {}


@pytest.mark.parametrize("name", ["Dinov2Model", "SamVisionModel"])
def test_checkpointing_with_two_sizes_in_flight(name):
    case, grads = CASES[name], []
    for checkpointing in (False, True):
        model = build(case).train()
        route_attention(model, **HOW)
        if checkpointing:
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        sizes = ((20, 28), (28, 20)) if case.size == (20, 28) else (case.size, case.size)
        losses = [model(**case.inputs(size=size))[0].square().sum() for size in sizes]
        losses[1].backward()
        losses[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, value in grads[0].items():
        close(grads[1][key], value, 1e-4)


def test_compiles_whole_at_sizes_that_change():
    torch.compiler.reset()
    case, model = CASES["Dinov2Model"], build(CASES["Dinov2Model"])
    route_attention(model, **HOW)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((20, 28), (28, 20)):
        close(run(fast, case.inputs(size=size)), run(eager, case.inputs(size=size)))


def test_text_towers_are_left_alone():
    model = build(CASES["CLIPModel"])
    report = route_attention(model, **HOW)
    assert all(name.startswith("vision_model.") for name in report)
    text = {name for name in report.exact if name.startswith("text_model.")}
    assert len(text) == 2 and "sees no map" in report.exact[text.pop()]


def test_sigmas_windowed_layers_are_left_with_the_reason():
    config = CASES["SamVisionModel"].make().config
    config.global_attn_indexes = [1]
    left = why_not(hf.SamVisionModel(config))
    assert left == {"vision_encoder.layers.0.attn": "it attends in windows of its own"}


def test_packed_towers_are_refused():
    config = hf.Qwen2VLConfig().vision_config
    config.depth, config.embed_dim, config.num_heads, config.hidden_size = 1, 32, 2, 32
    kind = hf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel
    model = kind(config)
    with pytest.raises(ValueError, match=r"packed into one sequence \(cu_seqlens\)"):
        route_attention(model, **HOW)


def test_other_implementations_are_refused_and_how_to_change_them_said():
    model = build(CASES["ViTModel"])
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager': call model.set_attn_implementation.'sdpa'"):
        route_attention(model, **HOW)


def test_an_implementation_changed_later_is_counted_and_told():
    model, inputs = build(CASES["ViTModel"]), CASES["ViTModel"].inputs()
    report = route_attention(model, **HOW)
    model.set_attn_implementation("eager")
    with pytest.warns(RuntimeWarning, match="no call of torch's scaled_dot_product_attention"):
        run(model, inputs)
    assert report.calls.routed == 0 and report.calls.exact.total() == 2


def test_masked_tokens_of_a_mae_stay_exact_and_are_told():
    model, inputs = build(CASES["ViTMAEModel"]), CASES["ViTMAEModel"].inputs()
    model.config.mask_ratio = 0.5
    expected = run(model, inputs)
    report = route_attention(model, **HOW)
    with pytest.warns(RuntimeWarning, match="tokens are masked: there is no whole map"):
        assert torch.equal(run(model, inputs), expected)
    assert report.calls.exact == {"tokens are masked: there is no whole map": 2}


def test_images_of_several_sizes_in_a_batch_stay_exact():
    model, inputs = build(CASES["Siglip2VisionModel"]), CASES["Siglip2VisionModel"].inputs()
    inputs["spatial_shapes"] = torch.tensor([[5, 7], [7, 5]])
    report = route_attention(model, **HOW)
    with pytest.warns(RuntimeWarning, match="images of the batch have different sizes"):
        run(model, inputs)
    assert report.calls.routed == 0


def test_the_report_tells_tokens_at_a_sample_size():
    model = build(CASES["Dinov2Model"])
    report = route_attention(model, min_tokens=50, sample_size=(40, 60))
    assert set(report.values()) == {150}
    unroute_attention(model)
    with pytest.raises(ValueError, match="64 tokens: so few tokens that the expected"):
        route_attention(model)


def test_a_timm_model_inside_transformers():
    pytest.importorskip("timm")
    config = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64},
    )
    model = hf.TimmWrapperModel(config).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
        report = route_attention(model, **HOW | {"num_heavy_tokens_kv": 1.0})
        close(model(x)[0], expected)
    assert len(report) == 2 and report.calls.routed == 2


def test_llava_routes_its_vision_tower_alone():
    text = hf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)
    vision = hf.CLIPVisionConfig(**VIT)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=49)
    model = hf.LlavaForConditionalGeneration(config)
    report = route_attention(model, **HOW)
    assert len(report) == 2 and all("vision_tower" in name for name in report)
