"""What a library's adapter tells the core: which layers see a map, and where it lies.

An adapter has one function, ``parts(model, sample_size)``. The core does everything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ..ops.routed_window_attention.gathered import PairBias
from .site import Site

Place = Literal["map", "before", "behind", "site"]
"""Where a layer's other tokens stand: it has none (``"map"``), all of them stand before or behind
the map, whatever their number, or as many on each side as the :class:`Site` tells (``"site"``)."""

Masks = Literal["given", "keys", "outer"]
"""How a layer's mask is read: as it is (``"given"``); as one of keys, the same for every head and
query, where an additive one holds 0 or a large negative number (``"keys"``); a (query, key) one
lets a query attend to a key where both are valid, told by its diagonal (``"outer"``)."""


@dataclass(frozen=True)
class Switch:
    """An attribute that has another value while a layer is routed, and its own again afterwards.

    Attributes:
        path: from the layer, such as ``"fused_attn"`` or ``"processor._attention_backend"``.
        value: while routed; of plain types, or a function of a module.
    """

    path: str
    value: Any


@dataclass(frozen=True)
class LayerSpec:
    """A layer that can be routed.

    Attributes:
        entrance: name of the module that tells its site, among :attr:`Part.entrances`.
        place: see :data:`Place`.
        tokens: of its map at the sample size; None: unknown before a run.
        key_channels: heads times head_dim of its keys, for a learned router; None: it has none.
        masks: see :data:`Masks`.
        heads: number of heads, if the layer has them in the batch: (B * heads, L, head_dim).
        switches: while it is routed.
        exchange: while this library, not the layer, exchanges parts of the sequence between
            processes (:attr:`Site.shards`).
        pair_bias: gets the layer, the queries (B, heads, L, head_dim) and the site (None if
            unknown), and returns what the layer itself, with its ``switches`` set, leaves out of
            ``attn_mask``: a function of (query, key) as :func:`routed_window_attention` takes it.
    """

    entrance: str = ""
    place: Place = "site"
    tokens: int | None = None
    key_channels: int | None = None
    masks: Masks = "given"
    heads: int | None = None
    switches: tuple[Switch, ...] = ()
    exchange: tuple[Switch, ...] = ()
    pair_bias: Callable[[nn.Module, Tensor, Site | None], PairBias | None] | None = None


@dataclass(frozen=True)
class Entrance:
    """A module that is given the map before the layers see its tokens.

    Attributes:
        site: gets the module and its arguments by name, and returns the :class:`Site`, or a text
            why there is none (then attention is exact, counted with that text). A function at the
            top level of a file, so that models can be pickled.
        leads: the module only leads to the layers, as a patch embedding does, which run after it.
            ``site`` then gets its output as a third argument. Otherwise they run inside of it.
    """

    site: Callable[..., Site | str]
    leads: bool = False


@dataclass
class Part:
    """A model, as it is or in a pipeline.

    Attributes:
        model: whose modules the names below are of.
        entrances: by name of the module; ``""`` is the model.
        layers: that can be routed, by name.
        left: names of the other attention layers, and why each keeps full attention.
        timestep: argument of the model's forward, for schedules.
        run: how ``distill_routers`` runs the model on one of its inputs; None: ``model(**input)``
            or ``model(input)``.
    """

    model: nn.Module
    entrances: Mapping[str, Entrance] = field(default_factory=dict)
    layers: Mapping[str, LayerSpec] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    timestep: str = "timestep"
    run: Callable[[Any], Any] | None = None


class Adapter(Protocol):
    """A module with this function, which changes nothing."""

    def parts(self, model: Any, sample_size: tuple[int, int] | None) -> Mapping[str, Part]:
        """The parts of a model or pipeline that this library has made, by prefix of their layers'
        names (``"unet."``; ``""`` of a model); none if it has made nothing in it."""
        ...


# libraries, by the first word of their classes' modules, and the adapters of their models
_ADAPTERS = {
    "diffusers": "colt5_vision.pipelines.adapter",
    "timm": "colt5_vision.models.timm_adapter",
    "transformers": "colt5_vision.models.transformers_adapter",
}


def adapters_of(model: Any) -> list[Adapter]:
    """Adapters of the libraries that made a model, or modules in it; imported now.

    A diffusers pipeline or model is diffusers' alone: its text encoders are not routed.
    """
    libraries = _libraries([model])
    if "diffusers" not in libraries and isinstance(model, nn.Module):
        libraries |= _libraries(model.modules())
    if "diffusers" in libraries:
        libraries = {"diffusers"}
    return [importlib.import_module(_ADAPTERS[name]) for name in sorted(libraries)]


def _libraries(objects: Iterable) -> set[str]:
    kinds = {kind for one in objects for kind in type(one).__mro__}
    return {kind.__module__.partition(".")[0] for kind in kinds} & set(_ADAPTERS)
