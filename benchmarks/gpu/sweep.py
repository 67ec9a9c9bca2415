"""Other launch configurations of the attention kernels, beside the one they ship with."""

from collections.abc import Iterator
from unittest import mock

import torch

from .attention import inputs, ours
from .measure import (
    PASSES,
    Map,
    Sizes,
    Timer,
    both,
    check,
    kernels,
    reason,
    relative_error,
    row,
)

KINDS = {"forward": PASSES[0], "backward_query": PASSES[1], "backward_keys": PASSES[1]}
KEYS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
CANDIDATES = (
    (64, 32, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (128, 32, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
)
MAPS = tuple(Map(128, 8, head_dim) for head_dim in (40, 64, 80, 128))


def sweep(
    device: torch.device, sizes: Sizes, timer: Timer, maps: tuple[Map, ...] = MAPS
) -> Iterator[dict]:
    """One kind of kernel at a time, the others as they ship; the best is told per head width."""
    # the library chooses a configuration by a function, which is replaced
    mine = kernels(device)
    try:
        from colt5_vision.ops import attention_tiles as launches

        shipped = launches.config
    except (ImportError, AttributeError) as error:
        yield check("sweep", None, f"no hook for launch configurations: {reason(error)}")
        return

    for size in maps:
        x, grad, routed = inputs(size, device, sizes.dtype)
        calls = both(ours(size, routed), x, grad, backend=mine)
        for kind, what in KINDS.items():
            # as it ships, and with every other configuration
            base, call = "as shipped", calls[what]
            expected = call()
            makers = {base: lambda call=call: call}
            for values in CANDIDATES:
                chosen = dict(zip(KEYS, values, strict=True))

                def other(asked, *rest, kind=kind, chosen=chosen):
                    return chosen if asked == kind else shipped(asked, *rest)

                def make(other=other, call=call, expected=expected):
                    def run():
                        with mock.patch.object(launches, "config", other):
                            return call()

                    error = relative_error(run(), expected)
                    if not error <= 1e-2:  # NaN as well
                        raise ValueError(f"another result, relative error {error:.1e}")
                    return run

                makers[", ".join(f"{key} {value}" for key, value in chosen.items())] = make
            found = timer.compare(makers)

            # all of them, and the best
            label = f"{kind}, head_dim {size.head_dim}"
            for name in makers:
                # a configuration that does not fit is no failure of the library
                yield {
                    **row(label, what, found, name, base if name != base else None),
                    "failed": False,
                }
            timed = {
                name: timing.median for name, timing in found.items() if not isinstance(timing, str)
            }
            if timed:
                best = min(timed, key=timed.get)
                yield check(f"best {label}", True, f"{best}: {timed[best]:.4g} ms")
