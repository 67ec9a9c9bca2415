"""One row: a method in one attention, or in a whole network."""

import time

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from colt5_vision._torch_internals import flash_cpu

from .layer import Layer, Result, by_groups
from .methods import Method
from .networks import Network


def seconds(call) -> tuple[float, object]:
    """CPU seconds of this process: a busy machine adds none. And what the call returns."""
    start = time.process_time()
    out = call()
    return time.process_time() - start, out


def run(method: Method, layer: Layer, density: float, draw: int) -> Result:
    return method.call(layer, density, **({"draw": draw} if method.draws else {}))


def attention(method: Method, layer: Layer, density: float, draw: int = 0) -> dict[str, float]:
    """A method against full attention of the same q, k, v.

    Returns:
        ``error``, relative L2; ``p99``, the 99th percentile of a row's error over the mean norm of
        rows; ``kept``, the mean share of the softmax on exact keys; ``seconds`` and
        ``full_seconds``, CPU seconds of the method and of full attention run next to it.
    """
    layer.prepare()  # before the clock runs
    with torch.inference_mode():
        full_seconds, _ = seconds(lambda: scaled_dot_product_attention(*_batch(layer)))
        own_seconds, found = seconds(lambda: run(method, layer, density, draw))
    rows = (found.out - layer.full).norm(dim=-1)
    row = {
        "error": ((found.out - layer.full).norm() / layer.full.norm()).item(),
        "p99": (rows.flatten().quantile(0.99) / layer.full.norm(dim=-1).mean()).item(),
        "seconds": own_seconds,
        "full_seconds": full_seconds,
    }
    exact = found.exact
    if exact is None and found.seen is not None:
        exact = by_groups(layer, *found.seen).exact
    if exact is not None:
        row["kept"] = (exact - layer.lse).exp().mean().item()
    return row


def flops(method: Method, layer: Layer, density: float) -> float:
    """Matrix products of a method over those of full attention, whatever chooses included."""
    layer.prepare()
    counter = FlopCounterMode(display=False, custom_mapping={flash_cpu: _sdpa_flops})
    with torch.inference_mode(), counter:
        run(method, layer, density, 0)
    return counter.get_total_flops() / (4 * layer.heads * layer.q.shape[1] ** 2 * layer.dim)


def _sdpa_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """torch counts its kernels on a GPU only."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def network(
    method: Method, net: Network, name: str, full: Tensor, density: float, draw: int = 0
) -> dict[str, float]:
    """A method in all large attentions of a network, against the output with full attention."""

    def attend(number: int, layer: Layer) -> Tensor:
        return run(method, layer, density, 1000 * draw + number if draw else 0).out

    return net.compare(net.outputs(name, attend), full)


def _batch(layer: Layer) -> tuple[Tensor, ...]:
    return tuple(x.unsqueeze(0) for x in layer.qkv)
