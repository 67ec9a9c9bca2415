"""Settings chosen layer by layer: the fastest whose error, measured, is small enough."""

import dataclasses
import json
import math
import os
import reprlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_int, check_path, check_positive
from ..ops.dtypes import wide_dtype
from ..store import save_atomically
from .batches import check_batches, run_batch
from .config import RoutedAttentionConfig
from .full import full_attention
from .grouped import GroupedAttention
from .learned import LEARNED
from .report import RoutedAttentionReport
from .reroute import RoutedLayer
from .verb import apply, plan, route_attention, routed_layers, unroute_attention
from .window import check_window, window_of_grid
from .wrappers import models_of

__all__ = ["CALIBRATED", "Calibration", "calibrate_routing"]

CALIBRATED = tuple(
    RoutedAttentionConfig(router=router, window_size=window, num_heavy_tokens_kv=keys)
    for router, window, keys in product(
        ("sampled", "grouped"), (8, 16), (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    )
)
"""The settings that are tried by default."""
_HELD_OUT = 256  # queries that would tell the error without the others
_SAME = 1e-4  # of a squared norm, relative: sums in another order differ by less


class Calibration(NamedTuple):
    """What was found for a layer.

    Attributes:
        config: its configuration; None: full attention.
        error: relative L2 error of its attention, over all inputs.
        speedup: seconds of full attention over its own, of the attention alone.
        expected_error: the same of 256 queries, which would have told it with no full attention but
            their own. They are not the router's probes: keys are chosen by those, so that they see
            too little of the error.
        expected_speedup: what the cost model would have told, see :mod:`~colt5_vision.swap.cost`;
            None: it knows no costs of the device and dtype, or of routed queries.
    """

    config: RoutedAttentionConfig | None
    error: float
    speedup: float
    expected_error: float
    expected_speedup: float | None

    def __str__(self) -> str:
        if self.config is None:
            return "full attention"
        how = self.config
        window = "x".join(map(str, how.window_size))
        gain = f"{self.speedup:.1f} times as fast"
        if self.expected_speedup is not None:
            gain += f" ({self.expected_speedup:.1f} by the cost model)"
        return (
            f"{how.router}, window {window}, keys {how.num_heavy_tokens_kv:.4g}, "
            f"error {self.error:.2g} ({self.expected_error:.2g} by a few queries), {gain}"
        )


class _Findings:
    """What was measured of each layer, call by call, and the file that keeps it.

    Args:
        path: written after each call of a layer; one that is there is gone on with. None: no file.
        about: what a file must agree with, by the name of the argument that it depends on.
    """

    def __init__(self, path: str | os.PathLike | None, about: dict[str, Any]):
        self.path, self.about = None if path is None else check_path("checkpoint", path), about
        # (4, 1 + settings) of each call: squared norm of full attention and squared errors of the
        # settings; the same at a few queries; seconds of all; seconds by the cost model where full
        # attention takes what it took; NaN: a setting does not fit, or has no known costs
        self.calls: dict[str, list[list[list[float]]]] = {}
        if self.path is not None and self.path.exists():
            self.calls = self._read()

    def call(self, name: str, number: int) -> list[list[float]] | None:
        """What is known of a call of a layer, counted from 0."""
        calls = self.calls.get(name, [])
        return calls[number] if number < len(calls) else None

    def add(self, name: str, found: Tensor) -> None:
        self.calls.setdefault(name, []).append(found.tolist())
        if self.path is not None:
            text = json.dumps(self.about | {"calls": self.calls})
            save_atomically(self.path, lambda part: part.write_text(text))

    def total(self, name: str, count: int) -> Tensor:
        """Over the first ``count`` calls of a layer."""
        return torch.tensor(self.calls[name][:count], dtype=torch.float64).sum(0)

    def _read(self) -> dict[str, list]:
        try:
            before = json.loads(self.path.read_text())
            calls, found = before["calls"], {name: before.get(name) for name in self.about}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

        # what it agrees with
        for name, value in self.about.items():
            if found[name] == value:
                continue
            was, value = reprlib.repr(found[name]), reprlib.repr(value)
            if name == "format":
                raise ValueError(
                    f"checkpoint: {self.path} was written by another version of calibrate_routing, "
                    f"{was} for {value}; remove it to measure anew"
                )
            raise ValueError(
                f"{name}: expected that of the checkpoint {self.path}, {was}, got {value}"
            )

        # its numbers
        try:
            shape = (4, 1 + len(before["settings"]))
            if any(torch.tensor(call).shape[1:] != shape for call in calls.values()):
                raise ValueError("its numbers are not of its settings")
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error
        return calls

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"checkpoint: {self.path} is damaged or not of calibrate_routing: {error!r}"
        )


class _Trials:
    """Stands in for the routed attention of a layer: gives full attention's output, and tries all
    settings on the same q, k, v."""

    def __init__(
        self, settings: Sequence[RoutedAttentionConfig], repeats: int, findings: _Findings
    ):
        self.settings = settings
        self.attentions = [config.attention() for config in settings]
        self.repeats, self.findings = repeats, findings
        self.numbers: Counter[str] = Counter()  # calls of each layer so far

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

        # measured already?
        exact, number = calls[0](), self.numbers[layer.name]
        norms = _squares(exact.to(wide_dtype(q)), mask)
        self.numbers[layer.name] += 1
        if (known := self.findings.call(layer.name, number)) is not None:
            norm = norms[0].item()
            if not math.isclose(known[0][0], norm, rel_tol=_SAME):
                raise ValueError(
                    f"inputs: expected those of the checkpoint {self.findings.path}, and the same "
                    f"weights: the squared norm of full attention in {layer.name} was "
                    f"{known[0][0]:.6g}, got {norm:.6g}"
                )
            return exact

        # in turns: what they take, and at first what they get wrong
        found = torch.full((4, 1 + len(self.attentions)), float("nan"), dtype=torch.float64)
        found[:2, 0] = norms
        for turn in range(self.repeats):
            for i, call in calls.items():
                out, seconds = _timed(call, q.device)
                if turn == 0 and i > 0:
                    error = out.to(wide_dtype(q)) - exact.to(wide_dtype(q))
                    found[:2, i] = _squares(error, mask)
                found[2, i] = seconds if turn == 0 else min(seconds, found[2, i].item())
        for i in calls:
            found[3, i] = found[2, 0] / self._foretold(i, q, how["num_prefix_tokens"])
        self.findings.add(layer.name, found)
        return exact

    def _foretold(self, i: int, q: Tensor, others: int) -> float:
        """Speed-up of a setting by the cost model, 1 for full attention (0); NaN: not known."""
        if i == 0:
            return 1.0
        place, tokens = (q.device.type, q.dtype), q.shape[2] - others
        channels = q.shape[1] * q.shape[3]
        speedup = self.settings[i - 1].expected_speedup(tokens, channels, place, others)
        return math.nan if speedup is None else speedup

    def best(self, name: str, tolerance: float, min_speedup: float) -> Calibration:
        """The fastest setting of small enough an error, or full attention."""
        squares, few, seconds, foretold = self.findings.total(name, self.numbers[name])
        error, few = ((x[1:] / x[0].clamp_min(1e-30)).sqrt().tolist() for x in (squares, few))
        speedup, foretold = ((x[0] / x[1:].clamp_min(1e-12)).tolist() for x in (seconds, foretold))
        foretold = [None if math.isnan(x) else x for x in foretold]
        best = Calibration(None, 0.0, 1.0, 0.0, 1.0)
        for one in map(Calibration, self.settings, error, speedup, few, foretold):
            if one.error <= tolerance and one.speedup >= max(min_speedup, best.speedup):
                best = one
        return best


def calibrate_routing(
    model: Any,
    inputs: Iterable[Tensor | Mapping[str, Any]],
    *,
    tolerance: float = 0.02,
    settings: Sequence[RoutedAttentionConfig | Mapping[str, Any]] = CALIBRATED,
    min_tokens: int = 1024,
    min_speedup: float = 1.1,
    repeats: int = 2,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> RoutedAttentionReport:
    """Route each layer of a model in the fastest way whose error on these inputs is small enough,
    in place.

    The model runs once with full attention. In every layer all settings are tried on its own
    queries, keys and values, and timed beside full attention. Layers without a setting that is both
    exact and fast enough keep full attention. Errors add up over the layers: compare the model's
    outputs, on other inputs than these.

    Args:
        model: a timm, transformers or diffusers model, or a diffusers pipeline, that is not routed.
            Its mode comes back as it was.
        inputs: what ``model`` takes, on its device: tensors, or mappings of its arguments by name.
            A few are enough, of the size and kind that it will see. Of a pipeline, mappings such as
            ``{"prompt": "a river", "num_inference_steps": 4, "generator": ...}``: layers are tried
            on the inputs of its own denoising, at every step.
        tolerance: the largest relative L2 error of a layer's attention, over all inputs.
        settings: configurations to try, or their arguments, without ``layers`` or ``schedule``.
        min_tokens: maps of fewer tokens keep full attention.
        min_speedup: of the attention alone; a layer that gains less keeps full attention.
        repeats: how often each is timed; the least counts.
        checkpoint: file to write after each layer, and to go on from if it is there. It serves any
            ``tolerance`` and ``min_speedup``. Inputs must be the same: seed a pipeline's generator.
        progress: show a bar over the inputs.

    Returns:
        As of :func:`~colt5_vision.route_attention`, with ``calibration``: by name of each layer
        that was measured, its :class:`Calibration`. If no layer gains, nothing is routed.

    Raises:
        TypeError, ValueError: for an argument that does not fit; if no input reaches a map of
            ``min_tokens``; for a checkpoint of another model, device, version, inputs or settings,
            or that is damaged. The model is then as it was.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("calibrate_routing needs tqdm: pip install tqdm") from error

    # checks
    wholes = [model] if isinstance(model, nn.Module) else list(models_of(model).values())
    check_batches(inputs)
    check_positive("tolerance", tolerance)
    check_positive("min_speedup", min_speedup)
    check_int("repeats", repeats)
    settings = _check_settings(settings, min_tokens)
    route_attention(model, settings[0], min_tokens=min_tokens)

    # the model as it is, to be put back
    modes = {m: m.training for whole in wholes for m in whole.modules()}
    try:
        # what a checkpoint must agree with
        layers = routed_layers(model)
        about = {"format": [2, _HELD_OUT], "model": [type(model).__name__, *layers]}
        about["repeats"] = repeats
        first = next((p.device.type for whole in wholes for p in whole.parameters()), "cpu")
        about["device"] = [first, torch.get_num_threads()]
        about["settings"] = [str(config) for config in settings]

        # every layer on every input
        trials = _Trials(settings, repeats, _Findings(checkpoint, about))
        for layer in layers.values():
            layer.teacher = trials
        for whole in wholes:
            whole.eval()
        with torch.no_grad():
            for batch in tqdm(inputs, desc="calibrate", disable=not progress):
                run_batch(model, batch)
    finally:
        unroute_attention(model)
        for module, mode in modes.items():
            module.training = mode

    # the best setting of each
    found = {
        name: trials.best(name, tolerance, min_speedup) for name in layers if trials.numbers[name]
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

    # what was found, and why layers were left
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
        if one.layers is not None or one.schedule or one.router in LEARNED:
            raise ValueError(
                "settings: expected configurations without layers, schedule or a learned router, "
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


def _squares(x: Tensor, mask: Tensor | None) -> Tensor:
    """(2,), squared norm of x (B, heads, N, head_dim) at the tokens of ``mask`` (B, N), and at a
    few of them."""
    x = x if mask is None else x * mask[:, None, :, None]
    by_token = x.square().sum((0, 1, 3)).cpu().double()
    few = torch.randperm(len(by_token), generator=torch.Generator().manual_seed(0))[:_HELD_OUT]
    return torch.stack([by_token.sum(), by_token[few].sum()])
