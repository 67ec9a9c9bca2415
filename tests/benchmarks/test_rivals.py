"""The rivals: with every key kept each is full attention, fewer keys are fewer, rows are kept."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers.models")

from benchmarks.rivals import __main__ as command
from benchmarks.rivals import blocks, measure, report
from benchmarks.rivals.layer import Layer, label
from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.networks import Network
from benchmarks.rows import Rows

GRID, PREFIX = (34, 29), 1
every = pytest.mark.parametrize("name", METHODS)


def layer(grid=GRID, prefix=PREFIX, sharp=2.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, prefix + grid[0] * grid[1], 8, generator=generator).unbind(0)
    return Layer(sharp * q, k, v, grid, prefix)


@every
@pytest.mark.parametrize("prefix", [0, 1])
def test_with_every_key_kept_a_method_is_full_attention(name, prefix):
    one = layer(prefix=prefix)
    found = measure.run(METHODS[name], one, 1.0, 0)
    torch.testing.assert_close(found.out, one.full, rtol=1e-5, atol=1e-5)


@every
def test_fewer_keys_are_an_estimate_at_fewer_flops(name):
    one = layer()
    row = measure.attention(METHODS[name], one, 0.35)
    assert 1e-3 < row["error"] < 1.5 and row["p99"] >= row["error"] / 2
    assert name == "ToMe-style" or 0.2 < row["kept"] < 0.98
    flops = measure.flops(METHODS[name], one, 0.35)
    assert flops > 0.2 and (flops < 1 or "oracle" in name or "SVG-EAR" in name)


def test_a_row_of_kept_mass_is_the_softmax_over_those_keys():
    one = layer()
    found = blocks.sparge(one, 0.35)
    chosen = blocks._top(blocks._mean_logits(one), 0.35)
    softmax = (one.queries @ one.k.mT * one.scale).softmax(-1)
    mask = chosen[:, one.tile_of][:, :, one.tile_of]
    kept = (softmax[..., PREFIX:] * mask).sum(-1) + softmax[..., :PREFIX].sum(-1)
    torch.testing.assert_close((found.exact - one.lse).exp(), kept)


def test_flops_of_a_method_are_those_of_its_pairs():
    one = layer(grid=(12, 12), prefix=0)
    kept = 6 * 6 / 144  # every other row and column
    assert measure.flops(METHODS["ToDo"], one, 1 / 4) == pytest.approx(kept)


def test_quarters_are_the_halves_of_tiles():
    one = layer(grid=(17, 9))  # tiles of 5 or 6 rows and 4 or 5 columns
    logits = blocks._quarter_logits(one)
    assert logits.shape == (2, 6, 6) and logits.isfinite().all()
    rows, columns = (blocks._halves(n) for n in one.grid)
    assert rows.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert torch.equal(label(one.tiles, 17 * 9).view(17, 9), rows[:, None] // 2 * 2 + columns // 2)


class Alone:
    """A network of two attentions, as the benchmark takes one."""

    def __init__(self):
        self.net = Network("DINOv2", 12 * 12, 1, self.open, self.run)

    def open(self, name):
        return torch.randn(1, 2, 145, 8, generator=torch.Generator().manual_seed(len(name)))

    def run(self, x):
        for _ in range(2):
            x = torch.nn.functional.scaled_dot_product_attention(3 * x, x, x) + x
        return x[:, :, 1:]


def test_rows_are_measured_once_and_a_run_goes_on(tmp_path, monkeypatch):
    args = SimpleNamespace(densities=[0.4], methods=["PISA 0", "ToDo"], layers=None, draws=1)
    net = Alone().net
    rows = Rows(tmp_path / "rivals_cpu.jsonl", command.KEY, False)
    command.single(net, 12, "a", args, rows)
    command.whole(net, 12, "a", args, rows)
    assert len(rows.rows) == 2 * 2 + 2
    assert [row["layer"] for row in rows.rows] == [0, 0, 1, 1, None, None]
    assert all(row["relative"] > 1e-3 for row in rows.rows[4:])
    text = report.write(rows.rows, tmp_path / "rivals_cpu")
    assert text.count("| PISA 0 |") == 1 and (tmp_path / "rivals_cpu.png").stat().st_size > 1000

    # a line that was cut short is measured again, the others are not
    lines = rows.path.read_text().splitlines()
    rows.path.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    again = Rows(rows.path, command.KEY, True)
    assert again.rows == rows.rows[:-1]
    monkeypatch.setattr(measure, "attention", lambda *_: pytest.fail("measured twice"))
    command.single(net, 12, "a", args, again)
    command.whole(net, 12, "a", args, again)
    assert [json.loads(line) for line in rows.path.read_text().splitlines()] == again.rows
    assert again.rows == rows.rows


def test_a_method_sees_the_network_it_replaces():
    net = Alone().net
    full = net.outputs("a")
    torch.testing.assert_close(net.outputs("a", lambda number, one: one.full), full)
    seen = []
    net.outputs("a", lambda number, one: (seen.append((number, one.grid)), one.full)[1])
    assert seen == [(0, (12, 12)), (1, (12, 12))]


def test_larger_maps_are_measured_on_what_was_not_looked_at():
    """And on less of it."""
    found = list(command.runs(command.parse(["--noises", "7", "8"])))
    sizes = [(kind, size, inputs) for kind, size, inputs, _ in found]
    photos = [path.stem for path in command.default_photos()]
    assert sizes == [
        ("DINOv2", 1036, photos),
        ("DINOv2", 1526, photos[-1:]),
        ("UNet", 256, ["7", "8"]),
        ("UNet", 512, ["8"]),
    ]
    for _, size, _, how in found:
        large = size in (1526, 512)
        assert len(how.densities) == (1 if large else 2)
        assert how.layers == ([0, 3, 6, 9] if large else None)
        assert ("oracle per query" in how.methods) != large


@every
def test_a_density_that_a_method_cannot_hold_is_not_asked_of_it(name):
    """No run is lost by it: 5 % of a small map is less than a window."""
    small, density = layer(grid=(64, 64), prefix=0), 0.05
    assert METHODS[name].fits(small.tokens, density) == ("window 14" not in name)
    if METHODS[name].fits(small.tokens, density):
        assert measure.run(METHODS[name], small, density, 0).out.isfinite().all()


def test_bad_arguments_are_told(capsys):
    for words in (["--vit-size", "100"], ["--densities", "2"], ["--draws", "0"]):
        with pytest.raises(SystemExit):
            command.parse(words)
        assert f"{words[0]}: expected" in capsys.readouterr().err
