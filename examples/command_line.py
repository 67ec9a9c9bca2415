"""How the training examples end: what the user can mend is one line, an interruption says how to go on."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """What the user can mend; shown as one line."""


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with a message unless these arguments are None or at least 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def exit_status(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Of a training run: 0, 2 for what the user can mend, 130 for an interruption."""
    try:
        train(args)
    except UserError as error:
        # a data loading process hands its traceback over as the message
        print(f"error: {str(error).strip().splitlines()[-1].rpartition('UserError: ')[2]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with --resume --output {args.output}", file=sys.stderr)
        return 130
    return 0
