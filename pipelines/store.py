"""What routing adds to a diffusers model, in a directory: a JSON configuration, and safetensors of learned routers.

diffusers' own ``save_pretrained`` writes routers along with the model, but ``from_pretrained`` drops them.
"""

import hashlib
import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from colt5_vision.store import save_atomically

from .config import RoutedAttentionConfig
from .swap import RoutedAttentionReport, apply, plan, routed_layers

__all__ = ["load_routed_attention", "save_routed_attention"]

_CONFIG = "routed_attention.json"
_WEIGHTS = "routed_attention.{}.safetensors"  # named by its content: the JSON always finds the one it was written with


def save_routed_attention(pipe_or_model: DiffusionPipeline | nn.Module, directory: str | os.PathLike) -> None:
    """Write the configuration and the weights of routed attention; what was there before is replaced whole.

    Args:
        pipe_or_model: through :func:`enable_routed_attention`.
        directory: made if it is not there.

    Raises:
        TypeError, ValueError: if nothing is routed, or an offloaded model's routers are not in memory.
    """
    routed = routed_layers(pipe_or_model)
    if not routed:
        raise ValueError("pipe_or_model: nothing is routed, expected one that went through enable_routed_attention")
    config, *others = {part.config for part in routed.values()}
    if others:
        raise ValueError("pipe_or_model: expected one configuration for all layers, got several; save model by model")
    tensors = {f"{name}.{key}": x for name, part in routed.items() for key, x in part.routing.state_dict().items()}
    if away := [key for key, x in tensors.items() if x.device.type == "meta"]:
        raise ValueError(f"pipe_or_model: {away[0]} is offloaded, save before offloading")
    weights = save({key: x.detach().cpu().contiguous() for key, x in tensors.items()})
    digest = hashlib.sha256(weights).hexdigest()
    file = _WEIGHTS.format(digest[:16])
    about = {
        "format": 1,
        "model": type(pipe_or_model).__name__,
        "config": config.to_dict(),
        "layers": list(routed),
        "weights": {"file": file, "sha256": digest},
    }
    directory = Path(directory)
    save_atomically(directory / file, lambda part: part.write_bytes(weights))
    text = json.dumps(about, indent=1) + "\n"
    save_atomically(directory / _CONFIG, lambda part: part.write_text(text))
    for old in directory.glob(_WEIGHTS.format("*")):
        if old.name != file:
            old.unlink()


def load_routed_attention(
    pipe_or_model: DiffusionPipeline | nn.Module,
    directory: str | os.PathLike,
    *,
    sample_size: int | tuple[int, int] | None = None,
) -> RoutedAttentionReport:
    """Route a pipeline or model as the saved one was, with its learned routers; earlier routing is replaced.

    Args:
        pipe_or_model: of the same architecture as the saved one.
        directory: of :func:`save_routed_attention`.
        sample_size: as for :func:`enable_routed_attention`.

    Returns:
        As of :func:`enable_routed_attention`.

    Raises:
        TypeError, ValueError: if the files are not there, cut short, foreign, or of another model;
            ``pipe_or_model`` is then untouched.
    """
    about, tensors = _read(Path(directory))
    try:
        config = RoutedAttentionConfig.from_dict(about["config"])
        planned = plan(pipe_or_model, config, sample_size=sample_size, must_route=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"directory: {directory} does not fit {type(pipe_or_model).__name__}: {error}") from error
    if list(planned.processors) != about["layers"]:
        differ = sorted(set(planned.processors) ^ set(about["layers"]))
        raise ValueError(f"directory: {directory} is of another model, {len(differ)} layers differ, first {differ[:1]}")
    shapes = {
        f"{name}.{key}": tuple(x.shape)
        for name, part in planned.processors.items()
        for key, x in part.routing.state_dict().items()
    }
    found = {key: tuple(x.shape) for key, x in tensors.items()}
    if wrong := [key for key in {**shapes, **found} if shapes.get(key) != found.get(key)]:
        raise ValueError(
            f"directory: {len(wrong)} tensors in {directory} do not fit, first {wrong[0]!r}: expected "
            f"{shapes.get(wrong[0], 'none')}, got {found.get(wrong[0], 'none')}"
        )
    for name, part in planned.processors.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        part.routing.load_state_dict(own)
    return apply(planned)


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    path = directory / _CONFIG
    try:
        about = json.loads(path.read_text())
        if not isinstance(about, dict) or about.get("format") != 1:
            raise ValueError("expected format 1 of save_routed_attention")
        path = directory / Path(about["weights"]["file"]).name
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != about["weights"]["sha256"]:
            raise ValueError(f"expected sha256 {about['weights']['sha256']}, got {digest}")
        if not isinstance(about["layers"], list) or "config" not in about:
            raise ValueError("expected layers and a config")
        return about, load(data)
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"directory: {path} is missing, damaged or foreign: {error}") from error
