"""Everything of torch that is not public, in one place, each with what to do when it goes."""

import sys

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

# torch.overrides._push_mode and its kin: torch uses them to put DeviceContext below other modes.
# When they go: enter modes with ``with`` around the forward, and yield to others by hand.
from torch.overrides import _get_current_function_mode_stack as function_modes

# A dictionary by identity of tensors that it does not keep alive.
# When it goes: an attribute on the tensor.
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["WeakTensorKeyDictionary", "function_modes"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def is_compiling() -> bool:
    """Whether torch.compile, torch.export, make_fx or fake tensors record this very call.

    ``torch.compiler.is_compiling()`` is true for the whole process while any thread compiles or
    exports.
    """
    # Dynamo puts True here in the frame it traces, in no other
    if torch.compiler.is_dynamo_compiling():
        return True
    # The others are modes of their thread. If a name goes: is_traced().
    mode = torch._C._TorchDispatchModeKey
    recording = (mode.FAKE, mode.PROXY, mode.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(key) is not None for key in recording)


def is_exporting() -> bool:
    """Whether torch.export is at work in this process.

    Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for true in every graph. If the
    flag goes: that function.
    """
    return torch.compiler._is_exporting_flag


def is_traced(*tensors: Tensor) -> bool:
    """Whether a tool sees or records this call: a compiler, an exporter, fake tensors, a mode.

    The question is put to these tensors and this thread, see :func:`is_compiling`.
    """
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return True
    if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
        return True

    # Modes that see every operation: fake tensors, make_fx, torch.export, FLOP counters.
    # If it goes: True if type(torch.empty(0)) is not Tensor, or if
    # torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None.
    return torch._C._len_torch_dispatch_stack() > 0


def in_onnx_export(*tensors: Tensor) -> bool:
    """Whether this call is recorded for an ONNX file, which knows no custom operators.

    The flag itself is the whole process's.

    Raises:
        NotImplementedError: in an export by TorchScript, which knows too few operators.
    """
    if not torch.onnx.is_in_onnx_export() or not is_traced(*tensors):
        return False
    refuse_old_onnx_export()
    return True


def refuse_old_onnx_export() -> None:
    """Ask for the newer exporter.

    Raises:
        NotImplementedError: in an ONNX export by TorchScript.
    """
    if not torch.onnx.is_in_onnx_export() or torch.compiler.is_dynamo_compiling():
        return
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.onnx.export: expected dynamo=True, the exporter by TorchScript (dynamo=False) "
            "knows too few operators"
        )


@torch.compiler.assume_constant_result
def _within_functorch() -> bool:
    # If it goes: False; what asks then fails within a transform, with torch's own message.
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether vmap, grad or jvp of ``torch.func``, or forward-mode AD, ride on this call.

    A registered operator drops the tangents of the last, and refuses the first.
    """
    return _within_functorch() or has_tangent(*tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD rides on this call, or may, within a transform of ``torch.func``."""
    # The level is the whole process's; tangents are a tensor's. If it goes: leave this line out.
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level < 0:
        return False
    if _within_functorch():  # a tangent of an outer transform does not show
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def without_tangent(x: Tensor) -> Tensor:
    """x as backward sees it; forward-mode AD sees a constant."""
    # as in has_tangent; if the level goes: unpack always
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level < 0:
        return x
    return forward_ad.unpack_dual(x).primal


def has_values(*tensors: Tensor) -> bool:
    """Whether values may be read: real tensors on the CPU, in a call that nothing traces.

    Reading elsewhere would wait for a device, break a graph, or fail.
    """
    if is_traced(*tensors) or not all(x.is_cpu for x in tensors):
        return False
    # If the second goes: leave it out, functionalize then works on traced tensors only.
    return not _within_functorch() and not any(torch._is_functional_tensor(x) for x in tensors)


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether a kind of device has autocast; public, but Dynamo of torch 2.11 cannot trace it."""
    return torch.amp.is_autocast_available(device_type)


@torch.compiler.assume_constant_result
def wants_plain_attention() -> bool:
    """Whether ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` is in force."""
    cuda = torch.backends.cuda
    fused = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
    return cuda.math_sdp_enabled() and not fused


# Fused attention that returns its logsumexp, which the public function does not. If one goes:
# ``sdpa.attend`` and ``attend_backward`` have a plain path; let them take it.
flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
efficient = torch.ops.aten._scaled_dot_product_efficient_attention
efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward

# SDPA's plain path, which forward-mode AD can take. If it goes: softmax(scale q kᵀ + mask) v.
plain_attention = torch.ops.aten._scaled_dot_product_attention_math


def registered_operator(name: str, schema: str):
    """What ``torch.library.custom_op`` has made of this name with this schema in this process, or
    None.

    If a name goes, answer None: modules may then be imported once in a process.
    """
    known = torch._library.custom_ops.OPDEFS.get(name)
    return known if known is not None and known._schema == schema else None


def begins_no_graph(function):
    """Mark a function that torch.compile must not begin a graph with, nor with what it calls.

    In a graph it is followed like any other. Hooks of a model that is compiled are called outside
    of its graph, and would each be a graph of their own.

    Where ``torch._C._dynamo.eval_frame`` has no such strategy, the function stays as it is: more
    graphs, and the same results.
    """
    try:
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:
        return function
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, skip)
    return function


def in_backward() -> bool:
    """Whether this thread runs a backward, as a forward does that checkpointing runs again.

    If the name goes, answer False: such a forward then counts as one of its own.
    """
    return torch._C._current_graph_task_id() != -1


def holds_number(x: Tensor) -> bool:
    """Whether x has one value: not on the meta device, not fake, nor one of many under vmap.

    If a name goes, ask :func:`has_values` instead, which also says no on accelerators.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not x.is_meta and not wrapped and torch._guards.detect_fake_mode(x) is None


def count_up(x: Tensor) -> None:
    """Add 1 to x in place, also in a function that torch.func transforms.

    There a write to what the function did not get is an error. If the name goes: ``x.add_(1)``.
    """
    with torch.no_grad(), torch._C._DisableFuncTorch():
        x.add_(1)


def times_written(x: Tensor) -> int:
    """A number that grows with every write to x in place, but for writes through ``x.data`` and by
    a bare collective.

    If the name goes: read x every time.
    """
    return x._version


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly torch's ``kind``, and nobody watches or replaces its forward.

    Only then may a fused kernel read its weight in place of calling it. Should a private name go,
    answer False: the module is then called, which is always right.
    """
    watched = any(getattr(module, name, True) for name in _HOOKS)
    watched = watched or any(getattr(nn_module, name, True) for name in _GLOBAL_HOOKS)
    return type(module) is kind and not watched and "forward" not in vars(module)


def forget_compiled_graphs() -> None:
    """Let torch.compile trace again: it does not look whether hooks have come or gone.

    ``torch._dynamo.config.skip_nnmodule_hook_guards`` says so. When torch guards them: nothing.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def push_function_mode_below(mode: TorchFunctionMode) -> None:
    """Enter a mode below the others of this thread: each of them is asked before it."""
    above = [_pop_mode() for _ in function_modes()]
    for one in (mode, *reversed(above)):
        _push_mode(one)


def pop_last_function_mode() -> None:
    """Leave the mode entered last; torch.compile follows it."""
    _pop_mode()


def pop_function_mode(mode: TorchFunctionMode) -> None:
    """Leave a mode, wherever it is among those of this thread."""
    above = [_pop_mode() for _ in function_modes()]
    for one in reversed(above):
        if one is not mode:
            _push_mode(one)


# A module's hooks lie in dictionaries. ``register_forward_hook`` makes a new key for each, and
# torch.compile would make a graph for each key. When the dictionaries go: register_forward_hook.
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def put_hook(module: nn.Module, key: str, hook, *, after: bool = False) -> None:
    """Set a hook that gets keyword arguments, before or after the forward; the latter always."""
    hooks, *flags = _AFTER if after else _BEFORE
    getattr(module, hooks)[key] = hook
    for name in flags:
        getattr(module, name)[key] = True


def hooks_of(module: nn.Module) -> list[tuple[str, object]]:
    """All forward hooks of a module with their keys."""
    return [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]


def remove_hooks(module: nn.Module, keys: tuple[str, ...]) -> None:
    """Take off what :func:`put_hook` set."""
    for name in (*_BEFORE, *_AFTER):
        for key in keys:
            getattr(module, name).pop(key, None)
