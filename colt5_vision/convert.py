"""Weights of the predecessor, colt5-attention 0.11.2, as weights of the modules here."""

import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix

from torch import Tensor, nn

from .autoregressive import ConditionalRoutedAutoregressiveAttention
from .branches import RoutedBranches
from .router import CoordinateDescentRouter
from .vit import ConditionalRoutedViT

# what is called otherwise there, in the modules of a class: pattern here, replacement there
_RENAMED = {
    nn.RMSNorm: [(r"^weight$", "gamma")],
    ConditionalRoutedViT: [
        (r"^layers\.", "transformer.layers."),
        # there the rearranging and the mean are layers of their own
        (r"^to_patch_embedding\.(\d)", lambda match: f"to_patch_embedding.{int(match[1]) + 1}"),
        (r"^linear_head\.(\d)", lambda match: f"linear_head.{int(match[1]) + 1}"),
    ],
}


def convert_colt5_attention_state_dict(state_dict: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights of colt5-attention 0.11.2 as a state dict for ``module``, made with the arguments of the original.

        module.load_state_dict(convert_colt5_attention_state_dict(original.state_dict(), module))

    **Prepares** ``module`` **to compute as the original did**, in two things that a state dict does not hold. Its
    routers compare raw tokens, ``x · w``, by which long tokens win (``normalize=False``; here tokens are divided by
    their norm first), and its norms have no eps that would show. A module that loads a saved state dict later needs
    ``router_kwargs={"normalize": False}``. To train on, give ``eps`` there, too: raw logits have a spread of
    ``dim ** 0.5``, and at the default, 1, gates saturate.

    Args:
        state_dict: of any of its modules: feed-forward, the four attentions, block, ViT, router; or of a network that
            holds some, whose other entries are passed through, and whose other modules are left as they are.
        module: of ours, or such a network with ours in place of them.

    Returns:
        A state dict with just the entries of ``module``; the values are those of ``state_dict``.

    Raises:
        TypeError: if ``state_dict`` is none.
        ValueError: if an entry is missing, left over, or of another shape: naming each.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    left, converted, missing, norms = dict(state_dict), {}, [], []
    wanted = module.state_dict()
    for name in wanted:
        source = _name_there(name, module)
        if source not in left:
            source = name  # not a module of the predecessor's, or converted already
        elif source.endswith("gamma"):
            norms.append(name.rpartition(".")[0])
        if source in left:
            converted[name] = left.pop(source)
        else:
            missing.append(name)
    for name, needed in _without_counterpart(module, norms):
        if left.pop(name, None) is None and needed:
            missing.append(name)
    _check(type(module).__name__, state_dict, wanted, converted, missing, left)
    for norm in norms:
        module.get_submodule(norm).eps = 1e-24  # there, a norm is at least 1e-12
    for name, router in module.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(router, CoordinateDescentRouter) and (not name or _holds(parent, norms)):
            router.normalize = router.cosine_sim_scale is not None or router.routing_token is None
            router.log_gradient = False
    return converted


def _check(kind: str, given: Mapping, wanted: Mapping, converted: Mapping, missing: list[str], left: Mapping) -> None:
    problems = []
    if missing:
        problems.append(f"no entry for {', '.join(missing)}")
    if left:
        problems.append(f"no place for {', '.join(left)}")
    for name, value in converted.items():
        shapes = [tuple(getattr(v, "shape", ())) for v in (value, wanted[name])]
        if shapes[0] != shapes[1]:
            problems.append(f"{name} of shape {shapes[0]}, expected {shapes[1]}")
    prefixes = [commonprefix(list(names)).rpartition(".")[0] for names in (given, wanted)]
    if missing and left and prefixes[0] != prefixes[1]:
        problems.append(f"names there begin with {prefixes[0]!r}, here with {prefixes[1]!r}: of a wrapper?")
    if problems:
        raise ValueError(f"state_dict: expected the weights of a {kind}, got {'; '.join(problems)}")


def _holds(parent: str, names: list[str]) -> bool:
    """Whether one of the modules named lies in ``parent``."""
    return any(not parent or name.startswith(f"{parent}.") for name in names)


def _name_there(name: str, module: nn.Module) -> str:
    """What the entry ``name`` of ``module`` is called in the predecessor."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # from the innermost module out: the rest of the name may have changed
        prefix, rest = parts[:depth], ".".join(parts[depth:])
        owner = module.get_submodule(".".join(prefix))
        for kind, renamed in _RENAMED.items():
            for pattern, there in renamed if isinstance(owner, kind) else ():
                rest = re.sub(pattern, there, rest)
        parts = prefix + rest.split(".")
    return ".".join(parts)


def _without_counterpart(module: nn.Module, norms: list[str]) -> Iterator[tuple[str, bool]]:
    """Names of entries of the predecessor's that a module of ours does not have, and whether they must be there."""
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        causal = isinstance(part, ConditionalRoutedAutoregressiveAttention)
        if part.heavy_attn.rotary_emb if causal else isinstance(part, RoutedBranches) and part.rotary_emb:
            yield f"{prefix}rotary_emb.inv_freq", _holds(name, norms)  # converted already, it has none
        if causal and part.q_router is None:
            # where all tokens of a window are queries it never routes them, but has the weights
            yield f"{prefix}q_router.routing_token", False
            yield f"{prefix}null_q_token", False
