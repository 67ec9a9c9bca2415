"""Arguments of the predecessor, colt5-attention 0.11.2, that mean nothing or something else here: one place for all."""

from .ops.backend import VARIABLE


def check_predecessor_options(*, use_triton: bool | None = None, use_flash_attn: bool | None = None, **renamed) -> None:
    """Accept what holds here anyway; refuse, with what to do instead, what does not.

    Args:
        use_triton: None or True: kernels are used wherever they can run.
        use_flash_attn: None or True: attention is always fused.
        **renamed: arguments that meant nothing there, name=(value given, what to use); refused unless None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    instead = {
        "use_triton": (use_triton, f"to run without Triton's kernels, set the environment variable {VARIABLE}=eager"),
        "use_flash_attn": (use_flash_attn, "to choose a kernel of attention, use torch.nn.attention.sdpa_kernel"),
    }
    for name, (value, what) in instead.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name}: expected None or True, got {value!r} ({type(value).__name__})")
        if value is False:
            raise ValueError(f"{name}: expected None or True, got False; {what}")
    for name, (value, what) in renamed.items():
        if value is not None:
            raise ValueError(f"{name}: had no effect in colt5-attention, use {what}; got {value!r}")
