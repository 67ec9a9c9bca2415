"""Arguments of colt5_attention that mean nothing here: one place for all."""

from ..ops.backend import VARIABLE

_KERNELS = f"to run without Triton's kernels, set the environment variable {VARIABLE}=eager"
_FUSED = "to choose a kernel of attention, use torch.nn.attention.sdpa_kernel"
_SWITCHES = {  # switch: what to do in place of False
    "use_triton": _KERNELS,
    "router_use_triton": _KERNELS,
    "use_flash_attn": _FUSED,
    "flash_attn": _FUSED,
}
_REFUSED = {  # argument: the value that says nothing, and what to do in place of another
    "num_sets_kv": (1, "had no effect in colt5_attention, use kv_routing_tokens"),
    "triton_checkpoint_segments": (
        None,
        "leave it out, backward keeps one number of each iteration: nothing to recompute",
    ),
    "random_route": (False, "give router='random' to the module instead"),
    "keep_one_route_dim": (True, "a Routing is always (B, R, K), take [:, 0] of its fields"),
}


def check_switches(**options) -> None:
    """Accept what holds here anyway; refuse, with what to do instead, what does not.

    Args:
        **options: by name. A switch may be None or True: kernels are used wherever they can run,
            attention is always fused. What means nothing here may be None, or what says nothing.

    Raises:
        TypeError, ValueError: for bad arguments.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in _REFUSED:
            harmless, instead = _REFUSED[name]
            if value != harmless:
                raise ValueError(f"{name}: {instead}; got {value!r}")
            continue
        if not isinstance(value, bool):
            raise TypeError(
                f"{name}: expected None or True, got {value!r} ({type(value).__name__})"
            )
        if not value:
            raise ValueError(f"{name}: expected None or True, got False; {_SWITCHES[name]}")
