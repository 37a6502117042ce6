"""conv_ssd_step: what a TransMamba layer does with one token's projections after its TransPoint, in place."""

from collections.abc import Callable

from torch import Tensor, is_grad_enabled

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_tensors
from transmamba.ops.heads import accumulation_dtype
from transmamba.ops.precision import outside_autocast

from .reference import conv_ssd_step_reference
from .torch import conv_ssd_step_torch, ring_convolution

__all__ = ["conv_ssd_step", "conv_ssd_step_reference", "conv_ssd_step_torch", "ring_convolution"]


@outside_autocast
def conv_ssd_step(
    state: Tensor,
    ring: Tensor | None,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    z: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Return y of one token: convolution and SiLU of q, k and v, softplus of dt, ssd_step, D and the gate silu(z).

    One kernel for what would be a dozen, each of which costs more than it computes where rows are few.

    Args:
        state: (batch, state_heads, state_size, head_dim), contiguous, fp32 (fp64 for fp64 inputs); advanced in place.
        ring: the convolution's last inputs, (batch, slots, channels), channels those of q, k and v side by side; the
            input of position t lies at t % slots, and slots >= kernel. The token's own are written to it. None without
            a convolution, and then there is no SiLU either.
        positions: (batch,), int64, the token's position in each row, on the same device.
        q: (batch, q_heads * state_size), before the convolution, and so k (batch, key_heads * state_size) and
            v (batch, key_heads * head_dim). key_heads divides state_heads, which divides q_heads.
        dt: (batch, state_heads), before bias and softplus.
        z: (batch, q_heads * head_dim), or None: no gate.
        weight, bias: of the convolution, (channels, kernel) and (channels,) or None.
        dt_bias, A_log: (state_heads,). D: (q_heads,).
        backend: "reference" | "torch" | "triton" | None, which takes "triton" on CUDA devices where it can run.

    Returns:
        y (batch, q_heads * head_dim) in q's dtype. There are no gradients.

    Raises:
        InputError: shapes, dtypes or devices that break the contract, or gradients that are asked for.
    """
    op = "conv_ssd_step"
    if state.dim() != 4 or any(x.dim() != 2 for x in (q, k, v, dt)):
        raise InputError(
            f"{op}: give state as (batch, state_heads, state_size, head_dim) and q, k, v, dt as (batch, ...)."
        )
    batch, state_heads, n, p = state.shape
    heads, key_heads = q.shape[1] // n, k.shape[1] // n
    if not key_heads or state_heads % key_heads or not heads or heads % state_heads:
        raise InputError(
            f"{op}: {key_heads} heads of keys, {state_heads} states and {heads} of queries; each must divide the next."
        )
    channels = q.shape[1] + k.shape[1] + v.shape[1]
    kernel = None if weight is None else weight.shape[-1]
    slots = 0 if ring is None or ring.dim() != 3 else ring.shape[1]
    wanted = {
        "positions": (positions, (batch,)),
        "q": (q, (batch, heads * n)),
        "k": (k, (batch, key_heads * n)),
        "v": (v, (batch, key_heads * p)),
        "dt": (dt, (batch, state_heads)),
        "z": (z, (batch, heads * p)),
        "ring": (ring, (batch, max(slots, kernel or 0), channels)),
        "weight": (weight, (channels, kernel)),
        "bias": (bias, (channels,)),
        "dt_bias": (dt_bias, (state_heads,)),
        "A_log": (A_log, (state_heads,)),
        "D": (D, (heads,)),
    }
    given = {name: x for name, (x, _) in wanted.items() if x is not None}
    for name, x in given.items():
        if tuple(x.shape) != wanted[name][1]:
            raise InputError(f"{op}: {name} has shape {tuple(x.shape)}; give {wanted[name][1]}.")
    if (ring is None) != (weight is None):
        raise InputError(f"{op}: a convolution needs both its ring and its weight; give both, or neither.")
    del given["positions"]
    same = tuple(name for name in ("q", "k", "v", "z", "ring") if name in given)
    check_tensors(op, given | {"state": state}, same_dtype=same)
    if positions.is_floating_point() or positions.device != q.device:
        raise InputError(f"{op}: positions are {positions.dtype} on {positions.device}; give int64 on {q.device}.")
    if state.dtype != accumulation_dtype(q) or not state.is_contiguous():
        raise InputError(
            f"{op}: the state must be contiguous and of dtype {accumulation_dtype(q)}; it is {state.dtype}."
        )
    if is_grad_enabled() and any(x.requires_grad for x in (state, *given.values())):
        raise InputError(f"{op}: it works in place, without gradients; use torch.no_grad(), or ssd_step.")
    name = resolve_backend(op, backend, q, size=max(n, p))
    implementation: Callable[..., Tensor]
    if name == "triton":
        from .triton import conv_ssd_step_triton as implementation
    else:
        implementation = conv_ssd_step_reference if name == "reference" else conv_ssd_step_torch
    return implementation(state, ring, positions, q, k, v, dt, z, weight, bias, dt_bias, A_log, D)
