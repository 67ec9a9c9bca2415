"""Operators in an ONNX file whose height and width are open, run by onnxruntime."""

import pytest
import torch

from colt5_vision import ops
from colt5_vision.routing import Routing

onnxruntime = pytest.importorskip("onnxruntime")


def tokens(x):
    return x.flatten(2).mT  # (B, N, C)


def heads(x):
    return (tokens(x).unsqueeze(1),) * 3


def scores(x):
    return x[:, 0].flatten(1)


def window(x):
    return ops.window_attention(*heads(x), grid_size=x.shape[2:], window_size=2)


def routed(x):
    indices, filled = ops.route_topk(scores(x), 4)
    weights = ops.soft_topk(scores(x), 4).gather(1, indices).log()
    return ops.routed_window_attention(
        *heads(x),
        grid_size=x.shape[2:],
        window_size=(2, 3),
        routed_indices=torch.where(filled, indices, -1),
        log_weights=weights,
    )


def cells(x):
    return ops.route_topk(scores(x), 4, grid_size=x.shape[2:], cell_size=2)[0]


def descent(x):
    return ops.coordinate_descent(scores(x), 4, n_iters=5, eps=0.5)


def joined(x):
    logits = ops.router_logits(tokens(x), x.new_ones(1, x.shape[1]))[:, 0]
    indices, filled = ops.route_topk(logits, 4)
    rows = ops.gather_normalize(tokens(x), indices, x.new_ones(x.shape[1]))
    gates = logits.gather(1, indices)
    return ops.join(tokens(x), rows, Routing(indices, gates, gates, filled), x[0, :, 0, 0])


@pytest.mark.parametrize("call", [window, routed, cells, descent, joined])
def test_open_height_and_width(call, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return call(x)

    def image(height, width):
        generator = torch.Generator().manual_seed(height)
        return torch.randn(2, 8, height, width, generator=generator)

    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        Layer(), (image(6, 7),), dynamo=True, verbose=False, dynamic_shapes={"x": sides}
    )
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for size in ((6, 7), (9, 4), (5, 12)):
        x = image(*size)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        want = call(x)
        torch.testing.assert_close(
            torch.from_numpy(found), want, rtol=1e-4, atol=1e-5, check_dtype=True
        )
