"""What one call of a kernel costs the processor, kept small.

Triton looks at every argument of every call, 25 to 35 us for a kernel of fifty. What it looks for is known here: the
dtypes and the alignment of tensors, and the values of numbers. A call that was seen before goes to its compiled kernel
at once, as in Triton's own tutorials. Likewise torch's registration of an op costs more than the op's own Python:
tensors without subclass, outside of torch.compile and of dispatch modes, go around it.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.runtime import JITFunction

from transmamba.ops.chain import in_a_chain
from transmamba.ops.chain.kernels import gdc_wait, wait_for_the_chain

ALIGNMENT = 16  # bytes; Triton compiles kernels for pointers that are multiples of it, and others for the rest
EARLY_CAPABILITY = (9, 0)  # the first GPUs with programmatic dependent launch
MOST_KEPT = 4096  # signatures; packed rows have other borders at every step

R = TypeVar("R")

_seen: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def whole_rows(size: int, entries: int) -> tuple[int, dict[str, Any]]:
    """Rows of a program that holds them whole, about `entries` numbers, and the constants of its kernel."""
    columns = next_power_of_2(size)
    rows = max(1, entries // columns)
    warps = max(1, min(32, rows * columns // 512))
    return rows, {"BLOCK_R": rows, "BLOCK_C": columns, "num_warps": warps, "num_stages": 2}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
) -> None:
    """Run kernel[grid](*tensors, *numbers, **constants) on the tensors' device, which must be the current one.

    The kernel's parameters must come in this order: pointers, numbers, compile-time constants. `constants` also holds
    num_warps and num_stages.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*tensors, *numbers, **constants)
        return
    addresses = [x.data_ptr() for x in tensors]
    if any(address % ALIGNMENT for address in addresses):
        kernel[grid](*tensors, *numbers, **constants)
        return
    key = (id(kernel), tensors[0].device, tuple([x.dtype for x in tensors]), numbers, tuple(constants.values()))
    found = _seen.get(key)
    if found is not None:
        compiled, tail = found
        # Addresses, which the launcher takes as they are; it would ask CUDA about every tensor.
        compiled[grid](*addresses, *numbers, *tail)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if len(_seen) >= MOST_KEPT:
        _seen.clear()
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    _seen[key] = compiled, tuple(constants[name] for name in names)


@lru_cache
def can_start_early(device: torch.device) -> bool:
    """Whether a kernel on this device can be started before the one ahead of it is done, by this version of triton."""
    if device.type != "cuda" or torch.version.hip is not None or gdc_wait is None:
        return False
    if not isinstance(wait_for_the_chain, JITFunction):  # the interpreter
        return False
    return torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY


def chain_constants(x: Tensor) -> dict[str, Any]:
    """The constant CHAINED of a kernel that calls wait_for_the_chain, and how it is then launched."""
    if in_a_chain() and can_start_early(x.device):
        return {"CHAINED": True, "launch_pdl": True}
    return {"CHAINED": False}


def goes_around_registration(*tensors: Tensor | None) -> bool:
    """Whether an op may compute on these at once: nobody traces, transforms or watches what torch calls."""
    if torch.compiler.is_compiling():  # first: the next lines cannot be traced
        return False
    # What torch itself asks, for dispatch modes and for torch.func's transforms.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def way_to_call(op: Any, function: Any, run: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """The registered op, or what it stands for where nobody would see the difference: `function`, an autograd.Function,
    where there are gradients to come, and else `run`.
    """
    if not goes_around_registration(*tensors):
        return op
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return function.apply
    return run


def readable(x: Tensor) -> Tensor:
    """x itself where neighbours in the last dimension are neighbours in memory, as in slices along others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_its_device(function: Callable[..., R]) -> Callable[..., R]:
    """Run a function of launches with its first tensor's device as the current one."""

    @wraps(function)
    def run(first: Tensor, *args: Any) -> R:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *args)
        with torch.cuda.device(first.device):
            return function(first, *args)

    return run
