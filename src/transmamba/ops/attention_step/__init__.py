"""attention_step: one token of softmax_attention against stored keys and values, for decoding."""

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_tensors
from transmamba.ops.precision import outside_autocast

from .reference import attention_step_reference
from .torch import attention_step_torch

__all__ = ["attention_step", "attention_step_reference", "attention_step_torch"]


@outside_autocast
def attention_step(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, backend: str | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(state_size)) v of one query per row, over the first `lengths` of its stored keys.

    Args:
        q: (batch, heads, state_size).
        keys: (batch, places, key_heads, state_size); key_heads divides heads, and head h reads h * key_heads // heads.
        values: (batch, places, key_heads, head_dim).
        lengths: (batch,), whole numbers from 1 to places, on the same device. They are read there, so a recorded step
            goes on as rows grow; out of these bounds the output is undefined.
        backend: "reference" | "torch" | "triton" | None, which takes "triton" on CUDA devices where it can run.

    Returns:
        (batch, heads, head_dim) in the values' dtype.

    Raises:
        InputError: shapes, dtypes or devices that break the contract.
    """
    op = "attention_step"
    if q.dim() != 3 or keys.dim() != 4 or values.dim() != 4:
        raise InputError(
            f"{op}: q, keys and values have {q.dim()}, {keys.dim()} and {values.dim()} dimensions; give (batch, heads, "
            "state_size) and (batch, places, key_heads, size) twice."
        )
    if keys.shape[:3] != values.shape[:3] or keys.shape[0] != q.shape[0] or keys.shape[3] != q.shape[2]:
        raise InputError(
            f"{op}: q has shape {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}; batch, "
            "state_size, places and key_heads must agree."
        )
    if keys.shape[2] == 0 or q.shape[1] % keys.shape[2]:
        raise InputError(f"{op}: {keys.shape[2]} heads of keys do not divide the {q.shape[1]} heads of q.")
    if tuple(lengths.shape) != (q.shape[0],) or lengths.is_floating_point() or lengths.device != q.device:
        raise InputError(
            f"{op}: lengths has shape {tuple(lengths.shape)}, dtype {lengths.dtype} and is on {lengths.device}; give "
            f"({q.shape[0]},) whole numbers on {q.device}."
        )
    check_tensors(op, {"q": q, "keys": keys, "values": values}, same_dtype=("q", "keys", "values"))
    name = resolve_backend(op, backend, q, values)
    if name == "triton":
        from .triton import attention_step_triton

        return attention_step_triton(q, keys, values, lengths)
    implementation = attention_step_reference if name == "reference" else attention_step_torch
    return implementation(q, keys, values, lengths)
