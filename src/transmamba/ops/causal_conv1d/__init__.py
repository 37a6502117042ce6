"""causal_conv1d: a short depthwise convolution that sees the past only, with its past as a state."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_cu_seqlens, check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import causal_conv1d_reference
from .torch import causal_conv1d_torch, depthwise_valid

__all__ = ["causal_conv1d", "causal_conv1d_reference", "causal_conv1d_torch", "depthwise_valid"]


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[False] = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[True],
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@outside_autocast
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: bool = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y_t = bias + sum_i weight[:, i] x_{t - kernel + 1 + i}, optionally through SiLU.

    x (batch, seq_len, channels)    weight (channels, kernel)    bias (channels,)    y like x.
    initial_state: the kernel - 1 inputs before the first, (rows, kernel - 1, channels); zeros when None; rows = batch,
    or the number of documents with cu_seqlens (borders of packed documents, batch 1). With return_final_state: (y, the
    last kernel - 1 inputs of each row), also for rows shorter than the kernel. Raises InputError.
    """
    op = "causal_conv1d"
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise InputError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "give (batch, seq_len, channels) and (channels, kernel)."
        )
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise InputError(f"{op}: bias has shape {tuple(bias.shape)}; give ({x.shape[2]},), or None.")
    if activation not in (None, "silu"):
        raise InputError(f"{op}: activation is {activation!r}; choose 'silu' or None.")
    borders = None if cu_seqlens is None else check_cu_seqlens(op, cu_seqlens, x.shape[0], x.shape[1])
    wanted = (x.shape[0] if borders is None else len(borders) - 1, weight.shape[1] - 1, x.shape[2])
    if initial_state is not None and tuple(initial_state.shape) != wanted:
        raise InputError(
            f"{op}: initial_state has shape {tuple(initial_state.shape)}; give {wanted}, (rows, kernel - 1, channels)."
        )
    optional = {name: value for name, value in (("bias", bias), ("initial_state", initial_state)) if value is not None}
    check_tensors(op, {"x": x, "weight": weight} | optional)
    if validate and values_are_checked(x):
        check_finite(op, {"x": x, "weight": weight} | optional)
    name = resolve_backend(op, backend, x, size=0)
    if name == "triton":
        from .triton import MAX_KERNEL, causal_conv1d_triton

        if weight.shape[1] <= MAX_KERNEL:
            y, state = causal_conv1d_triton(
                x,
                weight,
                bias,
                activation=activation,
                initial_state=initial_state,
                cu_seqlens=borders,
                final_state=return_final_state,
            )
            return (y, state) if return_final_state else y
        if backend is not None:
            raise InputError(
                f"{op} has no kernel for {weight.shape[1]} taps, at most {MAX_KERNEL}; pass backend='torch', or None."
            )
    implementation = causal_conv1d_reference if name == "reference" else causal_conv1d_torch
    y, state = implementation(x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=borders)
    return (y, state) if return_final_state else y
