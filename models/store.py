"""One file for a routed model: safetensors weights, and in their header, as JSON, the model's name and its swap."""

import inspect
import json
import os
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from colt5_vision.store import save_atomically

from .routed_attention import original_type, routed_layers
from .swap import check_routable, route_attention, unroute_attention

__all__ = ["load_routed_attention", "save_routed_attention"]

_KEY = "colt5_vision.routed_attention"
# arguments of timm's constructors that a model remembers
_REMEMBERED = ("num_classes", "in_chans", "global_pool", "img_size", "dynamic_img_size", "class_token", "reg_tokens")


def _remembered(model: nn.Module) -> dict:
    known = {name for kind in type(model).__mro__ for name in inspect.signature(kind.__init__).parameters}
    args = {name: getattr(model, name) for name in _REMEMBERED if name in known and hasattr(model, name)}
    embed = getattr(model, "patch_embed", None)
    if "img_size" in known and getattr(embed, "img_size", None) is not None:
        args["img_size"] = embed.img_size
    return {name: value for name, value in args.items() if isinstance(value, (bool, int, str, tuple))}


# what may differ between two models of one architecture: modes, dropouts, input size
_FREE = {"training", "served_pass", "prefix", "grad_checkpointing", "fused_attn", "p", "drop_prob", "img_size"}
_FREE |= {"grid_size", "num_patches", "strict_img_size", "dynamic_img_size", "dynamic_img_pad", "flatten", "teacher"}


def _architecture(model: nn.Module) -> dict[str, object]:
    """Kind and plain settings of every module, routed or not: what shapes of tensors do not tell."""
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(".routing") and ".routing." not in name:
            found[f"{name}: class"] = original_type(module).__qualname__
            for key, value in vars(module).items():
                if key[0] != "_" and key not in _FREE and isinstance(value, (bool, int, float, str, tuple)):
                    found[f"{name}.{key}"] = value
    return found


def save_routed_attention(
    model: nn.Module, path: str | os.PathLike, *, model_name: str | None = None, model_args: dict | None = None
) -> None:
    """Write a routed model, its weights, swap and routers, to one ``.safetensors`` file; an old one is replaced whole.

    Args:
        model: through :func:`route_attention`.
        path: of the file.
        model_name: timm's name of the model; default: the architecture in its ``pretrained_cfg``.
        model_args: arguments of ``timm.create_model`` beyond what the model remembers (classes, channels, size, pool).

    Raises:
        ValueError: if nothing is routed, the name is unknown, or name and arguments do not make this model.
    """
    routing = routed_layers(model)
    if not routing:
        raise ValueError("model: nothing is routed, expected a model that went through route_attention")
    name = model_name or getattr(model, "pretrained_cfg", {}).get("architecture")
    if not name or not timm.is_model(name):
        raise ValueError(f"model_name: expected a name timm knows, got {name!r}")
    args = {**_remembered(model), **(model_args or {})}
    layers = {
        layer: {
            "window_size": part.window_size,
            "num_heavy_tokens_kv": part.num_heavy_tokens_kv,
            "num_heavy_tokens_q": part.num_heavy_tokens_q,
            "router": part.router,
        }
        for layer, part in routing.items()
    }
    about = {"format": 1, "model_name": name, "model_args": args, "layers": layers}
    weights, seen = {}, set()
    for key, value in model.state_dict().items():  # tensors that are shared or views are written out
        weights[key] = value.clone() if value.data_ptr() in seen else value.contiguous()
        seen.add(value.data_ptr())
    with torch.device("meta"):
        made = _build(about, "model_args")
    _compare(_shapes(made.state_dict()), _shapes(weights), "model_args")
    _compare(_architecture(made), _architecture(model), "model_args")
    metadata = {_KEY: json.dumps(about), "format": "pt"}
    save_atomically(Path(path), lambda part: save_file(weights, part, metadata=metadata))


def load_routed_attention(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model of :func:`save_routed_attention`, with weights, swap and routers.

    Args:
        path: of the file.
        model: a timm model of the same architecture, routed or not, to restore into, in place; None: make it.

    Returns:
        The routed model; a new one is in evaluation mode.

    Raises:
        ValueError: if the file is not there, cut short, not of this kind, or of another model; ``model`` is then
            untouched.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            weights = {} if about is None else {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} is missing or damaged: {error}") from error
    if about is None:
        raise ValueError(f"path: {path} is no file of save_routed_attention")
    if about.get("format") != 1:
        raise ValueError(f"path: expected format 1, got {about.get('format')!r} in {path}")
    with torch.device("meta"):
        template = _build(about, "path")
    _compare(_shapes(template.state_dict()), _shapes(weights), "path")
    if model is None:
        dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
        model = _build(about, "path").eval().to(max(dtypes, key=dtypes.count))
    else:
        backbone = {key: shape for key, shape in _shapes(template.state_dict()).items() if ".routing." not in key}
        own = {key: shape for key, shape in _shapes(model.state_dict()).items() if ".routing." not in key}
        _compare(backbone, own, "model")
        _compare(_architecture(template), _architecture(model), "model")
        check_routable(model, list(about["layers"]))
        if routed_layers(model):
            unroute_attention(model)
        _swap(model, about["layers"])
    model.load_state_dict(weights)
    return model


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _build(about: dict, argument: str) -> nn.Module:
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in about["model_args"].items()}
    try:
        return _swap(timm.create_model(about["model_name"], pretrained=False, **args), about["layers"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{argument}: cannot make {about['model_name']!r} with {args}: {error}") from error


def _swap(model: nn.Module, layers: dict[str, dict]) -> nn.Module:
    return route_attention(model, layers=list(layers), **_settings(layers))


def _settings(layers: dict[str, dict]) -> dict:
    """The swap's arguments, the same for all layers."""
    settings = [{**part, "window_size": tuple(part["window_size"])} for part in layers.values()]
    if any(part != settings[0] for part in settings):
        raise ValueError("layers: routed with different settings, expected those of one route_attention")
    return settings[0]


def _compare(expected: dict, found: dict, argument: str) -> None:
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{argument}: {len(wrong)} tensors or settings do not fit, first {key!r}: expected "
            f"{expected.get(key, 'none')}, got {found.get(key, 'none')}"
        )
