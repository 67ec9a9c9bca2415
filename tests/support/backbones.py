"""The table of backbones in docs/training.md: ``python -m tests.support.backbones`` prints it."""

from fractions import Fraction

import timm

import colt5_vision.models  # noqa: F401
from colt5_vision import ConditionalRoutedImageAttention

HEAD = ("model", "made for, px", "strides", "tokens", "routed keys", "parameters, M")


def row(name: str) -> tuple[str, ...]:
    """One model, built on the meta device."""
    model = timm.create_model(name, device="meta")
    side = model.default_cfg["input_size"][-1]
    strides = list(dict.fromkeys(info["reduction"] for info in model.feature_info))
    tokens = (side // strides[0]) ** 2
    keys = dict.fromkeys(
        Fraction(module.num_heavy_tokens_kv).limit_denominator(1000)
        for module in model.modules()
        if isinstance(module, ConditionalRoutedImageAttention)
    )
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    cells = (str(side), _joined(strides), f"{tokens:,}", _joined(keys), f"{parameters:.2f}")
    return (f"`{name}`", *cells)


def _joined(values) -> str:
    return ", ".join("all" if value == 1 else str(value) for value in values)


def table() -> str:
    """All registered models but those for tests."""
    rows = [HEAD, ("---",) * len(HEAD), *map(row, timm.list_models("colt5_*"))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows).replace(" --- ", "---")


if __name__ == "__main__":
    print(table())
