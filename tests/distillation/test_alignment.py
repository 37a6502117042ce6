"""Layer by layer: what is tapped, what is compared, and that no layer learns through another."""

import pytest
import torch
from torch import Tensor

from tests.distillation.students import packed_batch, pair
from tests.helpers import relative_rms_error
from transmamba.distillation import AlignmentObjective, matrix_errors, mixer_signals, output_errors, teacher_forced
from transmamba.distillation.alignment import LayerErrors, suffix_mean
from transmamba.distillation.signals import MixerSignal, mixers_of
from transmamba.models import TransMambaForCausalLM
from transmamba.ops import apply_rotary, ssd_scan


def objective(errors: LayerErrors, schedule: tuple[int | None, ...] = (0, 5, None)) -> AlignmentObjective:
    _, student = pair(schedule=schedule)
    _, teacher = pair(schedule=schedule)
    return AlignmentObjective(student.double(), teacher.double().requires_grad_(False), errors)


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "position_ids")}


@pytest.mark.parametrize("boundaries", [False, True])
def test_signals_are_what_the_mixers_read_and_wrote(boundaries: bool) -> None:
    _, student = pair(schedule=(None, None, None))
    batch = packed_batch(boundaries=boundaries)
    signals = mixer_signals(student, inputs(batch))
    assert len(signals) == 3
    for mixer, signal in zip(mixers_of(student), signals, strict=True):
        assert torch.equal(mixer(signal.hidden, signal.rotary, signal.layout), signal.output)
    assert not any(mixer._forward_hooks for mixer in mixers_of(student))


def test_a_forced_student_reads_the_teachers_inputs_and_passes_its_outputs_on() -> None:
    _, teacher = pair(schedule=(None, None, None))
    _, student = pair()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    batch = inputs(packed_batch())
    signals, seen = mixer_signals(teacher, batch), {}
    with teacher_forced(student, signals, lambda layer, signal: seen.__setitem__(layer, signal)):
        student(**batch, use_cache=False)
    for layer, mixer in enumerate(mixers_of(student)):
        assert torch.equal(seen[layer].hidden, signals[layer].hidden)
        alone = mixer(signals[layer].hidden, seen[layer].rotary, signals[layer].layout)
        assert torch.equal(seen[layer].output, alone)


def test_layers_learn_side_by_side() -> None:
    aligned = objective(output_errors, (0, 0, 0))
    mixers = mixers_of(aligned.student)
    losses: dict[int, Tensor] = {}
    batch = packed_batch()
    theirs = mixer_signals(aligned.teacher, inputs(batch))
    teacher_mixers = mixers_of(aligned.teacher)

    def watch(layer: int, signal: MixerSignal) -> None:
        losses[layer] = output_errors(mixers[layer], signal, teacher_mixers[layer], theirs[layer]).sum()

    with teacher_forced(aligned.student, theirs, watch):
        aligned.student(**inputs(batch), use_cache=False)
    for layer, loss in losses.items():
        loss.backward(retain_graph=True)
        touched = {name.split(".")[2] for name, p in aligned.student.named_parameters() if p.grad is not None}
        assert touched == {str(layer)}
        aligned.student.zero_grad()


@pytest.mark.parametrize("errors", [output_errors, matrix_errors])
def test_packing_and_batching_do_not_change_the_loss(errors: LayerErrors) -> None:
    aligned = objective(errors)
    batch = packed_batch()
    whole = aligned(aligned.student, {**batch, "num_items_in_batch": 1})[0]
    documents = [(0, 0, 13), (0, 13, 24), (1, 0, 24)]
    parts = [{name: x[row : row + 1, start:end] for name, x in batch.items()} for row, start, end in documents]
    if errors is output_errors:  # whose scale is a mean over the batch
        scales = [
            signal.output.float().square().sum(-1).mean() for signal in mixer_signals(aligned.teacher, inputs(batch))
        ]
        alone = sum(scaled_alone(aligned, part, scales) for part in parts)
    else:
        alone = sum(aligned(aligned.student, {**part, "num_items_in_batch": 1})[0] for part in parts)
    # Errors are fp32: a relative error of 2^-24 in each of a hundred sums.
    assert relative_rms_error(whole, torch.as_tensor(alone)) < 100 * 2**-24


def scaled_alone(aligned: AlignmentObjective, batch: dict[str, Tensor], scales: list[Tensor]) -> Tensor:
    theirs, errors = mixer_signals(aligned.teacher, inputs(batch)), {}

    def watch(layer: int, signal: MixerSignal) -> None:
        errors[layer] = (signal.output - theirs[layer].output).float().square().sum(-1) / scales[layer]

    with teacher_forced(aligned.student, theirs, watch):
        aligned.student(**inputs(batch), use_cache=False)
    points = [mixer.trans_point for mixer in mixers_of(aligned.student)]
    return suffix_mean([errors[n] for n in range(3)], theirs, points, batch["labels"] != -100)


def test_only_tokens_from_a_layers_trans_point_on_count() -> None:
    _, student = pair()
    signals = mixer_signals(student, inputs(packed_batch(boundaries=False)))
    counts = torch.ones(2, 24, dtype=torch.bool)
    counts[0, 20:] = False
    ones = [torch.ones(2, 24)] * 3
    assert float(suffix_mean(ones, signals, [0, 5, None], counts)) == pytest.approx((44 + 34) / 3)
    assert float(suffix_mean(ones, signals, [None, 24, 30], counts)) == 0


def test_a_mixing_matrix_is_what_the_state_space_applies_to_values() -> None:
    """matrix_errors with a teacher of zero weight gives |M|^2 of the rows; here M v is checked against ssd_scan."""
    _, student = pair(schedule=(0, 0, 0))
    student.double()
    mixer = mixers_of(student)[1]
    signal = mixer_signals(student, inputs(packed_batch(boundaries=False)))[1]
    q, k, _ = mixer.project(signal.hidden, signal.layout)
    dt, A = mixer.step_sizes(signal.hidden)
    heads, length = q.shape[2], q.shape[1]
    identity = torch.eye(length).double()[None, :, None].expand(1, length, 1, length)
    # The state space's matrix, column by column: its response to one-hot values.
    assert signal.rotary is not None
    q, k = (apply_rotary(x, signal.rotary.cos, signal.rotary.sin) for x in (q, k))
    matrix = ssd_scan(q[:1], k[:1], identity, dt[:1], A, mixer.D)[0]  # (length, heads, length)
    attention = torch.stack([softmax_rows(q[0, :, h], k[0, :, h * k.shape[2] // heads]) for h in range(heads)], dim=1)
    exact = (matrix - attention).square().sum(-1).mean(-1)
    found = matrix_errors(mixer, signal, mixer, signal)[0]
    assert relative_rms_error(found, exact) < 100 * 2**-24  # made in fp32
    shifted = (matrix.roll(1, dims=0) - attention).square().sum(-1).mean(-1)
    assert relative_rms_error(shifted, exact) > 1e-2


def softmax_rows(q: Tensor, k: Tensor) -> Tensor:
    causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~causal, -torch.inf).softmax(-1)


@pytest.mark.parametrize("errors", [output_errors, matrix_errors])
def test_a_step_downhill_brings_layers_nearer(errors: LayerErrors) -> None:
    aligned = objective(errors)
    batch = packed_batch()
    before = aligned(aligned.student, batch)[0]
    before.backward()
    with torch.no_grad():
        for parameter in aligned.student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    assert aligned(aligned.student, batch)[0] < before


def test_the_teacher_learns_nothing_and_stays_attention() -> None:
    aligned = objective(output_errors)
    assert set(aligned.teacher.config.trans_points) == {None}
    aligned(aligned.student, packed_batch())[0].backward()
    assert all(parameter.grad is None for parameter in aligned.teacher.parameters())


def test_layers_that_do_not_switch_have_no_loss() -> None:
    aligned = objective(output_errors, (None, None, None))
    loss, _ = aligned(aligned.student, packed_batch())
    assert float(loss.detach()) == 0
    assert isinstance(aligned.student, TransMambaForCausalLM)
