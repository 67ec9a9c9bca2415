"""What the examples share: options, their learning rate, and how they end.

What the user can mend is one line, an interruption says how to go on.
"""

import argparse
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Event


class UserError(Exception):
    """What the user can mend; shown as one line."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every option that takes a value."""

    def _get_help_string(self, action):
        told = action.default is None or isinstance(action.default, bool)
        return action.help if told else super()._get_help_string(action)


def at_least(
    parser: argparse.ArgumentParser, args: argparse.Namespace, least: int, *names: str
) -> None:
    """End with a message unless these arguments are None or at least ``least``."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN is not
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def share_of_map(text: str) -> float:
    """A share of the map: ``1/8``, ``0.125``."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1], such as 1/8, got {text!r}")
    return value


def count_or_share(text: str) -> int | float:
    """``64`` tokens, or a share of the map."""
    if "/" in text or "." in text:
        return share_of_map(text)
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a number from 1 on, or a share in (0, 1] such as 1/8, got {text!r}"
        )
    return int(text)


def make_folder(path: Path) -> None:
    """The folder for results, before anything has been computed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {path} ({error.strerror})") from error


def set_aside(folder: Path, *names: str) -> None:
    """Move an older run to ``folder/before``; the one that was there is lost.

    Args:
        names: what a run leaves in the folder, its checkpoint first.
    """
    if not (folder / names[0]).exists():
        return
    before = folder / "before"
    shutil.rmtree(before, ignore_errors=True)
    before.mkdir()
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(before / name)
    print(f"moved the run in {folder} to {before}; --resume would have gone on with it")


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


def command(argv: Sequence[str] | None, *more: str) -> str:
    """What to type to run this program with its arguments and ``more`` again."""
    module = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if module is None else ["-m", module.name]
    words = list(sys.argv[1:] if argv is None else argv)
    return shlex.join(["python", *program, *words, *(w for w in more if w not in words)])


def cause(error: Exception) -> str:
    """What an error says, in a line: torch's begin with a heading that ends with a colon."""
    lines = (str(error) or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def exit_status(
    work: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    argv: Sequence[str] | None = None,
    resume: Sequence[str] = ("--resume",),
) -> int:
    """Of a run: 0, 2 for what the user can mend, 130 for an interruption.

    Args:
        work: the run.
        args: what it takes.
        argv: what ``args`` were parsed from; None: the program's.
        resume: options that let it go on where it stopped.
    """
    try:
        work(args)
    except UserError as error:
        # a data loading process hands its traceback over as the message
        print(
            f"error: {str(error).strip().splitlines()[-1].rpartition('UserError: ')[2]}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: {command(argv, *resume)}", file=sys.stderr)
        return 130
    return 0
