"""What was measured, as a table and as JSON; targets are judged here, from the records alone."""

import datetime
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from support.measure import table

from .measure import PASSES, Sizes

FORWARD, TRAINING = PASSES


def _first_line(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return f"unknown ({command[0]} not found)"
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return (
        done.stdout.strip().splitlines()[0]
        if done.returncode == 0 and done.stdout.strip()
        else "unknown"
    )


def machine(device: torch.device, commit: str | None) -> dict:
    """Of a CUDA or ROCm device."""
    # what is installed
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"

    # the device and the code
    properties = torch.cuda.get_device_properties(device)
    if commit is None:
        commit = _first_line(["git", "rev-parse", "HEAD"])
        commit += (
            " with changes" if _first_line(["git", "status", "--porcelain"]) != "unknown" else ""
        )

    return {
        "device": properties.name,
        "driver": _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        ),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or f"none (HIP {torch.version.hip})",
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
    }


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def _target(
    label: str,
    records: list[dict],
    value: Callable[[dict], float | None],
    limit: float,
    unit: str,
    /,
    **where,
) -> dict:
    """Whether the record with these fields is within ``limit``: at least it for a ratio (x), at
    most it for the rest."""
    found = [
        r
        for r in records
        if r["kind"] == "timing" and all(r[key] == wanted for key, wanted in where.items())
    ]
    measured = value(found[0]) if found else None
    met = None
    if measured is not None:
        met = measured >= limit if unit == "x" else measured <= limit
    return {"name": label, "limit": limit, "unit": unit, "measured": measured, "met": met}


def _ours_ms(record: dict) -> float | None:
    return record["ours_timing"] and record["ours_timing"]["median_ms"]


def _ratio(record: dict) -> float | None:
    return record["ratio"]


def _ours_us(record: dict) -> float | None:
    return None if _ours_ms(record) is None else 1e3 * _ours_ms(record)


def _share(record: dict) -> float | None:
    return record["ratio"] and 100 / record["ratio"]


def targets(records: list[dict], sizes: Sizes) -> list[dict]:
    """All targets; ``met`` is None where the figure was not measured."""
    size, (count, n) = sizes.maps[0], sizes.gates[0]
    found = []

    # layers
    for fusion in ("softmax", "sum"):
        layer = {"name": f"whole layer, {size}", "ours": f"layer, fusion {fusion}"}
        found.append(
            _target(
                f"layer, fusion {fusion}, forward",
                records,
                _ours_ms,
                8,
                "ms",
                **layer,
                what=FORWARD,
            )
        )
        name = f"layer, fusion {fusion}, forward + backward, to the dense layer"
        found.append(_target(name, records, _ratio, 6, "x", **layer, what=TRAINING))

    # gates and selection
    for what in PASSES:
        for steps in (20, 50):
            peer = f"colt5_attention's kernel, {steps} iterations"
            name = f"soft_topk at {count} x {n}, {what}, to {peer}"
            gates = {"name": f"gates, {count} x {n}, k = {max(1, n // 16)}", "ours": "soft_topk"}
            found.append(_target(name, records, _ratio, 20, "x", **gates, peer=peer, what=what))
    for how in ("graph replayed", "launched"):
        name = f"logits to indices, 1 x {sizes.latency}, {how}"
        found.append(_target(name, records, _ours_us, 20, "µs", ours=f"route_topk, {how}"))

    # routing's share
    for what in PASSES:
        name = f"routing's share of the layer, {what}"
        found.append(_target(name, records, _share, 5, "%", ours="routing alone", what=what))
    return found


def _milliseconds(timing: dict | None) -> str:
    if timing is None:
        return "–"
    return f"{timing['median_ms']:.4g} ({timing['q1_ms']:.4g}–{timing['q3_ms']:.4g})"


def _memory(timing: dict | None) -> str:
    return (
        "–" if not timing or timing["peak_bytes"] is None else f"{timing['peak_bytes'] / 2**30:.3g}"
    )


def _speed(timing: dict | None) -> str:
    return "–" if not timing or timing["tflops"] is None else f"{timing['tflops']:.3g}"


def line(record: dict) -> str:
    """A record as one line of text."""
    if record["kind"] == "check":
        return f"{record['verdict']}: {record['name']}: {record['detail']}"
    ratio = "–" if record["ratio"] is None else f"{record['ratio']:.3g}x"
    text = (
        f"{record['name']} | {record['what']} | {record['ours']} "
        f"{_milliseconds(record['ours_timing'])} ms"
    )
    if record["peer"]:
        text += f" | {record['peer']} {_milliseconds(record['peer_timing'])} ms | {ratio}"
    return text + (f" | {record['reason']}" if record["reason"] else "")


def _cells(*values) -> list[str]:
    return [str(value).replace("|", "\\|").replace("\n", " ") for value in values]


def _timed(record: dict) -> tuple[str, ...]:
    """What the table of its step shows of a timing."""
    mine, theirs = record["ours_timing"], record["peer_timing"]
    ratio = "–" if record["ratio"] is None else f"{record['ratio']:.3g}x"
    note = record["reason"]
    if not note and "bytes_per_s" in record:
        note = f"{record['bytes_per_s'] / 1e12:.2f} TB/s"

    ours = (record["ours"], _milliseconds(mine))
    peer = (record["peer"] or "–", _milliseconds(theirs))
    further = (_memory(mine), _memory(theirs), _speed(mine), _speed(theirs))
    return record["name"], record["what"], *ours, *peer, ratio, *further, note or ""


def markdown(report: dict) -> str:
    # about the run
    about, records = report["machine"], report["records"]
    lines = [f"# {about['device']}", "", f"`{report['command']}`, {report['seconds']:.0f} s.", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in about.items()]

    # what was to be reached
    lines += ["", "## Targets", ""]
    verdicts = {True: "met", False: "not met", None: "not measured"}
    judged = []
    for target in report["targets"]:
        limit = f"{'>=' if target['unit'] == 'x' else '<='} {target['limit']} {target['unit']}"
        measured = (
            "–" if target["measured"] is None else f"{target['measured']:.3g} {target['unit']}"
        )
        judged.append(_cells(target["name"], limit, measured, verdicts[target["met"]]))
    lines += table(["target", "limit", "measured", "verdict"], judged)

    # whether it is right
    checks = [
        _cells(r["step"], r["name"], r["verdict"], r["detail"])
        for r in records
        if r["kind"] == "check"
    ]
    lines += ["", "## Correctness", "", *table(["step", "check", "verdict", "detail"], checks)]

    # a table a step
    lines += ["", "## Timings", ""]
    lines.append(
        "Medians (quartiles) of repeats taking turns, by CUDA events; GiB: allocated at the peak "
        "of a call; TFLOP/s: of "
        "the pairs that are attended to; ratio: peer over ours. Raw figures are in the JSON file."
    )

    header = [
        "what",
        "pass",
        "ours",
        "ms",
        "peer",
        "ms",
        "ratio",
        "GiB, ours",
        "peer",
        "TFLOP/s, ours",
        "peer",
        "note",
    ]
    timings = [r for r in records if r["kind"] == "timing"]
    for step in dict.fromkeys(r["step"] for r in timings):
        timed = [_cells(*_timed(r)) for r in timings if r["step"] == step]
        lines += ["", f"### {step}", "", *table(header, timed)]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu_{slug(report['machine']['device'])}{report['suffix']}"
    paths = [folder / f"{stem}.{ending}" for ending in ("json", "md")]
    paths[0].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    paths[1].write_text(markdown(report))
    return paths
