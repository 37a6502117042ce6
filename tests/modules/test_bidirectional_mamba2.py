"""The bidirectional Mamba-2 mixer against its matrix form in fp64, with padding, and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from tests.helpers import relative_rms_error
from transmamba.modules import BidirectionalMamba2Mixer
from transmamba.modules import bidirectional_mamba2 as room
from transmamba.ops import bidirectional_scan as op_room
from transmamba.ops.turning import turn, turned_rows

HEADS, SIZE = 3, 4


def mixer(**changes: Any) -> BidirectionalMamba2Mixer:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_heads": HEADS,
        "head_dim": SIZE,
        "conv_kernel": 3,
        "conv_activation": True,
        "mean_term": True,
        "direction_weights": "separate",
        "use_gate": True,
        "mixer_norm": True,
        "norm_eps": 1e-6,
    }
    made = BidirectionalMamba2Mixer(10, **(options | changes)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def matrix_form(m: BidirectionalMamba2Mixer, hidden: Tensor, *, skip_twice: bool = False) -> Tensor:
    """One row (1, tokens, 10): for each direction the tokens x tokens matrix of its scan, in the text's own order."""
    tokens = hidden.shape[1]
    total = torch.zeros(tokens, HEADS * SIZE, dtype=torch.float64)
    for ending in ("", "_b"):
        own = ending if m.is_separate else ""
        x = hidden[0].flip(0) if ending else hidden[0]
        weights = {name: m.get_submodule(name + own) for name in ("q_proj", "k_proj", "v_proj")}
        qkv = torch.cat([projection(x) for projection in weights.values()], dim=-1)
        conv = getattr(m, "conv1d" + own)
        if conv is not None:
            kernel = conv.kernel_size[0]
            window = pad(qkv, (0, 0, kernel - 1, 0)).unfold(0, kernel, 1)
            qkv = torch.einsum("tck,ck->tc", window, conv.weight[:, 0]) + conv.bias
        if m.conv_activation:
            qkv = silu(qkv)
        q, k, v = (part.unflatten(-1, (HEADS, SIZE)) for part in qkv.chunk(3, dim=-1))
        dt = softplus(m.get_submodule("dt_proj" + ending)(x) + m.get_parameter("dt_bias" + ending))
        A, D = -m.get_parameter("A_log" + ending).exp(), m.get_parameter("D" + ending)
        y = torch.zeros(tokens, HEADS, SIZE, dtype=torch.float64)
        mean = m.get_submodule("mean_proj" + own)(x) if m.mean_term else torch.zeros_like(dt)
        for h in range(HEADS):
            for t in range(tokens):
                for j in range(t + 1):
                    decay = torch.exp(A[h] * dt[j + 1 : t + 1, h].sum())
                    weight = mean[j, h] + q[t, h] @ k[j, h] / SIZE**0.5
                    y[t, h] += decay * dt[j, h] * weight * v[j, h]
            y[:, h] += (2 if skip_twice else 1) * D[h] * v[:, h]
        y = y.flatten(1)
        total += y.flip(0) if ending else y
    if m.z_proj is not None:
        total = total * silu(m.z_proj(hidden[0]))
    return m.o_proj(total if m.norm is None else m.norm(total))[None]


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"direction_weights": "shared"},
        {"direction_weights": "shared", "conv_kernel": 0, "conv_activation": False, "mixer_norm": False},
        {"mean_term": False, "use_gate": False},
    ],
    ids=["separate", "shared", "no convolution", "no mean term"],
)
def test_a_mixer_is_its_matrix_form(tokens: int, changes: dict[str, Any]) -> None:
    m = mixer(**changes)
    hidden = torch.randn(1, tokens, 10, dtype=torch.float64)
    out, _ = m(hidden)
    assert relative_rms_error(out, matrix_form(m, hidden)) < 1e-12  # sums of at most 7 terms in fp64
    assert relative_rms_error(out, matrix_form(m, hidden, skip_twice=True)) > 1e-2  # the bound sees a doubled D


@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
def test_padding_changes_nothing(direction_weights: str) -> None:
    m = mixer(direction_weights=direction_weights)
    lengths = torch.tensor([5, 1, 3])
    hidden = torch.randn(3, 5, 10, dtype=torch.float64)
    turned = turned_rows(lengths, 5)
    out, (forward, backward) = m(hidden, turned)
    for row, length in enumerate(lengths.tolist()):
        alone, (own_forward, own_backward) = m(hidden[row : row + 1, :length])
        assert relative_rms_error(out[row, :length], alone[0]) < 1e-13
        assert relative_rms_error(forward[row, :length], own_forward[0]) < 1e-13
        assert relative_rms_error(backward[row, :length], own_backward[0]) < 1e-13
    wrong, _ = m(hidden)  # as if padding were tokens
    assert relative_rms_error(wrong[2, :3], out[2, :3]) > 1e-2


def test_turning_is_its_own_inverse() -> None:
    turned = turned_rows(torch.tensor([4, 0, 2]), 4)
    assert turned.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 2, 3]]
    x = torch.randn(3, 4, 2, 5)
    assert torch.equal(turn(turn(x, turned), turned), x)
    assert torch.equal(turn(x, None), x.flip(1))


@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
def test_every_parameter_has_the_right_gradient(direction_weights: str) -> None:
    m = mixer(direction_weights=direction_weights)
    hidden = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    turned = turned_rows(torch.tensor([3, 2]), 3)
    names, values = zip(*m.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        out, _ = torch.func.functional_call(m, dict(zip(names, parameters, strict=True)), (x, turned))
        return out[:, :2]  # of the second row nothing but tokens

    assert torch.autograd.gradcheck(run, (hidden, *values), fast_mode=True)
    run(hidden, *values).square().sum().backward()
    assert torch.equal(hidden.grad[1, 2], torch.zeros(10, dtype=torch.float64))  # type: ignore[index]
    assert all(bool(value.grad.abs().sum() > 0) for value in m.parameters() if value.grad is not None)
    assert all(value.grad is not None for value in m.parameters())


@pytest.fixture
def by_one_op(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let mixers take the op, in the form that there is on a CPU; one number for every call of it."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return op_room(*args, **kwargs)

    monkeypatch.setattr(room, "runs_as_kernels", lambda *arguments: True)
    monkeypatch.setattr(room, "bidirectional_scan", counted)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, [5, 0, 3]], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer_norm": False, "conv_activation": False},
        {"conv_kernel": 0, "mixer_norm": False},
        {"mean_term": False, "use_gate": False},
        {"use_gate": False, "mixer_norm": False},
    ],
    ids=["everything", "no norm", "no convolution", "no mean term, no gate", "neither gate nor norm"],
)
def test_one_op_is_the_modules(by_one_op: list[int], changes: dict[str, Any], lengths: list[int] | None) -> None:
    m = mixer(direction_weights="shared", **changes)
    hidden = torch.randn(3, 5, 10, dtype=torch.float64)
    counts = None if lengths is None else torch.tensor(lengths)
    turned = None if counts is None else turned_rows(counts, 5)
    wanted, features = m(hidden, turned, counts)
    assert features is not None
    assert not by_one_op
    found, nothing = m(hidden, turned, counts, directions=False)
    assert nothing is None
    assert len(by_one_op) == 1
    for row, length in enumerate(lengths or [5, 5, 5]):
        assert relative_rms_error(found[row, :length], wanted[row, :length]) < 1e-13
    if m.z_proj is not None:
        m.z_proj.weight.mul_(1.1)  # in place: a joint weight that was kept would not notice
        assert relative_rms_error(m(hidden, turned, counts, directions=False)[0], found) > 1e-3


def test_modules_that_are_more_than_weights_are_called(by_one_op: list[int]) -> None:
    m = mixer(direction_weights="shared")
    hidden = torch.randn(1, 4, 10, dtype=torch.float64)
    m(hidden, directions=False)
    assert not by_one_op  # gradients are to come
    with torch.no_grad():
        m(hidden, directions=False)
        assert len(by_one_op) == 1
        seen: list[int] = []
        for part in (m.k_proj, m.dt_proj_b, m.conv1d):
            handle = part.register_forward_hook(lambda *_: seen.append(1))
            m(hidden, directions=False)
            handle.remove()
        assert len(seen) == 4  # the convolution is called for each direction
        mixer(direction_weights="separate")(hidden, directions=False)
        assert len(by_one_op) == 1
