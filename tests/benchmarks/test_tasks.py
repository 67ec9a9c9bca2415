"""The tasks: truths are true, scores are what they say, rows are measured once."""

import json
import math

import pytest
import torch

pytest.importorskip("diffusers.models")
pytest.importorskip("skimage")

from benchmarks.rivals.networks import Network
from benchmarks.tasks import __main__ as command
from benchmarks.tasks import report, sampling, scenes, scores
from support.photos import skimage_photo

SIDE = 322
GRID = (SIDE // 14,) * 2


def colours(image, place):
    """(N, 3), means over the patches around (N, 2) places, in patches."""
    small = torch.nn.functional.avg_pool2d(image, 7, 1, 3)
    at = ((place + 0.5) * 14 / SIDE * 2 - 1).flip(-1).float()
    found = torch.nn.functional.grid_sample(small, at[None, None], align_corners=False)
    return found[0, :, 0].T


@pytest.mark.parametrize("views", ["turned", "stereo"])
def test_the_truth_of_two_views_is_where_the_same_thing_is(views):
    """Colours agree there, and not a few patches beside it."""
    pair = scenes.stereo(SIDE)
    if views == "turned":
        pair = scenes.turned(skimage_photo("coffee.png"), SIDE)
    known = pair.truth.isfinite().all(-1)
    assert known.double().mean() > 0.8
    own = colours(pair.second, scenes.centres(SIDE)[known])
    apart = [
        (own - colours(pair.first, pair.truth[known] + torch.tensor(step))).abs().median().item()
        for step in ((0.0, 0.0), (0.0, 2.0), (0.0, -2.0), (2.0, 0.0), (-2.0, 0.0))
    ]
    assert apart[0] < min(apart[1:]) / 2
    assert (pair.truth[known] >= -0.5).all() and (pair.truth[known] <= GRID[0] - 0.5).all()


def test_regions_of_a_mosaic_are_labelled_and_halves_are_apart():
    image, labels = scenes.mosaic(SIDE, 1, half=0)
    assert image.shape == (1, 3, SIDE, SIDE) and labels.shape == (GRID[0] * GRID[1],)
    assert set(labels.tolist()) == {-1, *range(len(scenes.MOSAIC))}
    again, same = scenes.mosaic(SIDE, 1, half=0)
    other, other_labels = scenes.mosaic(SIDE, 1, half=1)
    assert torch.equal(again, image) and torch.equal(same, labels)
    assert torch.equal(other_labels, labels) and (other - image).abs().mean() > 0.1

    # galaxies are dark, which is a colour the labels must know
    dark = colours(image, scenes.centres(SIDE)).mean(-1)
    kinds = [dark[labels == number].mean().item() for number in range(len(scenes.MOSAIC))]
    assert min(range(len(kinds)), key=kinds.__getitem__) == list(scenes.MOSAIC).index("galaxies")


def test_a_probe_learns_what_is_linear_and_leaves_out_what_has_no_label():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    tokens = torch.randn(300, 8, generator=generator)
    tokens[:, :3] += 6 * torch.nn.functional.one_hot(labels)
    probe = scores.Probe(tokens[:200], labels[:200])
    assert scores.agreement(probe(tokens[200:]), labels[200:]) > 0.97
    spoilt, without = tokens[:200].clone(), labels[:200].clone()
    spoilt[:50], without[:50] = 100.0, -1
    found = scores.Probe(spoilt, without)(tokens[200:])
    assert scores.agreement(found, labels[200:]) > 0.97


def test_a_match_is_as_far_away_as_it_is():
    tokens = torch.eye(12)
    truth = torch.tensor([[i // 4, i % 4] for i in range(12)]).double()
    assert (scores.matched(tokens, tokens, truth, 4)[0] == 0).all()
    away, _ = scores.matched(tokens, tokens, truth + torch.tensor([1.0, 1.5]), 4)
    assert (away == 1.5).all()
    truth[:3] = float("nan")
    away, nearest = scores.matched(tokens, tokens.roll(1, 0), truth, 4)
    assert nearest.tolist() == [11, *range(11)]
    assert away.tolist() == [1, 3, 1, 1, 1, 3, 1, 1, 1]  # 4 and 8 begin a row


def test_overlap_of_salient_maps():
    one = torch.tensor([0.9, 0.9, 0.1, 0.1])
    assert scores.overlap(one, one) == 1
    assert scores.overlap(one, torch.tensor([0.1, 0.9, 0.9, 0.1])) == pytest.approx(1 / 3)
    assert scores.overlap(one, 1 - one) == 0 and scores.overlap(one * 0, one * 0) == 1


class Step(torch.nn.Module):
    """A consistency model that halves what it gets, and remembers how noisy it was."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, noisy, sigma):
        self.seen.append((sigma, noisy.std().item()))
        return (noisy / 2).clamp(-1, 1)


def test_a_picture_is_made_in_steps_of_less_noise():
    net = Step()
    picture = sampling.denoised(net, 64, 3)
    assert torch.equal(picture, sampling.denoised(Step(), 64, 3))
    assert not torch.equal(picture, sampling.denoised(Step(), 64, 4))
    assert [sigma for sigma, _ in net.seen] == list(sampling.SIGMAS) and len(net.seen) >= 4
    for sigma, spread in net.seen:
        assert spread == pytest.approx(math.hypot(sigma, 0.8 * (sigma < 80)), rel=0.1)


class Pictures(command.Pictures):
    """With an attention of colours in place of DINOv2."""

    def __init__(self):
        self.side, self.columns, self.mosaics = 728, 52, 1
        self.photos = {"coffee": skimage_photo("coffee.png")}
        self.decoder = lambda features, size: torch.nn.functional.interpolate(
            features[:, :1].sigmoid(), size=size
        )
        self.net = Network("DINOv2", 52**2, 1, lambda x: x, self.run)

    def run(self, image):
        patches = torch.nn.functional.pixel_unshuffle(torch.nn.functional.avg_pool2d(image, 7), 2)
        x = torch.nn.functional.pad(patches.flatten(2).mT, (0, 4, 1, 0)).unsqueeze(1)
        x = x + torch.nn.functional.scaled_dot_product_attention(3 * x, x, x)
        return x[:, 0, 1:]


def test_rows_are_measured_once_and_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "Pictures", lambda *_: Pictures())
    words = [
        "--tasks",
        "segments",
        "views",
        "--quick",
        "--output",
        str(tmp_path),
        "--vit-size",
        "728",
    ]
    assert command.main(words) == 0
    path = tmp_path / "tasks_cpu.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 * len(command.WAYS)
    for row in rows:
        shares = {name: x for name, x in row.items() if name not in command.KEY}
        assert len(shares) in (2, 5) and all(0 < x <= 1 for x in shares.values())
        alike = row.get("segments_alike", row.get("matches_alike"))
        if "bfloat16" not in row["method"]:  # which may round nothing away
            assert (alike == 1) == (row["method"] == report.FULL)
    text = (tmp_path / "tasks_cpu.md").read_text()
    assert text.count("| ToDo, 1/9 |") == 1 and "1 mosaics; views of coffee, stereo" in text

    # a line that was cut short is measured again, the others are not
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    measured = []
    tokens = Pictures.tokens
    monkeypatch.setattr(
        Pictures, "tokens", lambda self, x, way="full": measured.append(way) or tokens(self, x, way)
    )
    assert command.main([*words, "--resume"]) == 0
    assert path.read_text().splitlines() == lines
    assert set(measured) == {"full", json.loads(lines[-1])["method"]}


def test_the_table_tells_the_mean_and_what_is_farthest_from_full_attention(tmp_path):
    rows = [
        {"task": "segments", "size": 14, "input": name, "method": method, "segments": share}
        | {"segments_alike": 1.0}
        for name, method, share in (
            ("0", "full", 0.9),
            ("1", "full", 0.8),
            ("0", "ours", 0.91),
            ("1", "ours", 0.77),
        )
    ]
    rows += [
        {"task": "denoise", "size": 256, "input": str(n), "method": "ours", "psnr": 50.0 + n}
        for n in range(2)
    ]
    text = report.write(rows, tmp_path / "tasks_cpu")
    assert "| full | 85.00 | 100.00 |  |  |  |  |  |" in text
    assert "| ours | 84.00 (-3.00) | 100.00 (+0.00) |  |  |  |  |  |" in text
    assert "| ours | 50.5 | 50.0 | 2 |" in text


def test_bad_arguments_are_told(capsys):
    for words in (
        ["--vit-size", "1000"],
        ["--vit-size", "714"],
        ["--unet-size", "128"],
        ["--mosaics", "0"],
    ):
        with pytest.raises(SystemExit):
            command.parse(words)
        assert f"{words[0]}: expected" in capsys.readouterr().err
