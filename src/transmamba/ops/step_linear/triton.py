"""step_linear on a GPU, as an op of torch: one launch, whose outputs lie side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import readable

from . import kernels

INTERPRETED = not isinstance(kernels.linear_kernel, triton.JITFunction)  # whose products know no bf16
MAX_ROWS = 64
MAX_WEIGHTS = 5


@dataclass(frozen=True, kw_only=True)
class Launch:
    """outputs, inputs: of a weight that a program reads at a time."""

    outputs: int
    inputs: int
    warps: int
    stages: int


def tuning_of(size: int, rows: int, outputs: int, *, wide: bool) -> Launch:
    """How a product over `size` inputs runs; fastest of benchmarks/results/step_linear_launches_h100_2026-11-24.json.

    One row: so few outputs a program that there are some hundred programs. Several: 16, which matrix units want.
    """
    whole = max(16, triton.next_power_of_2(size))
    if rows == 1:
        few = outputs <= 2048
        return Launch(outputs=2 if few else 8, inputs=min(1024 if few else 512, whole), warps=4, stages=1)
    if wide:
        return Launch(outputs=16, inputs=min(64, whole), warps=4, stages=2)
    if rows <= 16:
        return Launch(outputs=16, inputs=min(256, whole), warps=2, stages=4)
    return Launch(outputs=16, inputs=min(128, whole), warps=4, stages=4)


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
    wide = INTERPRETED or x.dtype == torch.float32
    counts = [len(weight) for weight in weights]
    separate = counts[:1] if gated else counts
    how = tuning_of(size, rows, sum(separate), wide=wide)
    blocks = sum(-(-count // how.outputs) for count in separate)
    missing = MAX_WEIGHTS - len(weights)
    residual = None if residual is None else readable(residual)
    tensors = (
        x,
        *weights,
        *[weights[0]] * missing,
        weights[0] if norm_weight is None else norm_weight.contiguous(),
        x if residual is None else residual,
        y,
    )
    numbers = (*counts, *[0] * missing)
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
    if rows == 1:
        kernels.row_kernel[(blocks,)](*tensors, size, eps, *numbers, **constants)
        return y
    strides = (x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0))
    constants |= {"BLOCK_M": max(16, triton.next_power_of_2(rows)), "WIDE": wide}
    kernels.linear_kernel[(blocks,)](*tensors, rows, size, eps, *numbers, *strides, **constants)
    return y


@step_linear_op.register_fake
def _(
    x: Tensor, weights: list[Tensor], norm_weight: Tensor | None, eps: float, residual: Tensor | None, gated: bool
) -> Tensor:
    return _output_like(x, weights, gated)


def _output_like(x: Tensor, weights: Sequence[Tensor], gated: bool) -> Tensor:
    return x.new_empty(x.shape[0], len(weights[0]) if gated else sum(len(weight) for weight in weights))
