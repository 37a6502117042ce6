"""bidirectional_scan on a GPU, as an op of torch: three launches, in chunks that are independent but for the second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.ops.launching import goes_around_registration, launch, on_its_device, readable

from . import kernels

INTERPRETED = not isinstance(kernels.output_kernel, triton.JITFunction)  # whose products know no bf16
CHUNK = 64
WARPS = 4
REGISTERS: int | None = None  # the most a thread of the outputs' kernel may have; None leaves it to the compiler
AHEAD, BLOCK = 32, 128  # chunks that enter_kernel reads at a time, and numbers of a state per program
HEAD_DIMS = (16, 32, 64)  # whose tiles have no masks, and of which registers hold both directions
MAX_KERNEL = 8  # taps are unrolled


def bidirectional_scan_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    dt_bias: tuple[Tensor, Tensor],
    A_log: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    m: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    lengths: Tensor | None,
) -> Tensor:
    """Return y; see bidirectional_scan."""
    tensors = (q, k, v, dt, *dt_bias, *A_log, *D, m, gate, weight, bias, lengths)
    call = run if goes_around_registration(*tensors) else bidirectional_scan_op
    return call(*tensors, activation == "silu")


@on_its_device
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    dt_bias_b: Tensor,
    A_log: Tensor,
    A_log_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    m: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> Tensor:
    """y, like q."""
    (batch, tokens, width), heads = q.shape, D.shape[0]
    y = q.new_empty(q.shape)
    if not y.numel():
        return y
    q, k, v = readable(q), readable(k), readable(v)
    means = q if m is None else readable(m)
    z = q if gate is None else readable(gate)
    dt = readable(dt)
    # A thread then reads its channels of a tap in one piece.
    taps = q if weight is None else weight.t().contiguous()
    offset = q if bias is None else bias
    rows = q if lengths is None else lengths
    size, chunks = width // heads, -(-tokens // CHUNK)
    plane = (size + (m is not None)) * size
    narrow = q.dtype == torch.bfloat16
    left = q.new_empty(batch, chunks, 2, heads, plane, dtype=torch.float32)
    decays = q.new_empty(batch, chunks, 2, heads, dtype=torch.float32)
    entering = torch.empty_like(left, dtype=torch.bfloat16 if narrow else torch.float32)
    limit = {} if REGISTERS is None or INTERPRETED else {"maxnreg": REGISTERS}
    constants = {
        "KERNEL": 0 if weight is None else weight.shape[1],
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "MEAN": int(m is not None),
        "HAS_LENGTHS": lengths is not None,
        "L": CHUNK,
        "P": size,
        "DOT": tl.bfloat16 if narrow and not INTERPRETED else tl.float32,
        # tf32 holds all bits of fp16 and has the range of fp32; three products of it are as good as fp32.
        "PRECISION": {torch.bfloat16: "ieee", torch.float16: "tf32"}.get(q.dtype, "tf32x3"),
        "num_warps": WARPS,
        "num_stages": 1,
    }
    launch(
        kernels.chunk_kernel,
        (heads, chunks, batch),
        (k, v, means, dt, taps, offset, dt_bias, dt_bias_b, A_log, A_log_b, rows, left, decays),
        (*k.stride()[:2], *v.stride()[:2], *means.stride()[:2], *dt.stride()[:2], constants["KERNEL"], tokens, chunks),
        constants,
    )
    launch(
        kernels.enter_kernel,
        (-(-plane // BLOCK), heads, 2 * batch),
        (left, decays, entering),
        (chunks, heads, plane),
        {"AHEAD": AHEAD, "BLOCK": BLOCK, "num_warps": BLOCK // 32, "num_stages": 1},
    )
    strides = [stride for x in (q, k, v, means, dt, z) for stride in x.stride()[:2]]
    given = (q, k, v, means, dt, z, taps, offset, dt_bias, dt_bias_b, A_log, A_log_b, D, D_b, rows, entering, y)
    launch(
        kernels.output_kernel,
        (heads, chunks, batch),
        given,
        (*strides, constants["KERNEL"], tokens, chunks, size**-0.5),
        {**constants, "HAS_GATE": gate is not None, **limit},
    )
    return y


bidirectional_scan_op = torch.library.custom_op(
    "transmamba::bidirectional_scan",
    lambda *inputs: run(*inputs),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor dt, Tensor dt_bias, Tensor dt_bias_b, Tensor A_log, Tensor A_log_b, "
    "Tensor D, Tensor D_b, Tensor? m, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? lengths, bool silu) "
    "-> Tensor",
)
bidirectional_scan_op.register_fake(lambda q, *_: q.new_empty(q.shape))
