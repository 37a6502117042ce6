"""merge_scans and begin_scans on a GPU: a kernel each, which serves as the other's gradient.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import goes_around_registration, launch, on_its_device, readable, way_to_call

from . import kernels

BLOCK_ENTRIES = 2048  # of a program
MOST_COLUMNS = 256  # of a program


def merge_scans_triton(y: Tensor, places: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (merged, y); see merge_scans."""
    needs_gradient = torch.is_grad_enabled() and (y.requires_grad or (gate is not None and gate.requires_grad))
    if not goes_around_registration(y, gate, places):
        return merge_scans_op(y, places, gate, True)[0], y
    return _Merge.apply(y, places, gate) if needs_gradient else (run_merge(y, places, gate, True)[0], y)


def begin_scans_triton(x: Tensor, places: Tensor, in_order: bool) -> Tensor:
    """Return u; see begin_scans."""
    return way_to_call(begin_scans_op, _Begin, run_begin, x, places)(x, places, in_order)


@on_its_device
def run_merge(y: Tensor, places: Tensor, gate: Tensor | None, in_order: bool) -> tuple[Tensor, Tensor]:
    """(the output, the sum before the gate, empty without one)."""
    y = readable(y)
    count, batch, patches, width = y.shape
    out, merged = y.new_empty(batch, patches, width), y.new_empty((batch, patches, width) if gate is not None else (0,))
    z = y[0] if gate is None else readable(gate)
    if out.numel():
        launch(
            kernels.merge_kernel,
            _grid(batch * patches, width),
            (y, places.contiguous(), z, out, merged if gate is not None else out),
            (batch * patches, patches, width, *y.stride()[:3], *z.stride()[:2]),
            {"COUNT": count, "ORDERED": in_order, "GATE": gate is not None, **_constants(width)},
        )
    return out, merged


@on_its_device
def run_begin(x: Tensor, places: Tensor, in_order: bool) -> Tensor:
    """Every direction's own order of x, or x for every direction."""
    return _spread(x, places, None, None, None, in_order)[0]


@on_its_device
def run_merge_backward(
    dout: Tensor, more: Tensor | None, places: Tensor, gate: Tensor | None, merged: Tensor
) -> tuple[Tensor, Tensor]:
    """(dy, with `more` added to it; dgate, empty without a gate)."""
    return _spread(dout, places, gate, merged, more, True)


def _spread(
    x: Tensor, places: Tensor, gate: Tensor | None, merged: Tensor | None, more: Tensor | None, in_order: bool
) -> tuple[Tensor, Tensor]:
    x = readable(x)
    batch, patches, width = x.shape
    gated = gate is not None
    out = x.new_empty(len(places), batch, patches, width)
    dgate = x.new_empty(x.shape if gated else (0,))
    z, other = x if gate is None else readable(gate), out if more is None else readable(more)
    if out.numel():
        launch(
            kernels.spread_kernel,
            _grid(batch * patches, width),
            (x, places.contiguous(), z, x if merged is None else merged, other, out, dgate if gated else out),
            (batch * patches, patches, width, *x.stride()[:2], *z.stride()[:2], *other.stride()[:3]),
            {
                "COUNT": len(places),
                "ORDERED": in_order,
                "GATE": gated,
                "MORE": more is not None,
                **_constants(width),
            },
        )
    return out, dgate


merge_scans_op = torch.library.custom_op(
    "transmamba::merge_scans",
    lambda *inputs: run_merge(*inputs),
    mutates_args=(),
    schema="(Tensor y, Tensor places, Tensor? gate, bool in_order) -> (Tensor, Tensor)",
)
merge_scans_backward_op = torch.library.custom_op(
    "transmamba::merge_scans_backward",
    lambda *inputs: run_merge_backward(*inputs),
    mutates_args=(),
    schema="(Tensor dout, Tensor? more, Tensor places, Tensor? gate, Tensor merged) -> (Tensor, Tensor)",
)
begin_scans_op = torch.library.custom_op(
    "transmamba::begin_scans",
    lambda *inputs: run_begin(*inputs),
    mutates_args=(),
    schema="(Tensor x, Tensor places, bool in_order) -> Tensor",
)


@merge_scans_op.register_fake
def _(y: Tensor, places: Tensor, gate: Tensor | None, in_order: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[1:]), y.new_empty((0,) if gate is None else y.shape[1:])


@merge_scans_backward_op.register_fake
def _(dout: Tensor, more: Tensor | None, places: Tensor, gate: Tensor | None, merged: Tensor) -> tuple[Tensor, Tensor]:
    return dout.new_empty(len(places), *dout.shape), dout.new_empty((0,) if gate is None else dout.shape)


@begin_scans_op.register_fake
def _(x: Tensor, places: Tensor, in_order: bool) -> Tensor:
    return x.new_empty(len(places), *x.shape)


def _keep_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, places, gate, _ = inputs
    ctx.save_for_backward(places, gate, output[1])


def _merge_gradients(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    places, gate, merged = ctx.saved_tensors
    dy, dgate = merge_scans_backward_op(dout, None, places, gate, merged)
    return dy, None, None if gate is None else dgate, None


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, places, ctx.in_order = inputs
    ctx.save_for_backward(places)


def _begin_gradients(ctx: Any, du: Tensor) -> tuple[Any, ...]:
    return merge_scans_op(du, ctx.saved_tensors[0], None, ctx.in_order)[0], None, None


merge_scans_op.register_autograd(_merge_gradients, setup_context=_keep_merge)
begin_scans_op.register_autograd(_begin_gradients, setup_context=_keep_places)


class _Merge(torch.autograd.Function):
    """The same gradients without the registration, and y handed on, so that what comes back to it is added here."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        out, merged = run_merge(y, places, gate, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(places, gate, merged)
        return out, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        dout, more = gradients
        places, gate, merged = ctx.saved_tensors
        if dout is None:
            return more, None, None
        dy, dgate = run_merge_backward(dout, more, places, gate, merged)
        return dy, None, None if gate is None else dgate


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, in_order: bool) -> Tensor:
        _keep_places(ctx, (x, places, in_order), x)
        return run_begin(x, places, in_order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return run_merge(gradients[0], ctx.saved_tensors[0], None, ctx.in_order)[0], None, None


def _columns(width: int) -> int:
    """Columns of a program: as many as divide the width into whole blocks, if it has a large power of two in it."""
    whole = width & -width
    return min(MOST_COLUMNS, whole if whole >= 64 else triton.next_power_of_2(width))


def _constants(width: int) -> dict[str, Any]:
    columns = _columns(width)
    rows = max(1, BLOCK_ENTRIES // columns)
    return {"BLOCK_R": rows, "BLOCK_C": columns, "num_warps": max(1, min(4, rows * columns // 512)), "num_stages": 2}


def _grid(rows: int, width: int) -> tuple[int, int, int]:
    constants = _constants(width)
    return -(-rows // constants["BLOCK_R"]), -(-width // constants["BLOCK_C"]), 1
