"""route_attention on timm: nothing as large as the attention matrix is made."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.swap_cases import CASES, build, image, routed

eager = sys.modules["colt5_vision.ops.routed_window_attention.eager"]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.fixture
def largest(monkeypatch):
    """A mode that looks inside the registered operator as well."""
    mode = Largest()

    def seen(function):
        def run(*args):
            with mode:
                return function(*args)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(eager, name, seen(getattr(eager, name)))
    return mode


@pytest.mark.parametrize(
    ("name", "side"), [("vit", 64), ("sam", 64), ("deit3", 32), ("beit", 32), ("eva02", 32)]
)
def test_nothing_as_large_as_the_attention_matrix_is_made(name, side, largest):
    case, size = CASES[name], (4 * side, 4 * side)
    depth = 3 if name == "sam" else 1
    model = build(
        case, torch.float32, img_size=size, patch_size=4, embed_dim=16, depth=depth, num_heads=1
    )
    routed(model, 1 / 64, window_size=8 if side == 64 else 4)
    with largest:
        model.forward_features(
            image(case, batch=1, size=size, dtype=torch.float32)
        ).sum().backward()
    assert side**2 < largest.numel < side**4


def test_the_originals_sam_makes_the_whole_matrix(largest):
    model = build(
        CASES["sam"], torch.float32, img_size=128, embed_dim=16, num_heads=1, patch_size=4
    )
    with largest, torch.no_grad():
        model(image(CASES["sam"], batch=1, size=(128, 128), dtype=torch.float32))
    assert largest.numel >= 32**4
