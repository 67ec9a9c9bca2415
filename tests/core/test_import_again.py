"""A second import in one process, as a reloader of modules makes it (Spyder's, Jupyter's), and
torch.package, which brings a copy of the library along or asks for the one that is installed."""

import subprocess
import sys

import pytest

from tests.support.marks import further

START = """
import io, sys, warnings
import timm, torch

warnings.simplefilter("ignore")  # timm tells that a name is registered again


def load():
    for name in [name for name in sys.modules if name.partition(".")[0] == "colt5_vision"]:
        del sys.modules[name]
    import colt5_vision, colt5_vision.models
    return colt5_vision


def gradients(module):
    return torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])


def check(module):
    for found, expected in zip(gradients(module), want, strict=True):
        torch.testing.assert_close(found, expected)


torch.manual_seed(0)
x = torch.randn(2, 16, 9, 7, requires_grad=True)
library = load()
old = library.ConditionalRoutedImageAttention(
    16, num_heavy_tokens_kv=5, light_heads=2, light_dim_head=8, light_window_size=4
)
want = gradients(old)
"""

AGAIN = """
image = torch.randn(1, 3, 64, 64)
vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()
stock = vit(image)
library.route_attention(vit, min_tokens=1, window_size=2)
routed = vit(image)
first, library = library, load()
assert library is not first

# what was made before works as what is made now, on the plain path and by registered operators
new = library.ConditionalRoutedImageAttention(
    16, num_heavy_tokens_kv=5, light_heads=2, light_dim_head=8, light_window_size=4
)
new.load_state_dict(old.state_dict())
for registered in (False, True):
    for one, module in ((first, old), (library, new)):
        one.ops.backend.INTERPRETED = registered
        check(module)
        check(torch.compile(module, backend="aot_eager", fullgraph=True))

# what the first has routed, the second can undo
assert torch.equal(vit(image), routed)
assert list(library.routed_layers(vit)) == ["blocks.0.attn"]
library.unroute_attention(vit)
assert torch.equal(vit(image), stock)
"""

PACKAGE = """
from torch.package import PackageExporter, PackageImporter

file = io.BytesIO()
with PackageExporter(file) as exporter:
    exporter.{how}("colt5_vision.**")
    exporter.extern(["torch.**", "numpy.**", "einops.**", "triton.**", "sys"])
    exporter.save_pickle("model", "model.pkl", old)
file.seek(0)
packaged = PackageImporter(file).load_pickle("model", "model.pkl")
assert type(packaged).__module__.endswith("colt5_vision.attention")
assert (type(packaged) is type(old)) == ("{how}" == "extern")
check(packaged)
check(old)
"""


@pytest.mark.parametrize(
    "code",
    [AGAIN, PACKAGE.format(how="intern"), *further(PACKAGE.format(how="extern"))],
    ids=["again", "intern", "extern"],
)
def test_in_a_process_of_its_own(code, tmp_path):
    pytest.importorskip("timm.models")
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
