"""The ops inside torch.compile: one graph, the same numbers. aot_eager needs no C compiler, which users may lack."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.ops.cases import CHUNK, FP64_BOUND, gradients, ssd_inputs, without, worst_error
from tests.ops.kernels import needs_triton
from transmamba.ops import (
    causal_conv1d,
    hybrid_mixer,
    memory_converter,
    selective_scan,
    softmax_attention,
    ssd_scan,
    ssd_step,
)

SEQ_LEN = 2 * CHUNK + 5


@pytest.fixture(autouse=True)
def forgets_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def scratch_is_nan() -> None:
    """Scratch memory stays as it is here: the functions that fill it would be traced with the ops."""


def step(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    token = {name: inputs[name][:, 0] for name in ("q", "k", "v", "dt")}
    return ssd_step(inputs["initial_state"], **token, A=inputs["A"], D=inputs["D"])


def convolution(**inputs: Tensor) -> Tensor:
    x = inputs["q"].flatten(2)
    return causal_conv1d(x, inputs["k"][0, :4, 0].repeat(1, 4).T * inputs["D"].sum(), activation="silu")


def selective(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    u, B, C = (inputs[name][:, :, 0].transpose(1, 2) for name in ("v", "k", "q"))
    delta = inputs["dt"][:, None, :, 0].expand_as(u)
    A = inputs["A"].sum().expand(u.shape[1], B.shape[1])
    return selective_scan(u, delta, A, B, C, return_last_state=True)


def selective_after_a_projection(**inputs: Tensor) -> Tensor:
    """In the mixers' layout, channels last, in which the steps' gradient goes on to a matrix product."""
    x = inputs["v"].flatten(2)
    delta = linear(x, inputs["D"].sum() * torch.eye(x.shape[2], dtype=x.dtype, device=x.device))
    u, B, C = x.transpose(1, 2), *(inputs[name][:, :, 0].transpose(1, 2) for name in ("k", "q"))
    A = inputs["A"].sum().expand(u.shape[1], B.shape[1])
    return selective_scan(u, delta.transpose(1, 2), A, B, C, delta_bias=A[:, 0], delta_softplus=True)


CALLS: dict[str, Callable[..., Any]] = {
    "ssd_scan": lambda **inputs: ssd_scan(**inputs, return_final_state=True),
    "ssd_step": step,
    "memory_converter": lambda **inputs: memory_converter(**without(inputs, "q", "D")),
    "hybrid_mixer": lambda **inputs: hybrid_mixer(
        **without(inputs, "initial_state"), trans_point=CHUNK + 1, return_final_state=True
    ),
    "softmax_attention": lambda **inputs: softmax_attention(inputs["q"], inputs["k"], inputs["v"]),
    "selective_scan": selective,
    "selective_scan after a projection": selective_after_a_projection,
    "causal_conv1d": convolution,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_op_equals_the_eager_one(name: str) -> None:
    compiled = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)
    inputs = ssd_inputs((4, 2, 2, 4), seq_len=SEQ_LEN, requires_grad=True)
    assert worst_error(as_tuple(compiled(**inputs)), as_tuple(CALLS[name](**inputs))) < FP64_BOUND
    assert worst_error(gradients(compiled, inputs), gradients(CALLS[name], inputs)) < FP64_BOUND


def test_further_lengths_are_compiled_too() -> None:
    compiled = torch.compile(CALLS["hybrid_mixer"], backend="aot_eager")
    for seq_len in (CHUNK + 4, CHUNK):
        inputs = ssd_inputs(seq_len=seq_len)
        assert worst_error(compiled(**inputs), CALLS["hybrid_mixer"](**inputs)) < FP64_BOUND


@needs_triton
def test_kernels_are_one_node_each() -> None:
    inputs = ssd_inputs((2, 1, 1, 2), seq_len=20, dtype=torch.float32, state=False)
    mix = partial(hybrid_mixer, **without(inputs, "q", "initial_state"), trans_point=7, backend="triton")
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(mix, backend=keep, fullgraph=True)(inputs["q"]), mix(inputs["q"]))
    (graph,) = graphs
    called = [str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "transmamba" in name] == ["transmamba.memory_converter", "transmamba.ssd_scan"]


def test_bad_shapes_are_refused_while_compiling() -> None:
    inputs = ssd_inputs()
    compiled = torch.compile(CALLS["ssd_scan"], backend="aot_eager")
    with pytest.raises(Exception, match="A has 3 heads and dt 4"):
        compiled(**(inputs | {"A": inputs["A"][:3]}))


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out
