"""The cost model: what layers are expected to gain, who keeps full attention, and who decides."""

import json
import math

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from colt5_vision import RoutedAttentionConfig, route_attention, unroute_attention
from colt5_vision.checks import ROUTERS
from colt5_vision.swap import cost
from colt5_vision.swap.config import BESIDE_OTHERS, MIN_TOKENS, TOO_LITTLE_GAIN, TOO_SMALL
from colt5_vision.swap.report import RoutedAttentionReport

CPU = ("cpu", torch.float32)


def constants(**changed) -> dict:
    """Of a device: 1 picosecond a product, 1 second a call of routed attention."""
    sample = cost.Work(1, 1, 1, 1, 1)
    kinds = {
        kind: {
            name: {"products": 1e-12, "calls": 0.0 if kind == "full" else 1.0}.get(name, 0.0)
            for name in amounts(sample)
        }
        for kind, amounts in cost.AMOUNTS.items()
    }
    return {"machine": "none", "threads": 1, **dict.fromkeys(cost.PASSES, kinds)} | changed


@pytest.fixture
def costs_file(tmp_path, monkeypatch):
    """Writes what it is given where the library reads it."""

    def write(found) -> str:
        path = tmp_path / f"costs{len(list(tmp_path.iterdir()))}.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        monkeypatch.setenv(cost.VARIABLE, str(path))
        return str(path)

    return write


@settings(deadline=None, max_examples=100)
@given(
    router=st.sampled_from(ROUTERS),
    tokens=st.integers(256, 1 << 18),
    more=st.integers(1, 1 << 18),
    channels=st.sampled_from([64, 320, 384, 1280]),
    window=st.sampled_from([4, (8, 8), 16, (1, 8, 8)]),
    keys=st.sampled_from([1 / 64, 1 / 16, 1 / 4, 1, 256]),
)
def test_larger_maps_take_longer_and_gain_no_less(router, tokens, more, channels, window, keys):
    costs = cost.read_costs(cost.SHIPPED)[CPU]
    how = {"router": router, "window_size": window, "num_heavy_tokens_kv": keys}
    few, many = (costs.speedup(n, channels, **how) for n in (tokens, tokens + more))
    assert 0 < few <= many * 1.02  # a share of the tokens is rounded to a number of keys
    for kind in cost.AMOUNTS:
        for what in cost.PASSES:
            one, other = (
                costs.seconds(kind, cost.Work(n, channels, 64, 64), what)
                for n in (tokens, tokens + more)
            )
            assert 0 < one < other


def test_more_threads_share_the_work_but_not_the_calls(costs_file):
    costs_file({"cpu, float32": constants()})
    costs = cost.known_costs()[CPU]
    work = cost.Work(1000, 64, 64, 100)
    full = 1e-12 * 1000**2 * 64
    assert costs.seconds("full", work, threads=1) == pytest.approx(full)
    assert costs.seconds("full", work, threads=4) == pytest.approx(full / 4)
    assert costs.seconds("operator", work, threads=4) == pytest.approx(1 + full * 0.164 / 4)
    assert costs.seconds("full", work._replace(batch=3), threads=1) == pytest.approx(3 * full)


def test_the_least_tokens_are_where_the_gain_begins():
    costs = cost.read_costs(cost.SHIPPED)[CPU]
    how = {"router": "sampled", "window_size": 16, "num_heavy_tokens_kv": 1 / 16}
    for bar in (1.0, 1.1, 3.0):
        least = costs.least_tokens(bar, 384, **how)
        assert costs.speedup(least, 384, **how) >= bar > costs.speedup(least - 1, 384, **how)
    assert costs.least_tokens(1e6, 384, **how) == 1 << 24  # never


@pytest.mark.parametrize("router", ROUTERS)
def test_a_text_and_other_images_leave_less_to_gain(router):
    """With all there is attended to by all, a routed layer saves nothing."""
    costs = cost.read_costs(cost.SHIPPED)[CPU]
    how = {"router": router, "window_size": 16, "num_heavy_tokens_kv": 1 / 16}
    gains = [costs.speedup(4096, 384, others=n, **how) for n in (0, 512, 4096, 1 << 20)]
    assert gains == sorted(gains, reverse=True) and 1 < gains[-1] < gains[0] / 1.2
    least = [costs.least_tokens(1.1, 384, others=n, **how) for n in (0, 512, 4096)]
    assert least == sorted(least) and least[0] < least[2]


def test_explicit_settings_win_and_where_nothing_is_known_1024_tokens_do():
    config = RoutedAttentionConfig
    assert set(config().least_tokens(384)) == {None, CPU}
    assert config().least_tokens(384)[None] == (MIN_TOKENS, TOO_SMALL)
    assert config().least_tokens(384)[CPU][1] == TOO_LITTLE_GAIN
    assert config().least_tokens(None) == {None: (MIN_TOKENS, TOO_SMALL)}
    assert config(num_heavy_tokens_q=0.5).least_tokens(384) == {None: (MIN_TOKENS, TOO_SMALL)}
    assert config(min_tokens=7).least_tokens(384) == {None: (7, TOO_SMALL)}
    assert config(min_tokens=7, min_speedup=5).least_tokens(384) == {None: (7, TOO_SMALL)}
    assert config(min_speedup=0).least_tokens(384) == {None: (0, TOO_SMALL)}
    lower, higher = (config(min_speedup=x).least_tokens(384)[CPU][0] for x in (1.1, 3))
    assert 64 < lower < higher < 1 << 16
    assert config().expected_speedup(4096, 384, ("cuda", torch.float16)) is None


@pytest.mark.parametrize("bar", [-1, math.inf, math.nan, "1", None, True])
def test_a_bad_bar_is_refused_by_name(bar):
    with pytest.raises((TypeError, ValueError), match="min_speedup: expected a number"):
        RoutedAttentionConfig(min_speedup=bar)


BAD = {
    "no JSON": ("{", "expected a JSON file of benchmarks.cpu --fit"),
    "a list": ([1], "expected a mapping of devices, got"),
    "a name": ({"cpu": constants()}, "expected names as 'cpu, float32', got 'cpu'"),
    "a dtype": ({"cpu, float": constants()}, None),
    "keys": ({"cpu, float32": {"threads": 2}}, r"cpu, float32: expected .* got \['threads'\]"),
    "threads": ({"cpu, float32": constants(threads=0)}, "threads: expected an int >= 1, got 0"),
    "a pass": ({"cpu, float32": constants(forward=3)}, "forward: full: expected .* got None"),
}


@pytest.mark.parametrize("found, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_by_name(costs_file, found, message):
    path = costs_file(found)
    if message is None:  # torch.float is a name of torch.float32, but not the one it says
        message = "expected names as 'cpu, float32', got 'cpu, float'"
    with pytest.raises(ValueError, match=message) as error:
        cost.known_costs()
    assert f"{cost.VARIABLE}: expected" in str(error.value) or path in str(error.value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None, True])
def test_a_bad_constant_is_refused_by_name(costs_file, value):
    found = json.loads(json.dumps(constants()))
    found["forward"]["full"]["calls"] = value
    path = costs_file(json.dumps({"cpu, float32": found}))
    with pytest.raises(ValueError, match="forward: full: calls: expected a number >= 0") as error:
        cost.known_costs()
    assert path in str(error.value)


def test_a_file_that_is_not_there_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv(cost.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=rf"{cost.VARIABLE}: expected a JSON file.*none\.json"):
        RoutedAttentionConfig().least_tokens(64)


def vit(size: int = 64, **more):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    how = {"img_size": size, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return timm.create_model(name, num_classes=0, dynamic_img_size=True, **how, **more).eval()


@torch.no_grad()
def test_layers_that_would_not_gain_keep_full_attention_and_are_told(costs_file, recwarn):
    # a routed call costs a second: nothing gains until full attention takes as long
    costs_file({"cpu, float32": constants(threads=torch.get_num_threads())})
    model, x = vit(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(ValueError, match=r"min_speedup: 2\.62e-07 \(2\).*min_speedup is 1\.1"):
        route_attention(model, sample_size=(64, 64))

    how = {"window_size": 4, "num_heavy_tokens_kv": 8}
    report = route_attention(model, sample_size=(32_768, 32_768), **how)  # 16,777,216 tokens
    assert report.expected == dict.fromkeys(report, pytest.approx(17_700, rel=0.1))
    assert "expected to be" in str(report) and "times as fast" in str(report)
    assert torch.equal(model(x), expected)
    assert report.calls.exact == {TOO_LITTLE_GAIN: 2} and report.calls.routed == 0
    assert f"2 exact: {TOO_LITTLE_GAIN}" in str(report)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    unroute_attention(model)

    # asked for, they are routed
    for explicit in ({"min_speedup": 0}, {"min_tokens": 64}):
        report = route_attention(model, sample_size=(64, 64), **how, **explicit)
        assert not torch.equal(model(x), expected)
        assert report.calls.routed == 2 and not report.calls.exact
        unroute_attention(model)


@torch.no_grad()
def test_a_map_that_gains_alone_keeps_full_attention_beside_many_others(costs_file, recwarn):
    """Reckoned when the model is called; what the report foretells is without them."""
    every = constants(threads=torch.get_num_threads())
    every["forward"]["sampled"]["calls"] = 1e-7
    costs_file({"cpu, float32": every})
    model, x = vit(reg_tokens=600), torch.randn(1, 3, 64, 64)
    expected = model(x)
    report = route_attention(model, window_size=2, num_heavy_tokens_kv=2)
    assert report == dict.fromkeys(report, 64) and min(report.expected.values()) > 1.1
    assert "expected without a text or other images" in str(report)
    assert torch.equal(model(x), expected)
    assert report.calls.exact == {BESIDE_OTHERS: 2}
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@torch.no_grad()
def test_layers_of_a_device_without_costs_are_told_and_routed(costs_file):
    costs_file({"cuda, float32": constants()})
    model = vit()
    report = route_attention(model, sample_size=(256, 256), window_size=4)
    assert report == dict.fromkeys(report, 1024) and len(report) == 2
    assert report.expected == dict.fromkeys(report, None)
    assert "no costs are known" in str(report)
    with pytest.raises(ValueError, match=TOO_SMALL):
        route_attention(vit(), sample_size=(248, 248))


@torch.no_grad()
def test_a_compiled_layer_decides_as_an_eager_one_and_is_compiled_no_more_often(costs_file):
    """The least number of tokens is known beforehand: nothing new is looked at in a graph."""
    every = constants(threads=torch.get_num_threads())
    every["forward"]["sampled"]["calls"] = 4e-6  # gains from 256 tokens on, about
    costs_file({"cpu, float32": every})
    how = {"window_size": 4, "num_heavy_tokens_kv": 8}
    small, large = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 256, 256)
    plain = vit()
    with_full = [plain(x) for x in (small, large)]
    eager = vit()
    route_attention(eager, sample_size=(256, 256), **how)
    expected = [eager(x) for x in (small, large)]
    assert torch.equal(expected[0], with_full[0]) and not torch.equal(expected[1], with_full[1])

    # as often compiled as with a number of one's own
    counts = []
    for more in ({}, {"min_tokens": 65}):
        torch._dynamo.reset()
        counter, model = CompileCounter(), vit()
        route_attention(model, sample_size=(256, 256), **how, **more)
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        for _ in range(2):
            for x, y in zip((small, large), expected):
                torch.testing.assert_close(compiled(x), y)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 3


def test_layers_that_have_the_same_to_say_share_a_line():
    names = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1", "blocks.0.attn2")
    report = RoutedAttentionReport(dict(zip(names, (9, 9, 4, 9))), {"a.1": "x", "a.2": "x"}, {})
    assert str(report).splitlines() == [
        "4 layers routed, 2 as they were",
        "  blocks.*.attn1 (2): 9 tokens",
        "  blocks.2.attn1: 4 tokens",
        "  blocks.0.attn2: 9 tokens",
        "  a.* (2): full attention, x",
    ]


def test_settings_that_gain_nothing_anywhere_are_told():
    for how, note in (
        ({"window_size": 8}, "no more than a window has"),
        ({"num_heavy_tokens_kv": 1.0}, "all of them routed keys"),
        ({"window_size": 4, "num_heavy_tokens_kv": 1 / 4}, None),
        ({"router": "grouped", "num_heavy_tokens_kv": 1 / 4}, None),
    ):
        report = route_attention(vit(), **{"window_size": 2, "min_speedup": 0} | how)
        told = dict.fromkeys(report, f"{note}: nothing is saved") if note else {}
        assert report.notes == told and ("nothing is saved" in str(report)) == bool(note)


def test_the_report_of_a_routing_without_estimates_is_as_it_was():
    assert str(RoutedAttentionReport({"a": 3}, {}, {})) == (
        "1 layers routed, 0 as they were\n  a: 3 tokens"
    )
