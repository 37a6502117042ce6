"""Compile the kernels for Hopper as the ops launch them, on a machine without a GPU; a test runs this as a process.

The interpreter runs what no compiler has read: names that change their type in a loop, sizes that a product does not
have, more shared memory than there is. Nothing is launched, so what ops return here has no meaning.
"""

import sys
from collections import Counter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.compiler import compile as compile_kernel
from triton.runtime import JITFunction

from tests.ops.ptx import touched_before_the_wait
from transmamba.ops import (
    attention_step,
    backends,
    begin_scans,
    bidirectional_scan,
    causal_conv1d,
    conv_ssd_step,
    gated_rms_norm,
    launching,
    memory_converter,
    merge_scans,
    post_norm,
    residual_norm,
    selective_scan,
    ssd_scan,
    ssd_step,
    step_linear,
    token_cosines,
)
from transmamba.ops.chain import chained
from transmamba.ops.chain.kernels import wait_for_the_chain
from transmamba.ops.logit_distillation import logit_gradient
from transmamba.ops.ssd_scan.launches import configured

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
# What a kernel may read before the kernels ahead are done: what no kernel of a chain writes.
READ_EARLY = {
    "conv_step_kernel": {"weight", "bias", "dt_bias", "A_log", "D", "positions"},
    "early_row_kernel": {"w0", "w1", "w2", "w3", "w4", "norm"},
    "row_kernel": set(),
    "reads_too_early": set(),
}

compiled: set[Any] = set()
counts: Counter[str] = Counter()
waiting: set[str] = set()


class Compiled:
    """What a launch gets in the place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: None


def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else type_of(value)
    key = (kernel.fn.__name__, *signature.items(), *constants.items(), *options.items())
    if key not in compiled:
        compiled.add(key)
        counts[kernel.fn.__name__] += 1
        found = compile_kernel(ASTSource(kernel, signature, constants), target=TARGET, options=options)
        if constants.get("CHAINED"):
            assert options["launch_pdl"]
            check_the_wait(kernel.fn.__name__, found.asm["ptx"], [x for x in signature.items() if x[1] != "constexpr"])
        else:
            assert "griddepcontrol" not in found.asm["ptx"]
    return Compiled()


def check_the_wait(kernel: str, ptx: str, parameters: list[tuple[str, str]]) -> None:
    """Nothing but what may be read early is touched before the wait, and the next kernel may begin."""
    pointers = {at: name for at, (name, kind) in enumerate(parameters) if kind.startswith("*")}
    touched = touched_before_the_wait(ptx, pointers)
    if not touched <= READ_EARLY[kernel]:
        raise EarlyError(f"{kernel} touches {sorted(touched - READ_EARLY[kernel])} before it waits.")
    assert "griddepcontrol.launch_dependents" in ptx
    waiting.add(kernel)


class EarlyError(Exception):
    """A kernel reads or writes before its wait what others may be writing or reading."""


@triton.jit
def reads_too_early(x, y, CHAINED: tl.constexpr):
    """A fault that the check of the wait has to see."""
    value = tl.load(x + tl.arange(0, 16))
    wait_for_the_chain()
    tl.store(y + tl.arange(0, 16), value)


@triton.jit
def changes_its_type(x, COUNT: tl.constexpr):
    """A fault that the interpreter does not see: once a card found it in one of ours."""
    kept = tl.arange(0, 16)
    for _ in range(COUNT):
        kept = kept * 0.5
    tl.store(x + tl.arange(0, 16), kept)


def type_of(number: float) -> str:
    return "fp32" if isinstance(number, float) else "i32"


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.rand(shape, dtype=dtype).requires_grad_()


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward([x.float().sum() for x in outputs])


def scans(size: int, head_dim: int, dtype: torch.dtype) -> None:
    fp32 = torch.float32
    q, k, v = (
        draw(2, 90, 4, size, dtype=dtype),
        draw(2, 90, 2, size, dtype=dtype),
        draw(2, 90, 2, head_dim, dtype=dtype),
    )
    dt, A, D = draw(2, 90, 2, dtype=fp32), draw(2, dtype=fp32), draw(4, dtype=fp32)
    for changes in ({}, {"sweeps": None}, {"forward_sweeps": True}):
        with configured(**changes):
            backward(*ssd_scan(q, k, v, dt, A, D, return_final_state=True, validate=False))
    backward(memory_converter(k, v, dt, A, validate=False))


def mamba_1(tokens: int, states: int) -> None:
    fp32 = torch.float32
    u, delta, z = (draw(1, tokens, 64).transpose(1, 2) for _ in range(3))
    B, C = (draw(1, states, tokens) for _ in range(2))
    A, D, bias = draw(64, states, dtype=fp32), draw(64, dtype=fp32), draw(64, dtype=fp32)
    backward(selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, validate=False))


def small_ops() -> None:
    x = draw(2, 70, 64)
    backward(causal_conv1d(x, draw(64, 4), draw(64), activation="silu", validate=False))
    backward(causal_conv1d(x[:1], draw(64, 4), cu_seqlens=[0, 30, 70], validate=False))
    backward(gated_rms_norm(x, draw(2, 70, 64), draw(64), validate=False))
    backward(gated_rms_norm(x, draw(2, 70, 64), validate=False))
    places = torch.arange(70).expand(4, 70)
    backward(*merge_scans(draw(4, 2, 70, 384), places, draw(2, 70, 384), validate=False))
    backward(merge_scans(draw(4, 2, 70, 40), places, validate=False)[0], begin_scans(x, places, validate=False))
    backward(begin_scans(x, places, in_order=False, validate=False))
    backward(token_cosines(draw(4, 2, 70, 192), draw(2, 72, 192, dtype=torch.float32), places, validate=False))
    stream = draw(2, 70, 192, dtype=torch.float32)
    backward(*residual_norm(stream, draw(192), draw(192), dtype=torch.bfloat16, validate=False))
    backward(post_norm(stream, draw(2, 70, 192), draw(192), draw(192), validate=False))
    backward(post_norm(draw(2, 70, 192), draw(2, 70, 192), draw(192), draw(192), validate=False))
    backward(residual_norm(stream, draw(192), centred=False, dtype=torch.bfloat16, validate=False)[0])
    logits, labels = draw(8, 1000).detach(), torch.zeros(8, dtype=torch.int64)
    logit_gradient(logits, labels, draw(8, 1000).detach(), temperature=2.0, kl_weight=1.0, ce_weight=1.0)


@torch.no_grad()
def decoding(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    width, heads, size = 128, 2, 64
    at = torch.full((rows,), 3)
    given = [draw(rows, width, dtype=dtype) for _ in range(4)]
    state = draw(rows, heads, size, size, dtype=torch.float32)
    ring, dt = draw(rows, 4, 3 * width, dtype=dtype), draw(rows, heads, dtype=dtype)
    vectors = {name: draw(heads) for name in ("dt_bias", "A_log", "D")}
    taps = {"weight": draw(3 * width, 4), "bias": draw(3 * width)}
    conv_ssd_step(state, ring, at, *given[:3], dt, given[3], **taps, **vectors)
    q, k, v = (x.unflatten(1, (heads, size)) for x in given[:3])
    ssd_step(state, q, k, v, dt.float(), -vectors["A_log"].float(), vectors["D"], in_place=True, validate=False)
    keys, values = (draw(rows, 256, heads, size, dtype=dtype) for _ in range(2))
    attention_step(q, keys, values, at)
    gates = [draw(300, width, dtype=dtype), draw(300, width, dtype=dtype)]
    out = [draw(width, width, dtype=dtype)]
    several = [draw(count, width, dtype=dtype) for count in (width, 64, 64, 2, width)]
    step_linear(given[0], several, norm_weight=draw(width, dtype=dtype), eps=1e-6)
    step_linear(given[0], gates, norm_weight=draw(width, dtype=dtype), eps=1e-6, gated=True)
    step_linear(given[0], out, residual=given[1], eps=1e-6)
    long = draw(rows, 4 * width, dtype=dtype)
    step_linear(long, [draw(width, 4 * width, dtype=dtype)], residual=given[1], eps=1e-6)


@torch.no_grad()
def encoding(head_dim: int, dtype: torch.dtype) -> None:
    heads, width = 12, 12 * head_dim
    wide = draw(1, 150, 4 * width + 48, dtype=dtype)
    q, k, v, gate, dt, m, _ = wide.split([*[width] * 4, 2 * heads, heads, 48 - 3 * heads], dim=-1)
    vectors = {name: (draw(heads), draw(heads)) for name in ("dt_bias", "A_log", "D")}
    given = {"weight": draw(3 * width, 4, dtype=dtype), "bias": draw(3 * width, dtype=dtype), "activation": "silu"}
    bidirectional_scan(q, k, v, dt, m=m, gate=gate, **vectors, **given)
    bidirectional_scan(q, k, v, dt, m=m, gate=gate, **vectors, lengths=torch.tensor([70]))


def main() -> None:
    JITFunction.run = compile_only
    backends._obstacle = lambda *arguments: ""
    backends.resolve_backend = lambda *arguments, **options: "triton"
    for module in list(backends_users()):
        module.resolve_backend = backends.resolve_backend
    scans(33, 32, torch.bfloat16)
    scans(32, 32, torch.float32)
    mamba_1(400, 16)
    mamba_1(20, 4)
    small_ops()
    for rows in (1, 8):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            decoding(rows, dtype)
    encoding(32, torch.bfloat16)
    encoding(64, torch.float32)
    chains()
    try:
        changes_its_type[(1,)](draw(16), COUNT=5)
    except CompilationError:
        del counts["changes_its_type"]
    sys.stdout.write(" ".join(f"{name}={count}" for name, count in sorted(counts.items())) + "\n")
    sys.stdout.write(" ".join(sorted(waiting)) + "\n")


def chains() -> None:
    """One row, as a device that can start kernels early runs it."""
    launching.can_start_early = lambda device: True
    with chained():
        for dtype in (torch.float32, torch.bfloat16):
            decoding(1, dtype)
        wide = draw(1, 4096)  # more of a gate than a program holds
        step_linear(wide, [draw(4096, 4096), draw(4096, 4096)], gated=True)
    try:
        reads_too_early[(1,)](draw(16), draw(16), CHAINED=True, launch_pdl=True)
    except EarlyError:
        del counts["reads_too_early"]


def backends_users() -> Any:
    return (module for module in sys.modules.values() if hasattr(module, "resolve_backend") and module is not backends)


if __name__ == "__main__":
    main()
