"""Arguments of the predecessor, colt5-attention 0.11.2, that mean nothing or something else here: one place for all."""

from .ops.backend import VARIABLE

_KERNELS = f"to run without Triton's kernels, set the environment variable {VARIABLE}=eager"
_FUSED = "to choose a kernel of attention, use torch.nn.attention.sdpa_kernel"
_SWITCHES = {"use_triton": _KERNELS, "router_use_triton": _KERNELS, "use_flash_attn": _FUSED, "flash_attn": _FUSED}
_REFUSED = {
    "num_sets_kv": "had no effect in colt5-attention, use kv_routing_tokens",
    "triton_checkpoint_segments": "leave it out, backward keeps one number of each iteration: nothing to recompute",
}


_HARMLESS = {"num_sets_kv": 1}


def check_predecessor_options(**options) -> None:
    """Accept what holds here anyway; refuse, with what to do instead, what does not.

    Args:
        **options: by name. Switches may be None or True: kernels are used wherever they can run, attention is always
            fused. What had no effect, or has none here, must be None, or what says nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, value in options.items():
        if name in _REFUSED:
            if value is not None and value != _HARMLESS.get(name):
                raise ValueError(f"{name}: {_REFUSED[name]}; got {value!r}")
            continue
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: expected None or True, got {value!r} ({type(value).__name__})")
        if value is False:
            raise ValueError(f"{name}: expected None or True, got False; {_SWITCHES[name]}")
