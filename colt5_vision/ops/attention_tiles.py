"""How the Triton kernels of every attention are launched: tiles by chip and width of a head, and
strides."""

import triton
from torch import Tensor

from . import backend


def _tiles(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


# Fixed, nothing is tuned at run time: no call stops to measure. By head_dim, rounded up to a power
# of two. Compiled for sm_80 (at most 99 KiB of shared memory, for consumer chips too), sm_90,
# sm_100: no spills.
_CONFIGS = {
    "ampere": {
        "forward": {
            16: _tiles(128, 64, 8, 3),
            32: _tiles(64, 64, 4, 3),
            64: _tiles(128, 64, 8, 3),
            128: _tiles(128, 32, 8, 3),
            256: _tiles(64, 32, 8, 2),
        },
        "backward_query": {
            16: _tiles(128, 64, 8, 2),
            32: _tiles(128, 64, 8, 2),
            64: _tiles(128, 64, 8, 2),
            128: _tiles(128, 32, 8, 2),
            256: _tiles(32, 32, 4, 2),
        },
        "backward_keys": {
            16: _tiles(64, 128, 8, 2),
            32: _tiles(64, 128, 8, 2),
            64: _tiles(32, 128, 8, 2),
            128: _tiles(32, 64, 8, 2),
            256: _tiles(32, 32, 8, 1),
        },
    },
    "cdna": {
        "forward": {
            16: _tiles(128, 64, 4, 2),
            32: _tiles(128, 64, 4, 2),
            64: _tiles(64, 64, 4, 2),
            128: _tiles(64, 32, 4, 2),
            256: _tiles(64, 32, 4, 2),
        },
        "backward_query": {
            16: _tiles(64, 64, 4, 2),
            32: _tiles(64, 64, 4, 2),
            64: _tiles(64, 32, 4, 2),
            128: _tiles(64, 32, 4, 2),
            256: _tiles(64, 16, 8, 1),
        },
        "backward_keys": {
            16: _tiles(64, 64, 4, 2),
            32: _tiles(64, 64, 4, 2),
            64: _tiles(32, 64, 4, 2),
            128: _tiles(32, 64, 4, 2),
            256: _tiles(16, 32, 8, 2),
        },
    },
}
# Hopper and datacentre Blackwell have the shared memory for wider tiles
_CONFIGS["hopper"] = _CONFIGS["ampere"] | {
    "forward": _CONFIGS["ampere"]["forward"]
    | {32: _tiles(128, 64, 8, 3), 128: _tiles(128, 64, 8, 3)},
    "backward_keys": _CONFIGS["ampere"]["backward_keys"] | {64: _tiles(64, 128, 8, 2)},
}
_CONFIGS["blackwell"] = _CONFIGS["hopper"] | {
    "forward": _CONFIGS["hopper"]["forward"] | {128: _tiles(128, 64, 8, 2)},
    "backward_query": _CONFIGS["hopper"]["backward_query"]
    | {64: _tiles(128, 32, 8, 3), 128: _tiles(128, 32, 4, 2)},
    "backward_keys": _CONFIGS["hopper"]["backward_keys"] | {128: _tiles(32, 128, 8, 1)},
}
_FAMILIES = {
    9: "hopper",
    10: "blackwell",
}  # by the tens; consumer chips of 12 have no more than Ampere's


def config(kind: str, head_dim: int, architecture: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages.

    Args:
        kind: ``"forward"``, ``"backward_query"`` or ``"backward_keys"``.
        head_dim: up to 256.
        architecture: see :func:`~colt5_vision.ops.backend.architecture`.
    """
    family = "cdna" if architecture > 200 else _FAMILIES.get(architecture // 10, "ampere")
    return _CONFIGS[family][kind][max(16, triton.next_power_of_2(head_dim))]


def options_for(kind: str, q: Tensor, queries: int, keys: int) -> dict[str, int]:
    """The configuration, its tiles no larger than what they tile."""
    options = dict(config(kind, q.shape[-1], backend.architecture(q.device)))
    for name, size in (("BLOCK_M", queries), ("BLOCK_N", keys)):
        if triton.next_power_of_2(size) < options[name]:
            options[name] = max(16, triton.next_power_of_2(size))
            options["num_warps"] = 4
    return options


def dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def outer_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]
