"""One resolver chooses a backend, and says why."""

import logging

import pytest
import torch

from transmamba import ops
from transmamba.errors import InputError
from transmamba.ops import backends, explain
from transmamba.ops.backends import TRITON_MAX_SIZE, resolve_backend

OPS = (
    "attention_step",
    "bidirectional_scan",
    "causal_conv1d",
    "conv_ssd_step",
    "gated_rms_norm",
    "hybrid_mixer",
    "logit_distillation",
    "memory_converter",
    "merge_scans",
    "post_norm",
    "residual_norm",
    "selective_scan",
    "softmax_attention",
    "ssd_scan",
    "ssd_step",
    "step_linear",
    "token_cosines",
)
# Kernels whose bound on sizes is that of the state space's.
KERNELS = (
    "attention_step",
    "bidirectional_scan",
    "causal_conv1d",
    "conv_ssd_step",
    "gated_rms_norm",
    "hybrid_mixer",
    "logit_distillation",
    "memory_converter",
    "merge_scans",
    "post_norm",
    "residual_norm",
    "ssd_scan",
    "ssd_step",
    "step_linear",
    "token_cosines",
)


class OnCuda:
    """What the resolver asks of a tensor, for one on an H100, wherever the test runs."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, size: int = 64) -> None:
        self.dtype, self.device, self.shape = dtype, torch.device("cuda", 0), (2, 5, 4, size)


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", "")
    backends._announce.cache_clear()


def test_every_op_is_explained_once() -> None:
    choices = explain("cpu")
    assert tuple(choice.op for choice in choices) == OPS
    assert all(choice.op in ops.__all__ for choice in choices)
    assert all(choice.reason for choice in choices)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_what_is_explained_is_what_runs(device: str) -> None:
    for choice in explain(device):
        assert choice.backend == resolve_backend(choice.op, None, torch.zeros(1, 1, 1, 4)) == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_cuda_device_the_kernels_run(an_h100: None, dtype: torch.dtype) -> None:
    chosen = {choice.op: choice.backend for choice in explain("cuda")}
    assert chosen == {op: "triton" if op in (*KERNELS, "selective_scan") else "torch" for op in OPS}
    assert {op: resolve_backend(op, None, OnCuda(dtype), OnCuda(dtype)) for op in OPS} == chosen


def test_kernels_that_no_card_has_run_are_taken_when_named_only(an_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "post_norm"
    monkeypatch.setattr(backends, "_UNPROVEN", (op,))
    assert resolve_backend(op, None, OnCuda(), size=16) == "torch"
    assert resolve_backend(op, "triton", OnCuda(), size=16) == "triton"
    (choice,) = (choice for choice in explain("cuda") if choice.op == op)
    assert "have not been checked on a card yet: backend='triton' runs them" in choice.reason


def test_states_of_selective_scan_have_a_bound_of_their_own(an_h100: None) -> None:
    assert resolve_backend("selective_scan", "triton", OnCuda(size=10_000), size=64) == "triton"
    with pytest.raises(InputError, match="its kernels are for state_size up to 64, and here it is 65"):
        resolve_backend("selective_scan", "triton", OnCuda(), size=65)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (OnCuda(torch.float64), "the inputs are float64"),
        (OnCuda(size=TRITON_MAX_SIZE + 1), "up to 256, and here it is 257"),
    ],
)
@pytest.mark.parametrize("op", KERNELS)
def test_a_fallback_is_announced_once(
    an_h100: None, caplog: pytest.LogCaptureFixture, op: str, inputs: OnCuda, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [resolve_backend(op, None, inputs) for _ in range(3)] == ["torch"] * 3
    (message,) = caplog.messages
    assert message.startswith(f"{op} runs as plain PyTorch, which is slower: its kernels are for ")
    assert message.endswith(reason)
    with pytest.raises(InputError, match=f"{op} cannot run on backend 'triton': .*{reason}; pass backend='torch'"):
        resolve_backend(op, "triton", inputs)


def test_an_old_gpu_falls_back(an_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    assert resolve_backend("ssd_scan", None, OnCuda()) == "torch"
    with pytest.raises(InputError, match=r"need compute capability 8\.0, and cuda:0 has 7\.5"):
        resolve_backend("ssd_scan", "triton", OnCuda())


def test_without_triton_pytorch_runs_and_the_extra_is_named(an_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "triton is not installed (pip install 'transmamba[triton]')"
    monkeypatch.setattr(backends, "TRITON_MISSING", reason)
    assert resolve_backend("ssd_scan", None, OnCuda()) == "torch"
    assert {choice.backend for choice in explain("cuda")} == {"torch"}
    with pytest.raises(InputError, match=r"pip install 'transmamba\[triton\]'"):
        resolve_backend("ssd_scan", "triton", OnCuda())


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_MISSING", "")
    x = torch.zeros(1, 1, 1, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("ssd_scan", "triton", x) == "triton"
    assert resolve_backend("ssd_scan", None, x) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="need a CUDA device, and the inputs are on cpu"):
        resolve_backend("ssd_scan", "triton", x)


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_is_taken_and_another_refused(op: str) -> None:
    assert resolve_backend(op, "reference") == "reference"
    with pytest.raises(InputError, match=f"{op} has no backend 'fast'; choose 'reference' or 'torch'.*, or None"):
        resolve_backend(op, "fast")


def test_a_preferred_backend_is_chosen_within(an_h100: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_UNPROVEN", ("post_norm", "merge_scans"))
    with backends.prefer("torch"):
        assert {resolve_backend(op, None, OnCuda(), size=16) for op in OPS} == {"torch"}
        assert resolve_backend("ssd_step", "triton", OnCuda()) == "triton"
        with backends.prefer("triton", "post_norm"):
            assert resolve_backend("post_norm", None, OnCuda(), size=16) == "triton"
            assert resolve_backend("ssd_step", None, OnCuda()) == "torch"
    assert resolve_backend("ssd_step", None, OnCuda()) == "triton"
    with backends.prefer("triton"):
        assert resolve_backend("ssd_step", None, torch.zeros(1)) == "torch"
        assert resolve_backend("softmax_attention", None, OnCuda()) == "torch"


def test_kernels_run_on_a_cpu_where_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_MISSING", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backends.prefer("triton", interpreted=True):
        assert resolve_backend("ssd_step", None, torch.zeros(1)) == "triton"
        assert resolve_backend("ssd_step", None, torch.zeros(1, dtype=torch.float64)) == "torch"
    assert resolve_backend("ssd_step", None, torch.zeros(1)) == "torch"
