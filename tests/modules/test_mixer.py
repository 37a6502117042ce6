"""The oracle: a layer is attention before its TransPoint and the SSM from it on, in every value and every gradient."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import VARIANTS, tiny_model
from transmamba.modules import RotaryTables, TokenLayout, TransMambaMixer

SEQ_LEN = 19
BOUND = 1e-10  # fp64
SHARED_FORMS = [name for name in VARIANTS if name not in ("standard form", "tied", "no MLP", "every layer switches")]


@pytest.mark.parametrize("trans_point", [1, 2, 7, SEQ_LEN - 1])
@pytest.mark.parametrize("variant", SHARED_FORMS)
def test_layer_is_attention_before_the_trans_point_and_ssm_from_it_on(variant: str, trans_point: int) -> None:
    mixer, run = mixer_and_run(variant)
    assert oracle_error(mixer, run, trans_point) < BOUND


@pytest.mark.parametrize("trans_point", [64, 70, 129])
def test_oracle_holds_over_several_chunks_of_the_scan(trans_point: int) -> None:
    mixer, run = mixer_and_run("default", seq_len=150)
    assert oracle_error(mixer, run, trans_point) < BOUND


@pytest.mark.parametrize("fault", ["dt is dropped", "dt is shifted", "the last key is missing", "k is rotated"])
def test_oracle_sees_faults_of_the_memory_converter(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    mixer, run = mixer_and_run("default")
    monkeypatch.setattr(
        import_module("transmamba.ops.hybrid_mixer.torch"), "memory_converter_torch", FAULTY_CONVERTERS[fault]
    )
    assert oracle_error(mixer, run, 7) > 1e-3


def test_gate_does_not_touch_attention() -> None:
    mixer, run = mixer_and_run("default")
    mixer.trans_point = 7
    before = run()
    with torch.no_grad():
        mixer.z_proj.weight.mul_(-1.0)
    after = run()
    assert torch.equal(before[:, :7], after[:, :7])
    assert relative_rms_error(after[:, 7:], before[:, 7:]) > 1e-2


def test_rotation_does_not_touch_the_state_unless_asked_for() -> None:
    for variant, moved in (("default", False), ("rope in both modes", True)):
        mixer, run = mixer_and_run(variant)
        mixer.trans_point = 7
        plain, shifted = run(), run(first_position=3.0, stretch=1.5)
        assert relative_rms_error(shifted[:, 1:7], plain[:, 1:7]) > 1e-3
        assert (relative_rms_error(shifted[:, 7:], plain[:, 7:]) > 1e-3) == moved


def test_dt_and_A_stay_fp32_in_bf16() -> None:
    mixer = tiny_model(torch.bfloat16).model.layers[1].mixer
    dt, A = mixer.step_sizes(torch.randn(1, 3, 32, dtype=torch.bfloat16, device=DEVICE))
    assert dt.dtype == A.dtype == torch.float32
    assert (dt > 0).all()
    assert (A < 0).all()


def mixer_and_run(variant: str, seq_len: int = SEQ_LEN) -> tuple[TransMambaMixer, Callable[..., Tensor]]:
    """A mixer in fp64 and a function that runs it on fixed hidden states, which require gradients."""
    mixer = tiny_model(torch.float64, **VARIANTS[variant]).model.layers[1].mixer
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, seq_len, 32, dtype=torch.float64, generator=generator).to(DEVICE).requires_grad_()
    mixer.register_parameter("hidden_states", torch.nn.Parameter(hidden.detach()))
    head_dim = mixer.config.head_dim

    def run(first_position: float = 0.0, stretch: float = 1.0) -> Tensor:
        position = first_position + stretch * torch.arange(seq_len, dtype=torch.float64, device=DEVICE)
        frequencies = 100.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=DEVICE) / head_dim)
        angles = torch.cat([position[:, None] * frequencies] * 2, dim=-1)[None]
        layout = TokenLayout.of(2, seq_len, DEVICE)
        return mixer(mixer.hidden_states, RotaryTables(angles.cos(), angles.sin()), layout)

    return mixer, run


def oracle_error(mixer: TransMambaMixer, run: Callable[..., Tensor], trans_point: int) -> float:
    """Return the largest relative error of the output and of all gradients against where(t < P, attention, ssm)."""
    outputs = {}
    for point in (trans_point, 0, None):
        mixer.trans_point = point
        outputs[point] = run()
    y = outputs[trans_point]
    before = torch.arange(y.shape[1], device=y.device)[:, None] < trans_point
    oracle = torch.where(before, outputs[None], outputs[0])
    assert relative_rms_error(outputs[None], outputs[0]) > 1e-1
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5)).to(y.device)
    parameters = dict(mixer.named_parameters())
    found, exact = (torch.autograd.grad((weights * output).sum(), list(parameters.values())) for output in (y, oracle))
    assert all(gradient.any() for gradient in exact)
    return max(relative_rms_error(a, b) for a, b in [(y, oracle), *zip(found, exact, strict=True)])


def _convert(k: Tensor, v: Tensor, dt: Tensor, A: Tensor, written: Tensor) -> Tensor:
    """The converter as its formula, with the step size of what is written as an argument of its own."""
    heads = dt.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    total = (dt * A).cumsum(dim=1)
    return torch.einsum("bth,bthn,bthp->bhnp", (total[:, -1:] - total).exp() * written, k, v)


FAULTY_CONVERTERS: dict[str, Callable[..., Tensor]] = {
    "dt is dropped": lambda k, v, dt, A: _convert(k, v, dt, A, torch.ones_like(dt)),
    "dt is shifted": lambda k, v, dt, A: _convert(k, v, dt, A, dt.roll(1, dims=1)),
    "the last key is missing": lambda k, v, dt, A: _convert(k[:, :-1], v[:, :-1], dt[:, :-1], A, dt[:, :-1]),
    "k is rotated": lambda k, v, dt, A: _convert(k.roll(1, dims=-1), v, dt, A, dt),
}


def test_the_formula_of_the_faulty_converters_is_right_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, run = mixer_and_run("default")
    monkeypatch.setattr(
        import_module("transmamba.ops.hybrid_mixer.torch"),
        "memory_converter_torch",
        lambda k, v, dt, A: _convert(k, v, dt, A, dt),
    )
    assert oracle_error(mixer, run, 7) < BOUND
