"""The needle study: canvases on which nothing near a square tells its label, and runs that
resume."""

import json

import pytest
import torch

from tests.support.marks import exhaustive

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from benchmarks import ablations, needle
from benchmarks.needle_model import DIM, VARIANTS, SquareReader
from benchmarks.needle_report import accuracy_table, by_variant, summarize
from benchmarks.needle_task import CELL, WINDOW, NeedleTask


@pytest.fixture(scope="module")
def task():
    return NeedleTask(192, seed=0)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_canvases_are_functions_of_seed_split_and_number(task):
    batch = task.train(3, 16)
    assert (
        batch.images.shape == (16, 1, 192, 192)
        and batch.squares.shape == (16, 6)
        and batch.near.shape == (16, 576)
    )
    assert same(batch, NeedleTask(192, seed=0).train(3, 16))
    halves = [task.train(step, 8) for step in (6, 7)]
    assert same(batch, (torch.cat(parts) for parts in zip(*halves)))
    assert not same(batch, NeedleTask(192, seed=1).train(3, 16))
    assert not same(task.held_out(0, 4), task.train(0, 4))


def test_training_and_held_out_digits_share_none(task):
    assert len(set(task.digits) & set(task.held)) == 0 and (len(task.digits), len(task.held)) == (
        4000,
        1000,
    )
    first = [digit for step in range(250) for digit in task._epoch(0)[step * 16 : (step + 1) * 16]]
    assert sorted(first) == sorted(task.digits)


@pytest.mark.parametrize("size, squares", [(192, 6), (384, 24)])
def test_squares_are_white_amid_black_and_far_from_the_digit(size, squares):
    batch = NeedleTask(size, seed=2).held_out(0, 40)
    side = size // CELL
    assert batch.squares.shape == (40, squares)
    white, black = batch.images.max(), batch.images.min()
    for image, tokens, near in zip(
        batch.images[:, 0], batch.squares, batch.near.unflatten(1, (side, side))
    ):
        window = near.unflatten(0, (-1, WINDOW)).unflatten(2, (-1, WINDOW))
        touched = window.any(3).any(1)
        assert torch.equal(touched, window.all(3).all(1)) and 1 <= touched.sum() <= 4, (
            "whole windows"
        )
        for token in tokens.tolist():
            y, x = divmod(token, side)
            around = image[(y - 1) * CELL : (y + 2) * CELL, (x - 1) * CELL : (x + 2) * CELL].clone()
            assert (around[CELL : 2 * CELL, CELL : 2 * CELL] == white).all()
            around[CELL : 2 * CELL, CELL : 2 * CELL] = black
            assert (around == black).all() and not near[y, x]


def test_variants_differ_in_their_attention_only():
    shapes, sizes = {}, {}
    for name, variant in VARIANTS.items():
        torch.manual_seed(0)
        model = SquareReader(variant, 576)
        shapes[name] = {
            n: p.shape for n, p in model.named_parameters() if not n.startswith("attentions")
        }
        sizes[name] = sum(p.numel() for p in model.attentions.parameters())
        assert variant.num_keys(576) == {"full": 576, "window": 0}.get(
            name, 4 if "few" in name else 72
        )
    assert all(shape == shapes["full"] for shape in shapes.values())
    assert sizes["softmax-learned-eighth"] - sizes["full"] == 2 * DIM  # a routing token a block
    assert VARIANTS["sum-learned-few"].num_keys(9216) == 36


def test_a_study_resumes_where_it_stopped(tmp_path):
    few = ["--quick", "--output", str(tmp_path), "--held-out", "50"]
    assert needle.main([*few, "--variants", "full"]) == 0
    store = tmp_path / "needle_cpu.json"
    first = json.loads(store.read_text())["runs"]
    assert (
        needle.main(
            [*few, "--resume", "--variants", "full", "softmax-learned-few", "sum-random-few"]
        )
        == 0
    )
    study = json.loads(store.read_text())
    assert study["runs"][0] == first[0] and len(study["runs"]) == 3  # it was not run again
    assert [row["variant"] for row in study["summary"]] == [
        "full",
        "softmax-learned-few",
        "sum-random-few",
    ]
    for row, run in zip(study["summary"], study["runs"]):
        assert (
            row["mean"] == run["accuracy"] and 0 <= run["accuracy"] <= 1 and len(run["curve"]) == 3
        )
        assert (run["reach"] is None) == (row["variant"] == "full")
    table = (tmp_path / "needle_cpu.md").read_text()
    assert all(f"{row['mean']:.3f}" in table for row in study["summary"])
    assert (tmp_path / "needle_cpu.png").read_bytes().startswith(b"\x89PNG")


@exhaustive
def test_a_larger_canvas_goes_on_with_the_weights_of_a_smaller_one(tmp_path, capsys):
    few = ["--quick", "--output", str(tmp_path), "--variants", "sum-learned-few", "--steps", "1"]
    larger = [*few, "--canvas", "384", "--start", "192"]
    assert needle.main(larger) == 2
    assert (
        "run python -m benchmarks.needle --canvas 192 --variants sum-learned-few --seeds 0"
        in capsys.readouterr().err
    )
    assert needle.main(few) == 0
    weights = torch.load(tmp_path / "192" / "sum-learned-few-0.pt", weights_only=True)
    assert needle.main(larger) == 0
    (record,) = json.loads((tmp_path / "needle_384_cpu.json").read_text())["runs"]
    assert (
        record["start"] == 192
        and record["keys"] == record["mean_keys"] == 9
        and record["widest"] is None
    )
    assert [step for step, _, _ in record["curve"]] == [0, 1]
    after = torch.load(tmp_path / "384" / "sum-learned-few-0.pt", weights_only=True)
    moved = [
        (after[name] - weights[name]).abs().max().item()
        for name in weights
        if name.endswith("weight")
    ]
    assert 0 < max(moved) < 3 * needle.PEAK_RATE, "one step from where the smaller canvas ended"
    assert (tmp_path / "needle_scale_cpu.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        needle.main([*few, "--start", "192"])
    assert "--start: expected a canvas smaller than 192, got 192" in capsys.readouterr().err


@exhaustive
def test_runs_of_other_settings_are_not_mixed(tmp_path, capsys):
    few = ["--quick", "--output", str(tmp_path), "--variants", "window"]
    assert needle.main(few) == 0
    assert needle.main([*few, "--resume", "--steps", "2"]) == 2
    assert "--steps: the runs in" in capsys.readouterr().err
    few[-1] = "softmax-random-few"
    assert needle.main(few) == 0
    store = tmp_path / "needle_cpu.json"
    (record,) = json.loads(store.read_text())["runs"]
    for changes, complaint in (
        (
            {"narrowing": [0.3, 0.9, True]},
            r"narrowed its keys by [0.3, 0.9, True], now by Narrowing(hold=0.1,",
        ),
        ({"variant": "tiny"}, "has runs of tiny, expected one of full, window,"),
    ):
        store.write_text(json.dumps({"runs": [record | changes]}))
        assert needle.main([*few, "--resume"]) == 2
        assert complaint in capsys.readouterr().err
    store.write_text('{"runs": [{"variant": "window", "se')
    assert needle.main([*few, "--resume"]) == 2
    assert "needle_cpu.json is no record of runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^size: expected a multiple of 64"):
        NeedleTask(200)


def test_the_gap_to_the_first_row_is_taken_seed_by_seed():
    def runs(name, scores):
        fields = dict.fromkeys(
            ("keys", "mean_keys", "seconds", "seconds_per_step_at_last", "added_mib", "parameters"),
            1,
        )
        return [
            fields | {"variant": name, "seed": s, "accuracy": a, "reach": None}
            for s, a in scores.items()
        ]

    records = runs("window", {1: 0.85, 0: 0.83, 7: 0.1}) + runs("full", {0: 0.9, 1: 0.94, 2: 0.5})
    full, window = summarize(by_variant(records, ["full", "window"]))
    assert full["mean"] == pytest.approx(0.78) and full["gain"] == 0
    assert window["gain"] == pytest.approx(-8) and window["gain_error"] == pytest.approx(
        1
    )  # -7 and -9; no other seed
    lines = accuracy_table([full, window], 576)
    assert (
        "| points against full |" in lines[0]
        and "| -8.0 ± 1.0 |" in lines[3]
        and "-8.0" not in lines[2]
    )
    alone = summarize(
        by_variant(runs("full", {0: 0.9}) + runs("window", {3: 0.1}), ["full", "window"])
    )[1]
    assert alone["gain"] is None and alone["gain_error"] is None


@exhaustive
def test_ablations_are_the_default_but_for_what_they_say(tmp_path):
    base, *others = ablations.ABLATIONS.values()
    assert base == VARIANTS["sum-learned-eighth"] and base not in others
    assert len({str(variant) for variant in others}) == len(others)
    scale = {}
    for name, variant in ablations.ABLATIONS.items():
        torch.manual_seed(0)
        module = variant.build(576)
        scale[name] = (
            None
            if variant.kind == "softmax"
            else module.attend.light_attn.to_out.weight.std().item()
        )
    full = scale.pop("light branch at full scale at first")
    assert all(
        other is None or full == pytest.approx(5 * other, rel=0.05) for other in scale.values()
    )
    few = [
        "--quick",
        "--output",
        str(tmp_path),
        "--held-out",
        "50",
        "--steps",
        "1",
        "--variants",
        "softmax",
        "window 4",
    ]
    assert ablations.main(few) == 0
    study = json.loads((tmp_path / "ablations_cpu.json").read_text())
    assert [row["variant"] for row in study["summary"]] == ["softmax", "window 4"]
    rows = {(g["n"], g["k"], g["eps"], g["gates"]): g for g in study["gates"]}
    for n, k, eps, _ in rows:
        exact = rows[n, k, eps, "exact"]
        assert abs(exact["sum"] - 1) < 1e-5 and exact["gradient_error"] < 1e-5
    text = (tmp_path / "ablations_cpu.md").read_text()
    assert text.count("| softmax |") == 1 and "50 iterations" in text


def test_attention_narrows_as_it_trains():
    args = needle.parse(needle.parser_of("", VARIANTS), ["--quick"])
    args.steps = 10
    halved = (
        5 * 576 + 256 + 32 + 3 * 4
    ) / 10  # the whole map for four tenths, 4 keys from the seventh on
    in_turn = (5 * 576 + 5 * 4) / 10  # the whole map for one tenth, 4 keys from the seventh on
    means = {
        "sum-learned-few": (4, halved),
        "softmax-learned-few": (4, in_turn),
        "full": (576, 576),
        "window": (0, 0),
    }
    for name, (keys, mean) in means.items():
        record = needle.run(name, VARIANTS[name], 0, args)
        assert (record["keys"], record["mean_keys"]) == (keys, mean)
        assert len(record["curve"]) == 10
        spent = [seconds for _, _, seconds in record["curve"]]
        assert spent == sorted(spent) and spent[-1] == record["seconds"] > 0
