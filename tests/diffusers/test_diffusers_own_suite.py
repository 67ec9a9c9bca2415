"""Every test of diffusers' own that passes passes with routed models, all tokens routed.

By default the suites that run in seconds; ``COLT5_DIFFUSERS_TESTS=all`` for all. See
:mod:`diffusers_own_tests` for where they come from; without them the suites are skipped, with the
reason, and what runs them is tested on a small one.
"""

import os
import shutil
from pathlib import Path

import diffusers
import pytest

from tests.support import diffusers_own_tests
from tests.support.diffusers_own_tests import Unavailable, fetch, passed, run

UNETS, TRANSFORMERS, PIPELINES = (
    "tests/models/unets",
    "tests/models/transformers",
    "tests/pipelines",
)
FAST = {
    "unet_2d": f"{UNETS}/test_models_unet_2d.py",
    "dit": f"{TRANSFORMERS}/test_models_dit_transformer2d.py",
}
SLOW = {
    "unet_2d_condition": f"{UNETS}/test_models_unet_2d_condition.py",
    "pixart": f"{TRANSFORMERS}/test_models_pixart_transformer2d.py",
    "sd3": f"{TRANSFORMERS}/test_models_transformer_sd3.py",
    "flux": f"{TRANSFORMERS}/test_models_transformer_flux.py",
    "pipeline_ddpm": f"{PIPELINES}/ddpm",
    "pipeline_dit": f"{PIPELINES}/dit",
    "pipeline_pixart": f"{PIPELINES}/pixart_alpha",
    "pipeline_stable_diffusion": f"{PIPELINES}/stable_diffusion",
    "pipeline_stable_diffusion_xl": f"{PIPELINES}/stable_diffusion_xl",
    "pipeline_stable_diffusion_3": f"{PIPELINES}/stable_diffusion_3",
    "pipeline_flux": f"{PIPELINES}/flux",
    "pipeline_controlnet": f"{PIPELINES}/controlnet",
}
SUITES = FAST | (SLOW if os.environ.get("COLT5_DIFFUSERS_TESTS") == "all" else {})
# that many pass with routing live; low, as long as no release could be counted here. None of
# pipelines, whose tokenizers are on the hub, nor of Flux, whose models get positions that are no
# map
MINIMUM = {"unet_2d": 10, "unet_2d_condition": 10, "dit": 3, "pixart": 3, "sd3": 10}
EXPECTED: dict[str, dict[str, str]] = {}
"""By suite and test id: tests that must fail when routed, and what they assert about the
processors."""

SMALL_SUITE = """
import torch
from diffusers import ControlNetModel, DiTTransformer2DModel, Transformer2DModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4}
BLOCKS |= {"sample_size": 8}

def dit():
    sizes = {"num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 8}
    return DiTTransformer2DModel(2, 4, in_channels=4, **sizes)

def unet(kinds=("AttnDownBlock2D", "AttnUpBlock2D")):
    down, up = ((kind, kind) for kind in kinds)
    return UNet2DModel(down_block_types=down, up_block_types=up, layers_per_block=1, **BLOCKS)

def test_save(tmp_path):
    model, x = unet().eval(), torch.randn(2, 3, 8, 8)
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(x, 1).sample, again(x, 1).sample)

def test_dit():
    dit()(torch.randn(1, 4, 8, 8), timestep=torch.ones(1).long(), class_labels=torch.ones(1).long())

def test_nested():
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "cross_attention_dim": 8}
    kinds |= {"layers_per_block": 1}
    ControlNetModel(**kinds, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4)

def test_nothing_to_route():
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(**kinds, block_out_channels=(8,), norm_num_groups=4, add_attention=False)

def test_processor():
    assert isinstance(dit().transformer_blocks[0].attn1.processor, AttnProcessor2_0)

def test_hooks():
    assert not dit().transformer_blocks[0].attn1._forward_pre_hooks

def test_fails():
    assert False
"""


@pytest.fixture(scope="module")
def source() -> Path:
    try:
        return fetch()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suite", SUITES)
def test_routing_breaks_no_test_of_diffusers(source, suite):
    stock, routed = (run(source, SUITES[suite], routed=kind) for kind in (False, True))
    broken = {name: routed[name]["why"] for name in passed(stock) - passed(routed)}
    assert set(broken) == set(EXPECTED.get(suite, {})), broken
    assert set(stock) == set(routed)
    live = [name for name in passed(routed) if routed[name]["routed_calls"]]
    assert len(live) >= MINIMUM.get(suite, 0)
    assert not any(result["routed_calls"] for result in stock.values())


def test_what_runs_them_routes_and_notices(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(SMALL_SUITE)
    stock, routed = (run(tmp_path, "tests", routed=kind) for kind in (False, True))
    test = "tests/test_small.py::test_{}".format
    assert set(stock) - passed(stock) == {test("fails")}
    assert passed(stock) - passed(routed) == {test("hooks")}
    assert "AssertionError" in routed[test("hooks")]["why"]
    assert {name for name in routed if routed[name]["routed_calls"]} == {test("save"), test("dit")}
    assert not any(result["routed_calls"] for result in stock.values())


def test_an_unreachable_registry_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(diffusers_own_tests, "CACHE", tmp_path)
    monkeypatch.delenv("COLT5_DIFFUSERS_SOURCE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable, match="pip download .* failed"):
        fetch()


def test_a_source_of_another_version_or_without_tests_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("COLT5_DIFFUSERS_SOURCE", str(tmp_path))
    with pytest.raises(Unavailable, match="does not hold the source of the installed diffusers"):
        fetch()
    own = tmp_path / "src" / "diffusers" / "__init__.py"
    own.parent.mkdir(parents=True)
    shutil.copy(diffusers.__file__, own)
    with pytest.raises(Unavailable, match="has no tests/models: name a checkout"):
        fetch()
    (tmp_path / "tests" / "models").mkdir(parents=True)
    assert fetch() == tmp_path.resolve()
