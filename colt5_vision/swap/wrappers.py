"""Models as they are, without what other code has wrapped around them."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# names that wrappers put between a model's own: torch.compile, checkpointing, FSDP 1
_INNER = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP, DataParallel, FSDP 1, torch.compile and PEFT."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := _inner(model), nn.Module):
            model = inner
        elif type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _inner(model: nn.Module) -> nn.Module | None:
    parts = dict(model.named_children())
    found = [part for name, part in parts.items() if name in _INNER]
    return found[0] if len(found) == len(parts) == 1 else None


def clean_name(name: str) -> str:
    """A module's name without those of wrappers."""
    return ".".join(step for step in name.split(".") if step not in _INNER)


def models_of(model: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, by the prefix of their layers' names; of a model, itself by "".

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"model: expected a torch.nn.Module or a diffusers pipeline, got {type(model).__name__}"
        )
    return {
        f"{name}.": unwrapped(part)
        for name, part in components.items()
        if isinstance(part, nn.Module)
    }
