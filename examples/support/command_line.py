"""What the training examples share: their learning rate, and how they end.

What the user can mend is one line, an interruption says how to go on.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event


class UserError(Exception):
    """What the user can mend; shown as one line."""


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with a message unless these arguments are None or at least 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


@contextmanager
def stop_request() -> Iterator[Event]:
    """Ctrl-C and SIGTERM only ask: the step in progress ends, and the run is saved."""
    asked = Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(step: int, total: int, peak: float, floor: float = 0.02) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to ``floor`` times the peak."""
    warm = max(1, total // 20)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm)))
    return peak * min((step + 1) / warm, floor + (1 - floor) * cosine)


def exit_status(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Of a training run: 0, 2 for what the user can mend, 130 for an interruption."""
    try:
        train(args)
    except UserError as error:
        # a data loading process hands its traceback over as the message
        print(
            f"error: {str(error).strip().splitlines()[-1].rpartition('UserError: ')[2]}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with --resume --output {args.output}", file=sys.stderr)
        return 130
    return 0
