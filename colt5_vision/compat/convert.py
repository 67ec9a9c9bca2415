"""Weights of colt5-attention 0.11.2 as weights of the modules here."""

import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix

from torch import Tensor, nn

from ..attention import ConditionalRoutedImageAttention
from ..branches import HeavyBranch
from ..causal.attention import ConditionalRoutedAutoregressiveAttention
from ..router import CoordinateDescentRouter
from ..sequence import ConditionalRoutedAttention
from ..sum_fusion import SumFusion
from .vit import ConditionalRoutedViT


def _one_later(match: re.Match) -> str:
    """In a Sequential there, a layer without weights comes first."""
    return f"{match[1]}{int(match[2]) + 1}"


# what an entry of a module is called there: pattern here, replacement there
_RENAMED = {
    nn.RMSNorm: [(r"^weight$", "gamma")],
    HeavyBranch: [(r"^null_key\.kv$", "null_kv")],
    ConditionalRoutedImageAttention: [(r"^attend\.", "")],
    ConditionalRoutedAttention: [(r"^attend\.", "")],
    ConditionalRoutedViT: [
        (r"^layers\.", "transformer.layers."),
        (r"^(to_patch_embedding\.)(\d)", _one_later),
        (r"^(linear_head\.)(\d)", _one_later),
    ],
}


def convert_colt5_attention_state_dict(
    state_dict: Mapping[str, Tensor], module: nn.Module
) -> dict[str, Tensor]:
    """Weights of colt5-attention 0.11.2 as a state dict for ``module``.

        module.load_state_dict(convert_colt5_attention_state_dict(original.state_dict(), module))

    **Prepares** ``module`` **to compute as the original did**, in what a state dict does not hold:

    - Its routers compare raw tokens, ``x · w``, by which long tokens win (``normalize=False``).
      Here tokens are divided by their norm first.
    - Its straight-through gates have the gradient of the soft gates, not of their logarithm
      (``log_gradient=False``).
    - Its norms have no eps that would show.

    A module that loads a saved state dict later needs ``router_kwargs={"normalize": False}``. To
    train on, give ``eps`` there, too. Raw logits have a spread of ``dim ** 0.5``, and at the
    default, 1, gates saturate.

    Args:
        state_dict: of any of its modules: feed-forward, the four attentions, block, ViT, router.
            Or of a network that holds some. Other entries of the network are passed through, and
            its other modules are left as they are.
        module: made with the arguments of the original: of :mod:`colt5_vision` or of
            :mod:`colt5_vision.compat`, or a network with such modules in place of its own.

    Returns:
        A state dict with just the entries of ``module``; the values are those of ``state_dict``.

    Raises:
        TypeError: if ``state_dict`` is none.
        ValueError: if an entry is missing, left over, or of another shape: naming each.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}"
        )

    # names here and there
    wanted = module.state_dict()
    name_there = {name: _name_there(name, module) for name in wanted}
    left, converted, missing = dict(state_dict), {}, []

    # entry by entry, under the name there, or under that here: converted already, or none of theirs
    for name, there in name_there.items():
        source = there if there in left else name
        if source in left:
            converted[name] = left.pop(source)
        else:
            missing.append(there)

    # norms that came along tell which modules are theirs
    norms = [
        name.removesuffix(".weight")
        for name, there in name_there.items()
        if there in state_dict and there.endswith("gamma") and there != name
    ]

    # what has no counterpart here
    for there, needed in _without_counterpart(module, norms):
        if left.pop(there, None) is None and needed:
            missing.append(there)

    # all that is wrong, at once
    problems = _shapes_that_differ(converted, wanted)
    if missing:
        problems.append(f"no entry for {', '.join(missing)}")
    if left:
        problems.append(f"no place for {', '.join(left)}")
    if missing and left:
        problems += _other_prefix(state_dict, name_there.values())
    if problems:
        expected = f"expected the weights of a {type(module).__name__}"
        raise ValueError(f"state_dict: {expected}, got {'; '.join(problems)}")

    _compute_as_there(module, norms)
    return converted


def _name_there(name: str, module: nn.Module) -> str:
    """What the entry ``name`` of ``module`` is called in colt5_attention."""
    parts = name.split(".")
    # from the innermost module out: the rest of the name may have changed
    for depth in range(len(parts) - 1, -1, -1):
        prefix, rest = parts[:depth], ".".join(parts[depth:])
        owner = module.get_submodule(".".join(prefix))
        for kind, renamed in _RENAMED.items():
            for pattern, there in renamed if isinstance(owner, kind) else ():
                rest = re.sub(pattern, there, rest)
        parts = prefix + rest.split(".")
    return ".".join(parts)


def _without_counterpart(module: nn.Module, norms: list[str]) -> Iterator[tuple[str, bool]]:
    """Names of entries that only colt5_attention's modules have, and whether they must be there."""
    lines_and_maps = (ConditionalRoutedImageAttention, ConditionalRoutedAttention)
    for name, part in module.named_modules():
        causal = isinstance(part, ConditionalRoutedAutoregressiveAttention)
        summed = isinstance(part, lines_and_maps) and isinstance(part.attend, SumFusion)
        if not causal and not summed:
            continue
        prefix = f"{name}." if name else ""
        heavy = part.heavy_attn if causal else part.attend.heavy_attn
        if heavy.rotary_emb:
            # a state dict that is converted already has none
            yield f"{prefix}rotary_emb.inv_freq", _holds(name, norms)
        if causal and part.q_router is None:
            # where all tokens of a window are queries it never routes them, but has the weights
            yield f"{prefix}q_router.routing_token", False
            yield f"{prefix}null_q_token", False


def _compute_as_there(module: nn.Module, norms: list[str]) -> None:
    """Set what a state dict does not hold: of ``norms``, and of the routers beside them."""
    for norm in norms:
        module.get_submodule(norm).eps = 1e-24  # there, a norm is at least 1e-12
    for name, router in module.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(router, CoordinateDescentRouter) and (not name or _holds(parent, norms)):
            router.normalize = router.cosine_sim_scale is not None or router.routing_token is None
            router.log_gradient = False


def _holds(parent: str, names: list[str]) -> bool:
    """Whether one of the modules named lies in ``parent``."""
    return any(not parent or name.startswith(f"{parent}.") for name in names)


def _shapes_that_differ(converted: Mapping, wanted: Mapping) -> list[str]:
    problems = []
    for name, value in converted.items():
        got, expected = (tuple(getattr(v, "shape", ())) for v in (value, wanted[name]))
        if got != expected:
            problems.append(f"{name} of shape {got}, expected {expected}")
    return problems


def _other_prefix(given, expected) -> list[str]:
    """What to say where all names given begin with something else than those expected."""
    prefixes = (commonprefix(list(names)) for names in (given, expected))  # noqa: RUF071  of names
    got, want = (prefix.rpartition(".")[0] for prefix in prefixes)
    if got == want:
        return []
    return [f"names there begin with {got!r}, here with {want!r}: of a wrapper?"]
