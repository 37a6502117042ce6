"""bidirectional_scan: convolution, steps, both scans of a bidirectional Mamba-2, their sum and its gate, as one op."""

from torch import Tensor, is_grad_enabled

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import bidirectional_scan_reference
from .torch import bidirectional_scan_torch

__all__ = ["bidirectional_scan", "bidirectional_scan_reference", "bidirectional_scan_torch", "runs_as_kernels"]

_Pair = tuple[Tensor, Tensor]


@outside_autocast
def bidirectional_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    *,
    dt_bias: _Pair,
    A_log: _Pair,
    D: _Pair,
    m: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    lengths: Tensor | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return y = (y_f + y_b) silu(gate), where y_f is the scan of each row and y_b that of the row turned around.

    A scan is causal_conv1d of q, k and v in its own order, and h_t = exp(dt_t A) h_{t-1} + dt_t k_t v_t^T, g_t the same
    with m_t in place of k_t, y_t = q_t^T h_t / sqrt(head_dim) + g_t + D v_t, with dt after bias and softplus and A =
    -exp(A_log). Directions share q, k, v, m and the convolution.

    Args:
        q, k, v: (batch, seq_len, heads * head_dim), of one dtype; columns of a wider tensor are read in place.
        dt: (batch, seq_len, 2 * heads), before bias and softplus, the forward heads first.
        dt_bias, A_log, D: forward and backward, (heads,) each.
        m: (batch, seq_len, heads), what a token counts whatever the query; None: nothing.
        gate: (batch, seq_len, heads * head_dim), or None: no gate.
        weight, bias: of the convolution, (3 * heads * head_dim, kernel) over q, k and v side by side, and (3 * heads *
            head_dim,) or None; without a weight there is no convolution. activation: "silu" behind it, or None.
        lengths: (batch,) whole numbers: a row's first tokens, behind which all is padding; y is 0 there. None: no
            padding. Values are not read back from a device.
        validate: read the values on the CPU for NaN.
        backend: "reference" | "torch" | "triton" | None, which takes "triton" on CUDA devices where it can run and no
            gradient is asked for: its kernels have none.

    Returns:
        y (batch, seq_len, heads * head_dim) in v's dtype.

    Raises:
        InputError: shapes, dtypes or devices that break the contract; gradients of "triton".

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 6, for chunks; their sum over both directions is ours.
    """
    op = "bidirectional_scan"
    heads = D[0].shape[0] if D[0].dim() == 1 else 0
    if q.dim() != 3 or not heads or q.shape[2] % heads:
        raise InputError(
            f"{op}: q has shape {tuple(q.shape)} and D {tuple(D[0].shape)}; give (batch, seq_len, heads * head_dim) "
            "and (heads,)."
        )
    batch, seq_len, width = q.shape
    kernel = weight.shape[1] if weight is not None and weight.dim() == 2 else 1
    wanted = {
        "q": (q, (batch, seq_len, width)),
        "k": (k, (batch, seq_len, width)),
        "v": (v, (batch, seq_len, width)),
        "dt": (dt, (batch, seq_len, 2 * heads)),
        "m": (m, (batch, seq_len, heads)),
        "gate": (gate, (batch, seq_len, width)),
        "weight": (weight, (3 * width, kernel)),
        "bias": (bias, (3 * width,)),
    }
    for name, pair in (("dt_bias", dt_bias), ("A_log", A_log), ("D", D)):
        wanted |= {f"{name}, {way}": (x, (heads,)) for way, x in zip(("forward", "backward"), pair, strict=True)}
    given = {name: x for name, (x, _) in wanted.items() if x is not None}
    for name, x in given.items():
        if tuple(x.shape) != wanted[name][1]:
            raise InputError(f"{op}: {name} has shape {tuple(x.shape)}; give {wanted[name][1]}.")
    if activation not in (None, "silu"):
        raise InputError(f"{op}: activation is {activation!r}; choose 'silu' or None.")
    if lengths is not None and (tuple(lengths.shape) != (batch,) or lengths.is_floating_point()):
        raise InputError(
            f"{op}: lengths are {lengths.dtype} of shape {tuple(lengths.shape)}; give whole numbers, ({batch},)."
        )
    if bias is not None and weight is None:
        raise InputError(f"{op}: a bias without a weight; give both, or neither.")
    check_tensors(op, given, same_dtype=("q", "k", "v"))
    if validate and values_are_checked(q):
        check_finite(op, given)
    wants_gradients = is_grad_enabled() and any(x.requires_grad for x in given.values())
    name = resolve_backend(op, backend, q, size=width // heads)
    if name == "triton":
        from .triton import bidirectional_scan_triton

        obstacle = "it has no gradients" if wants_gradients else _obstacle(width // heads, kernel)
        if not obstacle:
            return bidirectional_scan_triton(q, k, v, dt, dt_bias, A_log, D, m, gate, weight, bias, activation, lengths)
        if backend is not None:
            raise InputError(f"{op} cannot run on backend 'triton': {obstacle}; pass backend='torch', or None.")
    implementation = bidirectional_scan_reference if name == "reference" else bidirectional_scan_torch
    return implementation(q, k, v, dt, dt_bias, A_log, D, m, gate, weight, bias, activation, lengths)


def runs_as_kernels(x: Tensor, head_dim: int, kernel: int) -> bool:
    """Whether backend=None means the kernels for q, k and v like x: where it does not, other ops do as well."""
    return resolve_backend("bidirectional_scan", None, x, size=head_dim) == "triton" and not _obstacle(head_dim, kernel)


def _obstacle(head_dim: int, kernel: int) -> str:
    from .triton import HEAD_DIMS, MAX_KERNEL

    if head_dim not in HEAD_DIMS:
        return f"its kernels are for head_dim {', '.join(map(str, HEAD_DIMS))}, and here it is {head_dim}"
    return f"it has no kernel for {kernel} taps, at most {MAX_KERNEL}" if kernel > MAX_KERNEL else ""
