"""Settings chosen layer by layer: the fastest whose error, measured, is small enough."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_int, check_positive
from ..ops.dtypes import wide_dtype
from .batches import check_batches, run_batch
from .config import RoutedAttentionConfig
from .full import full_attention
from .grouped import GroupedAttention
from .report import RoutedAttentionReport
from .reroute import RoutedLayer
from .verb import apply, plan, route_attention, routed_layers, unroute_attention
from .window import check_window, window_of_grid

__all__ = ["CALIBRATED", "Calibration", "calibrate_routing"]

CALIBRATED = tuple(
    RoutedAttentionConfig(router=router, window_size=window, num_heavy_tokens_kv=keys)
    for router, window, keys in product(
        ("sampled", "grouped"), (8, 16), (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    )
)
"""The settings that are tried by default."""


class Calibration(NamedTuple):
    """What was found for a layer.

    Attributes:
        config: its configuration; None: full attention.
        error: relative L2 error of its attention, over all inputs.
        speedup: seconds of full attention over its own, of the attention alone.
    """

    config: RoutedAttentionConfig | None
    error: float
    speedup: float

    def __str__(self) -> str:
        how = self.config
        window = "x".join(map(str, how.window_size))
        return (
            f"{how.router}, window {window}, keys {how.num_heavy_tokens_kv:.4g}, "
            f"error {self.error:.2g}, {self.speedup:.1f} times as fast"
        )


class _Trials:
    """Stands in for the routed attention of a layer: gives full attention's output, and tries all
    settings on the same q, k, v."""

    def __init__(self, settings: Sequence[RoutedAttentionConfig], repeats: int):
        self.attentions = [config.attention() for config in settings]
        self.repeats = repeats
        # of a layer, summed over its calls: squared norm of full attention and squared errors of
        # the settings, and the seconds of all; NaN: a setting does not fit
        self.found: dict[RoutedLayer, Tensor] = {}

    def __call__(self, layer: RoutedLayer, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        how |= {"features": None}
        group, bias, mask = how.pop("group"), how["pair_bias"], how["key_mask"]
        plain = {name: value for name, value in how.items() if name != "features"}
        window = check_window("window_size", layer.attention.window_size)
        plain["window_size"] = window_of_grid(window, how["grid_size"])

        # full attention, and every setting that fits
        calls: dict[int, Callable[[], Tensor]] = {0: lambda: full_attention(q, k, v, **plain)}
        for i, attention in enumerate(self.attentions, start=1):
            more = {"group": group}
            if isinstance(attention, GroupedAttention):
                if bias is not None or group is not None:
                    continue
                more = {}
            calls[i] = partial(attention, q, k, v, **how, **more)

        # in turns: what they take, and at first what they get wrong
        found = torch.full((2, 1 + len(self.attentions)), float("nan"), dtype=torch.float64)
        exact = calls[0]()
        for turn in range(self.repeats):
            for i, call in calls.items():
                out, seconds = _timed(call, q.device)
                if turn == 0:
                    wide = out.to(wide_dtype(q))
                    found[0, i] = _square(wide if i == 0 else wide - exact.to(wide.dtype), mask)
                found[1, i] = seconds if turn == 0 else min(seconds, found[1, i].item())
        self.found[layer] = self.found.get(layer, 0) + found
        return exact

    def best(
        self,
        layer: RoutedLayer,
        settings: Sequence[RoutedAttentionConfig],
        tolerance: float,
        min_speedup: float,
    ) -> Calibration:
        """The fastest setting of small enough an error, or full attention."""
        (norm, *squares), (full, *times) = self.found[layer].tolist()
        best = Calibration(None, 0.0, 1.0)
        for config, square, seconds in zip(settings, squares, times, strict=True):
            error, speedup = (square / max(norm, 1e-30)) ** 0.5, full / max(seconds, 1e-12)
            if error <= tolerance and speedup >= max(min_speedup, best.speedup):
                best = Calibration(config, error, speedup)
        return best


def calibrate_routing(
    model: nn.Module,
    inputs: Iterable[Tensor | Mapping[str, Any]],
    *,
    tolerance: float = 0.02,
    settings: Sequence[RoutedAttentionConfig | Mapping[str, Any]] = CALIBRATED,
    min_tokens: int = 1024,
    min_speedup: float = 1.1,
    repeats: int = 2,
    progress: bool = True,
) -> RoutedAttentionReport:
    """Route each layer of a model in the fastest way whose error on these inputs is small enough,
    in place.

    The model runs once with full attention. In every layer all settings are tried on its own
    queries, keys and values, and timed beside full attention. Layers without a setting that is both
    exact and fast enough keep full attention. Errors add up over the layers: compare the model's
    outputs, on other inputs than these.

    Args:
        model: a timm, transformers or diffusers model that is not routed. Its mode comes back as it
            was.
        inputs: what ``model`` takes, on its device: tensors, or mappings of its arguments by name.
            A few are enough, of the size and kind that it will see.
        tolerance: the largest relative L2 error of a layer's attention, over all inputs.
        settings: configurations to try, or their arguments, without ``layers`` or ``schedule``.
        min_tokens: maps of fewer tokens keep full attention.
        min_speedup: of the attention alone; a layer that gains less keeps full attention.
        repeats: how often each is timed; the least counts.
        progress: show a bar over the inputs.

    Returns:
        As of :func:`~colt5_vision.route_attention`, with ``calibration``: by name of each layer
        that was measured, its :class:`Calibration`. If no layer gains, nothing is routed.

    Raises:
        TypeError, ValueError: for an argument that does not fit; if no input reaches a map of
            ``min_tokens``; the model is then as it was.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("calibrate_routing needs tqdm: pip install tqdm") from error

    # checks
    check_batches(model, inputs)
    check_positive("tolerance", tolerance)
    check_positive("min_speedup", min_speedup)
    check_int("repeats", repeats)
    settings = _check_settings(settings, min_tokens)
    route_attention(model, settings[0], min_tokens=min_tokens)

    # every layer on every input
    trials, modes = _Trials(settings, repeats), {m: m.training for m in model.modules()}
    try:
        layers = routed_layers(model)
        for layer in layers.values():
            layer.teacher = trials
        model.eval()
        with torch.no_grad():
            for batch in tqdm(inputs, desc="calibrate", disable=not progress):
                run_batch(model, batch)
    finally:
        unroute_attention(model)
        for module, mode in modes.items():
            module.training = mode
    found = {
        name: trials.best(layer, settings, tolerance, min_speedup)
        for name, layer in layers.items()
        if layer in trials.found
    }
    if not found:
        raise ValueError(f"inputs: none reached a map of at least {min_tokens} tokens")

    # route those that gain
    gain = {name: one.config for name, one in found.items() if one.config is not None}
    config = dataclasses.replace(settings[0], layers=tuple(gain) or None)
    by_layer = {name: dataclasses.replace(own, layers=config.layers) for name, own in gain.items()}
    report = RoutedAttentionReport({}, {}, {})
    if gain:
        report = apply(plan(model, config, by_layer=by_layer, must_route=False))
    slow = f"no setting within an error of {tolerance:g} was {min_speedup:g} times as fast"
    for name in layers:
        if name not in gain:
            report.exact[name] = slow if name in found else "no input reached it"
    report.calibration = found
    return report


def _check_settings(settings: Any, min_tokens: int) -> list[RoutedAttentionConfig]:
    if isinstance(settings, (str, Mapping, RoutedAttentionConfig)) or not isinstance(
        settings, Iterable
    ):
        raise TypeError(f"settings: expected a list of configurations, got {settings!r}")
    checked = []
    for one in settings:
        if isinstance(one, Mapping):
            one = RoutedAttentionConfig.from_dict(one, whole=False)
        if not isinstance(one, RoutedAttentionConfig):
            raise TypeError(f"settings: expected configurations, got {one!r} among them")
        if one.layers is not None or one.schedule or one.router == "learned":
            raise ValueError(
                "settings: expected configurations without layers, schedule or router='learned', "
                f"got {one}"
            )
        checked.append(dataclasses.replace(one, min_tokens=min_tokens))
    if not checked:
        raise ValueError("settings: expected at least one configuration, got none")
    return checked


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """A call's output and its seconds."""
    _wait_for(device)
    start = time.perf_counter()
    out = call()
    _wait_for(device)
    return out, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _square(x: Tensor, mask: Tensor | None) -> float:
    """Squared norm of x (B, heads, N, head_dim) at the tokens of ``mask`` (B, N)."""
    return (x if mask is None else x * mask[:, None, :, None]).square().sum().item()
