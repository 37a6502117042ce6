"""ssd_step: one token of ssd_scan, for decoding."""

from torch import Tensor, is_grad_enabled

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_ssd_inputs
from transmamba.ops.heads import accumulation_dtype
from transmamba.ops.precision import outside_autocast

from .reference import ssd_step_reference
from .torch import ssd_step_torch

__all__ = ["ssd_step", "ssd_step_reference", "ssd_step_torch"]


@outside_autocast
def ssd_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    in_place: bool = False,
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the SSM by one token; return (y, new state). `state` is not modified, unless in_place says so.

    state (batch, state_heads, state_size, head_dim)    q, k (batch, heads, state_size)    v (batch, heads, head_dim)
    dt (batch, dt_heads), after softplus    A (dt_heads,), < 0    D (heads,) or None
    y (batch, heads, head_dim) in v's dtype.
    Head counts as in ssd_scan. in_place: the new state is written over `state`, fp32 (fp64 for fp64 inputs), which is
    returned; without gradients. Raises InputError for what breaks the contract.
    """
    check_ssd_inputs("ssd_step", q, k, v, dt, A, D, state=state, step=True, validate=validate)
    if in_place:
        _check_in_place(state, k, (q, k, v, dt, A, D))
    name = resolve_backend("ssd_step", backend, k, v)
    if name == "triton":
        from .triton import ssd_step_in_place_triton, ssd_step_triton

        return (ssd_step_in_place_triton if in_place else ssd_step_triton)(state, q, k, v, dt, A, D)
    implementation = ssd_step_reference if name == "reference" else ssd_step_torch
    y, new_state = implementation(state, q, k, v, dt, A, D)
    return (y, state.copy_(new_state)) if in_place else (y, new_state)


def _check_in_place(state: Tensor, k: Tensor, inputs: tuple[Tensor | None, ...]) -> None:
    wanted = accumulation_dtype(k)
    if state.dtype != wanted:
        raise InputError(f"ssd_step: the state has dtype {state.dtype}; in place it is {wanted}, or drop in_place.")
    if is_grad_enabled() and any(x is not None and x.requires_grad for x in (state, *inputs)):
        raise InputError("ssd_step: in_place overwrites what a gradient would need; use torch.no_grad(), or drop it.")
