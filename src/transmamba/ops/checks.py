"""What every op checks before it computes: shapes, head counts, dtypes, devices, and the values of A, dt and NaN.

Shapes, dtypes and devices are always checked. Values are read on the CPU only, where that costs one pass over the
tensor: on an accelerator it would stall the queue. `check_values(True)` asks for it everywhere, `check_values(False)`
nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from transmamba.errors import InputError

_policy: dict[str, bool | None] = {"enabled": None}
MOST_REMEMBERED = 1024  # signatures: every layer and step asks for the same few
_passed: dict[tuple[object, ...], "HeadCounts"] = {}


def check_values(enabled: bool | None) -> None:
    """Check values (NaN, dt < 0, A >= 0) always (True), never (False), or on the CPU only (None, the default)."""
    _policy["enabled"] = enabled


@dataclass(frozen=True)
class HeadCounts:
    """heads: those of the output. state: those of the SSM state, max(k, v, dt); queries may share one."""

    heads: int
    state: int


def check_ssd_inputs(
    op: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    num_states: int | None = None,
    step: bool = False,
    validate: bool = True,
) -> HeadCounts:
    """Raise InputError unless the tensors fit the contract of the SSD family; return the head counts.

    step: inputs lack the time dimension. num_states: rows that `state` must have (documents or batch rows).
    validate: read values too, where the policy of this module allows it.
    """
    tensors = (q, k, v, dt, A, D, state)
    if torch.compiler.is_compiling() or type(k) is not Tensor:  # sizes may be symbols, which are no key
        counts = _check_ssd_shapes(op, *tensors, num_states, step)
    else:
        signature = (op, num_states, step, *[None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
        found = _passed.get(signature)
        if found is None:
            found = _check_ssd_shapes(op, *tensors, num_states, step)
            if len(_passed) >= MOST_REMEMBERED:
                _passed.clear()
            _passed[signature] = found
        counts = found
    if validate and values_are_checked(k):
        given = {"q": q, "k": k, "v": v, "dt": dt, "A": A, "D": D, "state": state}
        check_finite(op, {name: x for name, x in given.items() if x is not None})
        if A.numel() and bool((A >= 0).any()):
            raise InputError(
                f"{op}: A holds {float(A.detach().max()):.4g}; every entry must be < 0. Pass A = -exp(A_log)."
            )
        if dt.numel() and bool((dt < 0).any()):
            raise InputError(
                f"{op}: dt holds {float(dt.detach().min()):.4g}; steps must be >= 0. Pass dt after softplus."
            )
    return counts


def _check_ssd_shapes(
    op: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    num_states: int | None,
    step: bool,
) -> HeadCounts:
    rank = 3 if step else 4
    lead = "batch" if step else "batch, seq_len"
    named: dict[str, Tensor] = {name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    for name, x in named.items():
        size = "head_dim" if name == "v" else "state_size"
        if x.dim() != rank:
            raise InputError(f"{op}: {name} has shape {tuple(x.shape)}; give it as ({lead}, heads, {size}).")
    if dt.dim() != rank - 1:
        raise InputError(f"{op}: dt has shape {tuple(dt.shape)}; give it as ({lead}, heads), after softplus.")
    if A.dim() != 1:
        raise InputError(
            f"{op}: A has shape {tuple(A.shape)}; give one negative number per head of dt, ({dt.shape[-1]},)."
        )
    if A.shape[0] != dt.shape[-1]:
        raise InputError(f"{op}: A has {A.shape[0]} heads and dt {dt.shape[-1]}; they must be equal.")
    _check_same(
        op, "leading shape", {name: tuple(x.shape[: rank - 2]) for name, x in (named | {"dt": dt}).items()}, lead
    )
    if q is not None and q.shape[-1] != k.shape[-1]:
        raise InputError(f"{op}: q has state_size {q.shape[-1]} and k {k.shape[-1]}; they must be equal.")
    counts = check_heads(op, q, k, v, dt)
    if D is not None and tuple(D.shape) != (counts.heads,):
        raise InputError(
            f"{op}: D has shape {tuple(D.shape)}; give ({counts.heads},), one number per output head, or None."
        )
    rows = k.shape[0] if num_states is None else num_states
    wanted = (rows, counts.state, k.shape[-1], v.shape[-1])
    if state is not None and tuple(state.shape) != wanted:
        raise InputError(
            f"{op}: the state has shape {tuple(state.shape)}; give {wanted}, "
            "(batch or documents, state_heads, state_size, head_dim)."
        )
    optional = {name: x for name, x in (("D", D), ("state", state)) if x is not None}
    check_tensors(op, named | {"dt": dt, "A": A} | optional, same_dtype=tuple(named))
    return counts


def check_selective_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    *,
    validate: bool,
) -> None:
    """Raise InputError unless the tensors fit the contract of selective_scan."""
    op = "selective_scan"
    if u.dim() != 3:
        raise InputError(f"{op}: u has shape {tuple(u.shape)}; give it as (batch, dim, seq_len).")
    batch, dim, seq_len = u.shape
    if A.dim() != 2 or A.shape[0] != dim:
        raise InputError(
            f"{op}: A has shape {tuple(A.shape)} and u has {dim} channels; give A as (dim, state_size), "
            f"({dim}, state_size)."
        )
    state_size = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        if x.dim() not in (3, 4) or x.shape[0] != batch or tuple(x.shape[-2:]) != (state_size, seq_len):
            raise InputError(
                f"{op}: {name} has shape {tuple(x.shape)}; give ({batch}, {state_size}, {seq_len}), (batch, state_size,"
                " seq_len), or with groups before the state_size."
            )
        groups = x.shape[1] if x.dim() == 4 else 1
        if groups == 0 or dim % groups:
            raise InputError(f"{op}: {name} has {groups} groups, which do not divide the {dim} channels of u.")
    wanted = {
        "delta": (delta, (batch, dim, seq_len), "like u"),
        "z": (z, (batch, dim, seq_len), "like u, or None"),
        "D": (D, (dim,), "one number per channel, or None"),
        "delta_bias": (delta_bias, (dim,), "one number per channel, or None"),
        "initial_state": (initial_state, (batch, dim, state_size), "(batch, dim, state_size), or None"),
    }
    named = {"u": u, "A": A, "B": B, "C": C}
    for name, (given, shape, words) in wanted.items():
        if given is None:
            continue
        if tuple(given.shape) != shape:
            raise InputError(f"{op}: {name} has shape {tuple(given.shape)}; give {shape}, {words}.")
        named[name] = given
    check_tensors(op, named)
    if validate and values_are_checked(u):
        check_finite(op, named)
        if A.numel() and bool((A > 0).any()):
            raise InputError(f"{op}: A holds {float(A.detach().max()):.4g}; no entry may be > 0. Pass A = -exp(A_log).")
        if not delta_softplus:
            step = delta.detach() if delta_bias is None else delta.detach() + delta_bias.detach()[:, None]
            if step.numel() and bool((step < 0).any()):
                raise InputError(
                    f"{op}: delta and delta_bias add up to {float(step.min()):.4g}; steps must be >= 0. "
                    "Pass delta_softplus=True."
                )


def check_logits(logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, *, validate: bool) -> None:
    """Raise InputError unless the tensors fit the contract of logit_distillation."""
    op = "logit_distillation"
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise InputError(f"{op}: logits has shape {tuple(logits.shape)}; give it as (rows, v), v of 1 or more.")
    rows, size = logits.shape
    if tuple(labels.shape) != (rows,) or labels.is_floating_point():
        raise InputError(
            f"{op}: labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; give ({rows},) whole numbers, one "
            "per row of logits."
        )
    named = {"logits": logits}
    if teacher is not None:
        if teacher.dim() != 2 or len(teacher) != rows or teacher.shape[1] == 0:
            raise InputError(
                f"{op}: teacher has shape {tuple(teacher.shape)}; give ({rows}, v_t), v_t of 1 or more, or None."
            )
        named["teacher"] = teacher
    if not 0 < temperature < float("inf"):
        raise InputError(f"{op}: temperature={temperature} must be above 0; 1 compares the distributions as they are.")
    check_tensors(op, named)
    _check_same(op, "device", {"logits": str(logits.device), "labels": str(labels.device)}, "one device for all")
    if validate and values_are_checked(logits):
        check_finite(op, named)
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= size))]
        if len(wrong):
            raise InputError(
                f"{op}: labels holds {int(wrong[0])}; give whole numbers from 0 to {size - 1}, or -100 for a row that "
                "loses nothing."
            )


def check_heads(op: str, q: Tensor | None, k: Tensor, v: Tensor, dt: Tensor | None) -> HeadCounts:
    """Raise unless every head count divides the largest, and k's, v's and dt's divide the state's."""
    counts = {"k": k.shape[-2], "v": v.shape[-2]}
    if dt is not None:
        counts["dt"] = dt.shape[-1]
    state = max(counts.values())
    heads = max(state, q.shape[-2]) if q is not None else state
    for name, count in (counts | ({"q": q.shape[-2]} if q is not None else {})).items():
        if count == 0 or heads % count:
            raise InputError(
                f"{op}: {name} has {count} heads, which do not divide the {heads} heads of the output; "
                "make it a divisor."
            )
        if name != "q" and state % count:
            raise InputError(
                f"{op}: {name} has {count} heads, which do not divide the {state} heads of the state; "
                "make it a divisor."
            )
    return HeadCounts(heads=heads, state=state)


def check_tensors(op: str, named: dict[str, Tensor], *, same_dtype: Sequence[str] = ()) -> None:
    """Raise unless all are floating tensors of one device, and those named in same_dtype share a dtype."""
    for name, x in named.items():
        if not x.is_floating_point():
            raise InputError(f"{op}: {name} has dtype {x.dtype}; give a floating dtype, such as torch.float32.")
    _check_same(op, "device", {name: str(x.device) for name, x in named.items()}, "one device for all")
    _check_same(op, "dtype", {name: str(named[name].dtype) for name in same_dtype}, "one dtype for these")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | Sequence[int], batch: int, seq_len: int) -> tuple[int, ...]:
    """Return the document borders as integers; raise unless they rise from 0 to seq_len in a batch of one."""
    borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    if any(isinstance(border, bool) or not isinstance(border, int) for border in borders):
        raise InputError(f"{op}: cu_seqlens is {_short(borders)}; give whole numbers, one row of them.")
    if batch != 1:
        raise InputError(
            f"{op}: cu_seqlens describes one packed row, but the batch is {batch}; flatten it to (1, batch * seq_len)."
        )
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != seq_len:
        raise InputError(f"{op}: cu_seqlens is {_short(borders)}; it must start at 0 and end at seq_len = {seq_len}.")
    if any(later < earlier for earlier, later in pairwise(borders)):
        raise InputError(f"{op}: cu_seqlens is {_short(borders)}; it must never fall.")
    return borders


def check_trans_point(op: str, trans_point: int | None) -> None:
    """Raise unless the TransPoint is None or a whole number >= 0."""
    if trans_point is None:
        return
    if isinstance(trans_point, bool) or not isinstance(trans_point, Integral) or trans_point < 0:
        raise InputError(f"{op}: trans_point is {trans_point!r}; give a whole number >= 0, or None to never switch.")


def check_finite(op: str, named: dict[str, Tensor]) -> None:
    """Raise if a tensor holds NaN, naming the first place. Infinities pass: they show in the output."""
    for name, x in named.items():
        if bool(torch.isfinite(x.detach().sum(dtype=torch.float64))):
            continue
        bad = torch.isnan(x.detach()).nonzero()
        if len(bad):
            place = tuple(bad[0].tolist())
            raise InputError(
                f"{op}: {name} holds NaN at {len(bad)} of {x.numel()} places, the first at {place}; "
                "look upstream of this call."
            )


def values_are_checked(x: Tensor) -> bool:
    """Whether values of tensors on x's device are read now; never while torch.compile traces."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    enabled = _policy["enabled"]
    return x.device.type == "cpu" if enabled is None else enabled


def _check_same(op: str, what: str, found: dict[str, object], wanted: str) -> None:
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {value}" for name, value in found.items())
        raise InputError(f"{op}: the {what} differs: {listed}; wanted {wanted}.")


def _short(borders: Sequence[int]) -> str:
    return (
        str(list(borders))
        if len(borders) <= 8
        else f"[{', '.join(map(str, borders[:4]))}, ..., {', '.join(map(str, borders[-3:]))}]"
    )
