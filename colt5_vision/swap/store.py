"""What routing adds to a model, in a directory: its configuration as JSON, its learned routers as
safetensors.

The model's own weights are saved by its own library. Layers are named as in the bare model, so a
routing saved from a model under DDP, PEFT or torch.compile fits the bare one, and the other way.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import check_path
from ..store import save_atomically
from .config import RoutedAttentionConfig
from .report import RoutedAttentionReport
from .verb import apply, plan, routed_layers, unroute_attention

__all__ = ["load_routing", "save_routing"]

_CONFIG = "routed_attention.json"
# named by its content: the JSON always finds the one it was written with
_WEIGHTS = "routed_attention.{}.safetensors"


def save_routing(model: Any, directory: str | os.PathLike) -> None:
    """Write the configuration and the routers of a routed model; what was there before is replaced
    whole.

    Args:
        model: a model or pipeline through :func:`~colt5_vision.route_attention`.
        directory: made if it is not there.

    Raises:
        TypeError, ValueError: if nothing is routed, or layers have several schedules.
    """
    from safetensors.torch import save

    # what is routed, and which layers differ from the first
    directory = check_path("directory", directory)
    routed = routed_layers(model)
    if not routed:
        raise ValueError("model: nothing is routed, expected one that went through route_attention")
    config = next(iter(routed.values())).config
    first = config.to_dict()
    others = {name: layer.config.to_dict() for name, layer in routed.items()}
    others = {name: other for name, other in others.items() if _text(other) != _text(first)}
    if any(_text(other["schedule"]) != _text(first["schedule"]) for other in others.values()):
        raise ValueError(
            "model: expected one schedule for all layers, got several; save model by model"
        )

    # the routers first: the JSON that names them is what makes them valid
    tensors = {key: x.detach().cpu().contiguous() for key, x in _routers(routed).items()}
    weights = save(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    file = _WEIGHTS.format(digest[:16])
    save_atomically(directory / file, lambda part: part.write_bytes(weights))

    # then the JSON
    about = {
        "format": 2,
        "config": first,
        "by_layer": others,
        "layers": list(routed),
        "weights": {"file": file, "sha256": digest},
    }
    text = json.dumps(about, indent=1) + "\n"
    save_atomically(directory / _CONFIG, lambda part: part.write_text(text))

    # what was there before
    for old in directory.glob(_WEIGHTS.format("*")):
        if old.name != file:
            old.unlink()


def load_routing(
    model: Any,
    directory: str | os.PathLike,
    *,
    sample_size: int | tuple[int, int] | None = None,
) -> RoutedAttentionReport:
    """Route a model or pipeline as the saved one was, with its learned routers; earlier routing is
    replaced.

    Args:
        model: of the same architecture as the saved one.
        directory: of :func:`save_routing`.
        sample_size: as for :func:`~colt5_vision.route_attention`.

    Returns:
        As of :func:`~colt5_vision.route_attention`.

    Raises:
        TypeError, ValueError: if the files are not there, cut short, foreign, or of another model;
            ``model`` is then untouched.
    """
    directory = check_path("directory", directory)
    before = routed_layers(model)  # checks the type
    about, tensors = _read(directory)
    kind = type(model).__name__

    # what would be routed, beside the model
    try:
        config = RoutedAttentionConfig.from_dict(about["config"])
        others = about["by_layer"].items()
        by_layer = {name: RoutedAttentionConfig.from_dict(values) for name, values in others}
        how = {"by_layer": by_layer, "sample_size": sample_size}
        planned = plan(model, config, **how, must_route=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"directory: {directory} does not fit {kind}: {error}") from error

    # its layers and its tensors are those of the file
    if list(planned.chosen) != about["layers"]:
        differ = sorted(set(planned.chosen) ^ set(about["layers"]))
        raise ValueError(
            f"directory: {directory} is of another model than {kind}, {len(differ)} layers differ, "
            f"first {differ[:1]}"
        )
    own = _shapes({name: part.state_dict() for name, part in planned.attention.items()})
    found = {key: tuple(x.shape) for key, x in tensors.items()}
    if wrong := [key for key in {**own, **found} if own.get(key) != found.get(key)]:
        key = wrong[0]
        raise ValueError(
            f"directory: {len(wrong)} tensors in {directory} do not fit {kind}, first {key!r}: "
            f"expected {own.get(key, 'none')}, got {found.get(key, 'none')}"
        )

    # the routers, then the model; nothing can fail from here on
    for name, part in planned.attention.items():
        part.load_state_dict({key: tensors[f"{name}.{key}"] for key in part.state_dict()})
    if before:
        unroute_attention(model)
    return apply(planned)


def _text(values: Any) -> str:
    """What tells 1, one token, from 1.0, all of them; as Python numbers they are equal."""
    return json.dumps(values, sort_keys=True)


def _routers(routed: dict) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": x
        for name, layer in routed.items()
        for key, x in layer.attention.state_dict().items()
    }


def _shapes(states: dict[str, dict[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.{key}": tuple(x.shape)
        for name, state in states.items()
        for key, x in state.items()
    }


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """The JSON and the tensors of a directory, whole and of one saving."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = directory / _CONFIG
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or about.get("format") != 2:
            raise ValueError("expected format 2 of save_routing")
        path = directory / Path(about["weights"]["file"]).name
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != about["weights"]["sha256"]:
            raise ValueError(f"expected sha256 {about['weights']['sha256']}, got {digest}")
        about["by_layer"] = dict(about["by_layer"])
        names = about["layers"]
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not named or "config" not in about:
            raise ValueError("expected names of layers and a config")
        return about, load(data)
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"directory: {path} is missing, damaged or foreign: {error}") from error
