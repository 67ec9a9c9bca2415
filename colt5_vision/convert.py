"""Weights of the predecessor, colt5-attention 0.11.2, as weights of the modules here."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .autoregressive import ConditionalRoutedAutoregressiveAttention
from .router import CoordinateDescentRouter
from .sequence import ConditionalRoutedAttention
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

    The predecessor compares raw tokens with the routing tokens, ``x · w``, so that long tokens win; here tokens are
    divided by their norm first. Weights trained so select alike only with ``router_kwargs={"normalize": False}``:
    **the routers of** ``module`` **are switched to that**, which a state dict does not remember. Make a module that
    loads a saved one with this argument.

    Args:
        state_dict: of any of its modules: feed-forward, the four attentions, block, ViT, router; or of a network that
            holds some, whose other entries are passed through.
        module: of ours, or such a network with ours in place of them.

    Returns:
        A state dict with just the entries of ``module``; the tensors are those of ``state_dict``.

    Raises:
        ValueError: if an entry is missing, left over, or of another shape: naming each.
    """
    left, converted, missing = dict(state_dict), {}, []
    wanted = module.state_dict()
    for name in wanted:
        source = _name_there(name, module)
        if source not in left:
            source = name  # not a module of the predecessor's, or converted already
        if source in left:
            converted[name] = left.pop(source)
        else:
            missing.append(name)
    for name, needed in _without_counterpart(module):
        if left.pop(name, None) is None and needed:
            missing.append(name)
    problems = []
    if missing:
        problems.append(f"no entry for {', '.join(missing)}")
    if left:
        problems.append(f"no place for {', '.join(left)}")
    for name, value in converted.items():
        if value.shape != wanted[name].shape:
            problems.append(f"{name} of shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}")
    if problems:
        raise ValueError(f"state_dict: expected the weights of a {type(module).__name__}, got {'; '.join(problems)}")
    for router in module.modules():
        if isinstance(router, CoordinateDescentRouter) and router.routing_token is not None:
            router.normalize = router.cosine_sim_scale is not None
    return converted


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


def _without_counterpart(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of entries of the predecessor's that a module of ours does not have, and whether they must be there."""
    for prefix, part in module.named_modules():
        prefix = f"{prefix}." if prefix else ""
        causal = isinstance(part, ConditionalRoutedAutoregressiveAttention)
        if part.heavy_attn.rotary_emb if causal else isinstance(part, ConditionalRoutedAttention) and part.rotary_emb:
            yield f"{prefix}rotary_emb.inv_freq", True
        if causal and part.q_router is None:
            # where all tokens of a window are queries it never routes them, but has the weights
            yield f"{prefix}q_router.routing_token", False
            yield f"{prefix}null_q_token", False
