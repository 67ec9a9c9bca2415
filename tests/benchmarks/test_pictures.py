"""The pictures of the documentation, drawn small and of networks that were not trained."""

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("skimage")

from benchmarks import figures
from support import terrain


def test_pictures(monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    net = terrain.TerrainNet().eval()
    options = {"img_size": 518, "dynamic_img_size": True, "num_classes": 0, "depth": 3}
    vit = timm.create_model("vit_small_patch14_dinov2", embed_dim=48, num_heads=2, **options)
    monkeypatch.setattr(figures.terrain, "load", lambda cache: net)
    monkeypatch.setattr(figures.dinov2, "load", lambda cache: (vit.eval(), None))
    assert figures.main(["--size", "160", "--output", str(tmp_path)]) == 0

    # each attention is another one, full attention the one to be like
    told = [line.partition(": error ") for line in capsys.readouterr().out.splitlines()[:5]]
    errors = {name: float(value) for name, _, value in told}
    assert tuple(errors) == figures.ORDER and errors["full attention"] == 0
    assert len(set(errors.values())) == 5
    wide, square = (Image.open(tmp_path / name) for name in ("five_ways.png", "heavy_keys.png"))
    assert wide.width == 1365 and 0.8 < square.width / square.height < 1.2

    with pytest.raises(SystemExit):
        figures.main(["--size", "100"])
