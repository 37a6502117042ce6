"""step_linear on a GPU, as an op of torch: one launch, whose outputs lie side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import ALIGNMENT, chain_constants, readable

from . import kernels

INTERPRETED = not isinstance(kernels.linear_kernel, triton.JITFunction)  # whose products know no bf16
MAX_ROWS = 64
MAX_WEIGHTS = 5
T = TypeVar("T")

MOST_HELD = 24  # loads of 16 bytes that a thread of early_row_kernel holds
REGISTERS = 128  # of a thread that holds as many; left alone, the compiler takes 165


@dataclass(frozen=True, kw_only=True)
class Launch:
    """outputs, inputs: of a weight that a program reads at a time, inputs in words of 32 bits where they are read as
    such; held: how many times `inputs` it has in registers before it looks at x.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int = 1
    held: int = 0


def tuning_of(size: int, rows: int, outputs: int, *, wide: bool) -> Launch:
    """How a product over `size` inputs runs; fastest of benchmarks/results/step_linear_launches_h100_2026-11-24.json.

    One row: so few outputs a program that there are some hundred programs. Several: 16, which matrix units want.
    """
    whole = max(16, triton.next_power_of_2(size))
    if rows == 1:
        few = outputs <= 2048
        return Launch(outputs=2 if few else 8, inputs=min(1024 if few else 512, whole), warps=4)
    if wide:
        return Launch(outputs=16, inputs=min(64, whole), warps=4, stages=2)
    if rows <= 16:
        return Launch(outputs=16, inputs=min(256, whole), warps=2, stages=4)
    return Launch(outputs=16, inputs=min(128, whole), warps=4, stages=4)


def early_tuning_of(words: int, outputs: int, *, gated: bool) -> Launch:
    """How early_row_kernel runs. Inputs are as many as all threads load at once, 16 bytes each, so that x comes to
    every thread as it needs it. At most MOST_HELD such loads are held, so that all programs of each of the 1.5 B
    model's products fit on 132 multiprocessors together.
    """
    warps = 4 if words > 1024 else 2
    inputs = min(32 * 4 * warps, max(16, triton.next_power_of_2(words)))
    count = 2 if outputs <= 2048 else 4
    held = min(-(-words // inputs), MOST_HELD // (count * (2 if gated else 1)))
    return Launch(outputs=count, inputs=inputs, warps=warps, held=held)


def step_linear_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> tuple[Tensor, ...]:
    """Return the products; see step_linear."""
    y = step_linear_op(x, list(weights), norm_weight, eps, residual, gated)
    return (y,) if gated else y.split([len(weight) for weight in weights], dim=1)


@torch.library.custom_op(
    "transmamba::step_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor? norm_weight, float eps, Tensor? residual, bool gated) -> Tensor",
)
def step_linear_op(
    x: Tensor, weights: list[Tensor], norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    x, *weights = map(readable, (x, *weights))
    weights = [weight.contiguous() for weight in weights]
    y = _output_like(x, weights, gated)
    rows, size = x.shape
    if y.numel() == 0:
        return y
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    residual = None if residual is None else readable(residual)
    counts = [len(weight) for weight in weights]
    separate = counts[:1] if gated else counts
    in_words = rows == 1 and _come_in_words(x, *weights, norm_weight)
    wide = INTERPRETED or x.dtype == torch.float32
    if in_words:
        how = early_tuning_of(size // 2, sum(separate), gated=gated)
    else:
        how = tuning_of(size, rows, sum(separate), wide=wide)
    blocks = sum(-(-count // how.outputs) for count in separate)
    read: Sequence[Tensor] = (x, *_padded(weights, weights[0]), weights[0] if norm_weight is None else norm_weight)
    if in_words:
        read = [tensor.flatten().view(torch.int32) for tensor in read]  # flat: a single row may have any stride
    tensors = (*read, x if residual is None else residual, y)
    numbers = _padded(counts, 0)
    constants = {
        "NUM": len(weights),
        "GATED": gated,
        "HAS_NORM": norm_weight is not None,
        "HAS_RESIDUAL": residual is not None,
        "BLOCK_N": how.outputs,
        "BLOCK_K": how.inputs,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }
    if rows > 1:
        strides = (x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0))
        constants |= {"BLOCK_M": max(16, triton.next_power_of_2(rows)), "WIDE": wide}
        kernels.linear_kernel[(blocks,)](*tensors, rows, size, eps, *numbers, *strides, **constants)
        return y
    constants |= chain_constants(x)
    if in_words:
        constants |= {"WORDS": size // 2, "HELD": how.held}
        full = how.held * how.outputs * (2 if gated else 1) >= MOST_HELD
        if full and not INTERPRETED and torch.version.hip is None:  # a bound makes the compiler use what it allows
            constants["maxnreg"] = REGISTERS
        kernels.early_row_kernel[(blocks,)](*tensors, eps, *numbers, **constants)
    else:
        kernels.row_kernel[(blocks,)](*tensors, size, eps, *numbers, **constants)
    return y


def _come_in_words(*tensors: Tensor | None) -> bool:
    """Whether all can be read as words of two values: 16-bit ones, an even number of them, at even places."""
    given = [x for x in tensors if x is not None]
    return all(
        x.dtype == given[0].dtype
        and x.element_size() == 2
        and x.shape[-1] % 2 == 0
        and x.storage_offset() % 2 == 0
        and x.data_ptr() % ALIGNMENT == 0
        for x in given
    )


def _padded(given: Sequence[T], value: T) -> tuple[T, ...]:
    """Five, whatever is given."""
    return (*given, *[value] * (MAX_WEIGHTS - len(given)))


@step_linear_op.register_fake
def _(
    x: Tensor, weights: list[Tensor], norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    return _output_like(x, weights, gated)


def _output_like(x: Tensor, weights: Sequence[Tensor], gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], len(weights[0]) if gated else sum(len(weight) for weight in weights))
