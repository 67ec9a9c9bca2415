"""Checkpoints in one file: whole or not there, and of the same settings when a run goes on."""

from collections.abc import Callable
from pathlib import Path

import torch

from colt5_vision.store import save_atomically

from .command_line import UserError, cause


def refuse_others(saved: dict, given: dict) -> None:
    """End with a message if a run to resume was made with other settings."""
    for name, value in given.items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')}: the run to resume was made with {saved[name]}, got "
                f"{value}"
            )


def cannot_write(folder: Path, error: Exception) -> UserError:
    """A full disk, for one, which is another error for each library that writes."""
    return UserError(
        f"--output: cannot write a checkpoint to {folder} ({cause(error)}); the one before is whole"
    )


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside the old checkpoint, then in its place."""
    try:
        save_atomically(path, lambda partial: torch.save(state, partial))
    except (OSError, RuntimeError) as error:
        raise cannot_write(path.parent, error) from error


def load_checkpoint(path: Path, settings: dict, load: Callable[[dict], None]) -> dict:
    """The state of a run with these ``settings``, after ``load`` has taken its parts from it."""
    if not path.is_file():
        raise UserError(f"--resume: no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_others(state["settings"], settings)
        load(state)
    except UserError:
        raise
    except Exception as error:  # a cut or foreign file fails in many ways
        raise UserError(f"--resume: cannot load {path} ({cause(error)})") from error
    return state
