"""selective_scan in plain PyTorch: one fused multiply-add per token, everything else a chunk of tokens at a time.

Every channel and state has a decay of its own, so no matrix product does the work as in ssd_scan, and dividing running
products, which would, fails where they vanish. Decays are at most 1 and are only ever multiplied here. The backward
pass keeps the state that enters each chunk and computes the others again. Derivation: docs/ops/selective_scan.md.

Letters: l tokens, b rows, g groups, n state_size, e channels of a group, m chunks.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from transmamba.ops.heads import accumulation_dtype

# Numbers in one chunk of states. On a CPU they stay in its cache: docs/ops/selective_scan.md, 2026-11-24.
CHUNK_NUMBERS = {"cpu": 1 << 18}
OTHER_CHUNK_NUMBERS = 1 << 26
SMALLEST_CHUNK = 16  # tokens; shorter ones would keep more states for the backward pass than they save


def selective_scan_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, last state); see selective_scan. chunk_size tokens of so many rows at once change speed only."""
    dtype, (batch, dim, seq_len), state_size = accumulation_dtype(u), u.shape, A.shape[1]
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    if C.shape[1] != B.shape[1]:
        groups = math.lcm(B.shape[1], C.shape[1])
        B, C = (x.repeat_interleave(groups // x.shape[1], dim=1) for x in (B, C))
    groups = B.shape[1]
    step = tokens_first(delta.to(dtype).unflatten(1, (groups, -1)))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype).unflatten(0, (groups, -1))
    if delta_softplus:  # in the layout of its gradient, on which torch.compile and PyTorch disagree otherwise
        step = softplus(step)
    x = u.to(dtype)
    if initial_state is None:
        state = x.new_zeros(batch, groups, state_size, dim // groups)
    else:
        state = initial_state.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous()
    if batch == 0 or seq_len == 0:
        y, state = torch.zeros_like(x), state * 1
    else:
        size, block = blocks(batch, seq_len, dim * state_size, u.device.type)
        y, state, _ = _scan(
            tokens_first(x.unflatten(1, (groups, -1))),
            step,
            A.to(dtype).unflatten(0, (groups, -1)).transpose(1, 2).contiguous(),
            tokens_first(B.to(dtype)),
            tokens_first(C.to(dtype)),
            state,
            chunk_size or size,
            rows or block,
        )
        y = y.flatten(2).permute(1, 2, 0)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(u.dtype), state.transpose(2, 3).flatten(1, 2)


def blocks(batch: int, seq_len: int, numbers: int, device: str) -> tuple[int, int]:
    """(tokens in a chunk, rows at a time) for rows that hold so many numbers of state."""
    room = CHUNK_NUMBERS.get(device, OTHER_CHUNK_NUMBERS)
    smallest = min(seq_len, max(SMALLEST_CHUNK, math.isqrt(seq_len)))
    rows = max(1, min(batch, room // max(1, smallest * numbers)))
    return max(smallest, min(seq_len, room // max(1, rows * numbers))), rows


def tokens_first(x: Tensor) -> Tensor:
    """(b, g, k, l) -> (l, b, g, k), in memory."""
    return x.permute(3, 0, 1, 2).contiguous()


# One op to torch.compile, whatever the length: traced, it would be a graph of several nodes per token.
@torch.library.custom_op("transmamba::selective_scan", mutates_args=())
def _scan(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x, step (l, b, g, e), A (g, n, e), B, C (l, b, g, n), state (b, g, n, e) -> y (l, b, g, e), the last state, and
    the states that enter the chunks (m, b, g, n, e).
    """
    y, last = torch.empty_like(x), torch.empty_like(state)
    entering = state.new_empty(-(-len(x) // chunk_size), *state.shape)
    for row in range(0, x.shape[1], rows):
        now = state[row : row + rows]
        for number, start in enumerate(range(0, len(x), chunk_size)):
            here = slice(start, start + chunk_size), slice(row, row + rows)
            entering[number, here[1]] = now
            _, states = _states(x[here], step[here], A, B[here], now)
            y[here] = (C[here].unsqueeze(-2) @ states).squeeze(-2)
            now = states[-1]
        last[row : row + rows] = now
    return y, last, entering


def _states(x: Tensor, step: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The decay of every token and the state after it, each (l, b, g, n, e)."""
    decay = (step.unsqueeze(-2) * A).exp_()
    states = B.unsqueeze(-1) * (step * x).unsqueeze(-2)
    for factor, now in zip(decay.unbind(), states.unbind(), strict=True):
        state = now.addcmul_(factor, state)
    return decay, states


@torch.library.custom_op("transmamba::selective_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entering: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    chunk_size: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, step, A, B, C and the initial state."""
    grad_x, grad_step, grad_B, grad_C = (torch.empty_like(given) for given in (x, step, B, C))
    grad_A, grad_first = torch.zeros_like(A), torch.empty_like(grad_last)
    for row in range(0, x.shape[1], rows):
        later = grad_last[row : row + rows].clone()
        for number in reversed(range(len(entering))):
            here = slice(number * chunk_size, (number + 1) * chunk_size), slice(row, row + rows)
            first = entering[number, here[1]]
            decay, states = _states(x[here], step[here], A, B[here], first)
            dy, steps = grad_y[here].unsqueeze(-2), step[here].unsqueeze(-2)
            grad_C[here] = (states @ dy.transpose(-1, -2)).squeeze(-1)

            dstates = C[here].unsqueeze(-1) * dy
            for factor, now in zip(reversed(decay.unbind()), reversed(dstates.unbind()), strict=True):
                now.add_(later)
                later = factor * now

            written = x[here].unsqueeze(-2)
            grad_B[here] = (dstates @ (steps * written).transpose(-1, -2)).squeeze(-1)
            gathered = (B[here].unsqueeze(-2) @ dstates).squeeze(-2)
            grad_x[here] = gathered * step[here]

            # The gradient of step * A, the decay's exponent: dstate_t decay_t state_{t-1}.
            exponent = decay.mul_(dstates)
            exponent[0] *= first
            exponent[1:] *= states[:-1]
            grad_A += torch.einsum("lbgne,lbge->gne", exponent, step[here])
            grad_step[here] = (exponent.mul_(A)).sum(-2).addcmul_(gathered, x[here])
        grad_first[row : row + rows] = later
    return grad_x, grad_step, grad_A, grad_B, grad_C, grad_first


@_scan.register_fake
def _(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(state), state.new_empty(-(-len(x) // chunk_size), *state.shape)


@_scan_backward.register_fake
def _(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    entering: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    chunk_size: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, step, A, B, C, first = (torch.empty_like(given) for given in (x, step, A, B, C, grad_last))
    return x, step, A, B, C, first


def _remember(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, step, A, B, C, _, ctx.chunk_size, ctx.rows = inputs
    ctx.save_for_backward(x, step, A, B, C, output[2])
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_y: Tensor, grad_last: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    grads = _scan_backward(*ctx.saved_tensors, grad_y.contiguous(), grad_last.contiguous(), ctx.chunk_size, ctx.rows)
    return *grads, None, None


_scan.register_autograd(_differentiate, setup_context=_remember)
