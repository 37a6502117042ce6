"""Kernels that are started early: only where a caller says so and the device can."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.kernels import needs_triton
from tests.ops.ptx import touched_before_the_wait
from transmamba.ops import conv_ssd_step, step_linear
from transmamba.ops.chain import chained, in_a_chain

KERNEL = """
.visible .entry k(.param .u64 .ptr k_param_0, .param .u64 .ptr k_param_1)
{{
	.reg .b64 	%rd<4>;
	ld.param.b64 	%rd1, [k_param_0];
	mov.b64 	%rd3, k_param_1;
	ld.param.b64 	%rd2, [%rd3];
	.loc	1 18 26
	{early}
	// begin inline asm
	griddepcontrol.wait; // dummy %r1
	// end inline asm
$L__BB0_2:
	@%p1 ld.global.v2.b32 {{ %r8, %r9 }}, [ %rd2 + 0 ];
	ret;
}}
"""


def test_a_chain_ends_with_its_block_even_if_that_fails() -> None:
    def fail() -> None:
        with chained():
            seen.append(in_a_chain())
            raise ZeroDivisionError

    seen = [in_a_chain()]
    with pytest.raises(ZeroDivisionError):
        fail()
    assert [*seen, in_a_chain()] == [False, True, False]


@needs_triton
@pytest.mark.parametrize(
    ("known", "device", "expected"),
    [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)],
    ids=["in a chain", "on a CPU", "no chain"],
)
def test_kernels_start_early_only_in_a_chain_on_such_a_device(
    monkeypatch: pytest.MonkeyPatch, known: bool, device: str, expected: bool
) -> None:
    from transmamba.ops import launching

    x = torch.zeros(1)
    if device == "cuda":
        monkeypatch.setattr(launching, "can_start_early", lambda _: True)
    if known:
        with chained():
            found = launching.chain_constants(x)
    else:
        found = launching.chain_constants(x)
    assert found["CHAINED"] is expected
    assert ("launch_pdl" in found) is expected  # which other devices and the interpreter do not know


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {
        "x": (1, 64),
        "w": (64, 64),
        "norm": (64,),
        "state": (1, 2, 32, 32),
        "ring": (1, 4, 192),
        "weight": (192, 4),
        "heads": (2,),
    }
    return {name: torch.randn(size, device=DEVICE) / 8 for name, size in sizes.items()}


def step(given: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> Tensor:
    """Two products and a state between them; the state and the ring advance."""
    w, x, dt = (given[name].to(dtype) for name in ("w", "x", "heads"))
    (q,) = step_linear(x, [w], norm_weight=given["norm"].to(dtype), **options)
    heads = dict.fromkeys(("dt_bias", "A_log", "D"), given["heads"])
    at = torch.full((1,), 3, device=DEVICE)
    ring = given["ring"].to(dtype)
    y = conv_ssd_step(
        given["state"], ring, at, q, q, q, dt[None], q, weight=given["weight"].to(dtype), **heads, **options
    )
    return step_linear(y, [w], residual=x, **options)[0]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_a_chain_the_step_is_the_same(dtype: torch.dtype) -> None:
    alone = step(inputs(), dtype, backend="triton")
    for _ in range(3):
        with chained():
            assert torch.equal(step(inputs(), dtype, backend="triton"), alone)
    exact = step({name: x.double() for name, x in inputs().items()}, torch.float64, backend="reference")
    # Six roundings, each twice as large where the interpreter cuts off.
    assert relative_rms_error(alone, exact) < 12 * {torch.float32: 2**-22, torch.float16: 2**-11}.get(dtype, 2**-8)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("recorded", [False, True], ids=["stream", "graph"])
def test_on_a_card_a_chain_reads_nothing_too_early(recorded: bool) -> None:
    """Every step reads another x, so that what is read too early is another number."""
    count, steps, size = 12, 50, 1024
    torch.manual_seed(0)
    weights = [torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) / size**0.5 for _ in range(count)]
    norm = torch.ones(size, device=DEVICE, dtype=torch.bfloat16)
    inputs = torch.randn(steps, 1, size, device=DEVICE, dtype=torch.bfloat16)
    x = inputs[0].clone()

    def run(y: Tensor, backend: str) -> Tensor:
        for w in weights:
            (y,) = step_linear(y, [w.to(y.dtype)], norm_weight=norm.to(y.dtype), residual=y, backend=backend)
        return y

    def compute() -> Tensor:
        with chained():
            return run(x, "triton")

    compute()
    replay = compute
    if recorded:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = compute()

        def replay() -> Tensor:
            graph.replay()
            return y

    def outputs() -> Tensor:
        found = []
        for given in inputs:
            x.copy_(given)
            found.append(replay().clone())
        return torch.stack(found)

    first = outputs()
    assert all(torch.equal(first, outputs()) for _ in range(5))
    for given, found in zip(inputs, first, strict=True):
        # Three roundings in each of the products, which add up as independent ones do.
        assert relative_rms_error(found, run(given.double(), "reference")) < 2**-8 * (3 * count) ** 0.5


@pytest.mark.parametrize(
    ("early", "touched"),
    [
        ("", set()),
        ("@%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };", {"x"}),
        ("{ .reg .b64 t; ld.global.b32 %r1, [%rd2]; }", {"y"}),
        ("selp.b64 %rd1, %rd2, %rd1, %p1; atom.global.add.u32 %r1, [%rd1], 1;", {"x", "y"}),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;", {"x"}),
        ("cp.async.bulk.prefetch.L2.global [%rd1], %r1;", set()),
        ("st.shared.b32 [ %r1 ], %r2;", set()),
    ],
)
def test_what_is_touched_before_the_wait_is_read_from_ptx(early: str, touched: set[str]) -> None:
    assert touched_before_the_wait(KERNEL.format(early=early), {0: "x", 1: "y"}) == touched


@pytest.mark.parametrize(
    ("early", "message"),
    [
        ("@%p1 bra $L__BB0_2;", "around the wait"),
        ("@%p1 ret;", "around the wait"),
        ("griddepcontrol.wait;", "2 waits"),
        ("ld.global.b32 %r1, [%rd9];", "unknown origin"),
    ],
)
def test_what_could_hide_a_fault_is_refused(early: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        touched_before_the_wait(KERNEL.format(early=early), {0: "x", 1: "y"})
