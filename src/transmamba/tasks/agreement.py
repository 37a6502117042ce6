"""How near a student is to its teacher: the losses of both, KL divergence and the share of equal first choices.

All are taken on the same tokens in one pass; the teacher runs once for all schedules of the student.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel

from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.progress import progress_bar
from transmamba.schedule import TransPointSchedule
from transmamba.tasks.language_modeling import (
    LOGITS_AT_ONCE,
    Evaluation,
    Windows,
    chosen_windows,
    doubling_bins,
    evaluation_of,
    predicted_tokens,
    stack_windows,
)

__all__ = ["Agreement", "Comparison", "PositionAgreement", "StudentScore", "compare_language_models"]

LOGITS_OF_A_FORWARD = 1 << 28  # elements: 512 MiB in bf16; a model of transformers makes those of a whole batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionAgreement:
    """The means over `num_tokens` predictions made at positions start <= position < end."""

    start: int
    end: int
    kl: float
    top1: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How a student's predictions stand to its teacher's, over the token ids that both have.

    kl: KL(teacher || student), nats per predicted token. top1: share of tokens for which both name the same likeliest
    next one. by_position: in bins that double, empty ones left out.
    """

    kl: float
    top1: float
    num_tokens: int
    by_position: tuple[PositionAgreement, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentScore:
    """A student under one schedule. loss_difference: its loss less the teacher's, nats per token.

    standard_error: of loss_difference, from how it varies between windows; NaN where there is one window.
    """

    trans_points: tuple[int | None, ...] | None  # None for a student that is no TransMamba
    evaluation: Evaluation
    agreement: Agreement
    loss_difference: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The teacher's scores, and the student's for each schedule, in the order asked for."""

    teacher: Evaluation
    students: tuple[StudentScore, ...]


@torch.no_grad()
def compare_language_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    dataset: Windows,
    *,
    schedules: Sequence[Sequence[int | None]] | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Comparison:
    """Score a teacher and its student on packed windows, each in its own dtype, on its own device.

    schedules: the TransPoints that the student runs with, one after the other; None = its own. They are put back.
    vocab_size: token ids that are compared, those of the tokenizer: what lies beyond is padding, whose probability
        counts as lost in the losses and is left out of the agreement. None = all that both models have.
    batch_size, max_tokens: as in evaluate_language_model; fewer windows are read at a time where a model of
        transformers would make too many logits at once.

    Raises:
        InputError: nothing to predict, a number out of range, token ids that a model does not have, a model that
            cannot tell packed documents apart, or schedules for a student that has none.
    """
    indices = chosen_windows(dataset, batch_size, max_tokens)
    common = _common_ids(teacher, student, vocab_size)
    planned = _planned(student, schedules)
    seq_len = dataset[indices[0]]["input_ids"].shape[0]
    at_once = min(batch_size, *(_windows_at_once(model, seq_len) for model in (teacher, student)))
    teacher_sums, sums = _Sums(seq_len, len(indices)), [_Sums(seq_len, len(indices)) for _ in planned]
    counts = torch.zeros(seq_len, dtype=torch.int64)
    counts_of_windows = torch.zeros(len(indices), dtype=torch.int64)
    num_bytes = 0
    modes = [(model, model.training) for model in (teacher, student)]
    own = student.config.schedule if isinstance(student, TransMambaForCausalLM) else None
    teacher.eval(), student.eval()
    try:
        with progress_bar("Comparing", len(indices)) as advance:
            for start in range(0, len(indices), at_once):
                chosen = indices[start : start + at_once]
                batch = stack_windows(dataset, chosen)
                positions, windows = _add_batch(teacher, student, planned, batch, common, teacher_sums, sums, start)
                counts += torch.bincount(positions, minlength=seq_len)
                counts_of_windows += torch.bincount(windows + start, minlength=len(indices))
                num_bytes += sum(dataset.num_bytes(index) for index in chosen)
                advance(len(chosen))
    finally:
        for model, training in modes:
            model.train(training)
        if isinstance(student, TransMambaForCausalLM) and own is not None:
            student.set_trans_points(own)
    return Comparison(
        teacher=evaluation_of(teacher_sums.loss, counts, num_bytes),
        students=tuple(
            _score(schedule, entry, teacher_sums, counts, counts_of_windows, num_bytes)
            for schedule, entry in zip(planned, sums, strict=True)
        ),
    )


class _Sums:
    """Sums over tokens, by position (seq_len,) and by window (windows,), in fp64 on the CPU."""

    def __init__(self, seq_len: int, windows: int) -> None:
        self.loss, self.kl, self.agreed = (torch.zeros(seq_len, dtype=torch.float64) for _ in range(3))
        self.loss_of_windows = torch.zeros(windows, dtype=torch.float64)

    def add_losses(self, positions: Tensor, windows: Tensor, losses: Tensor) -> None:
        losses = losses.double().cpu()
        self.loss.index_add_(0, positions, losses)
        self.loss_of_windows.index_add_(0, windows, losses)

    def add_agreement(self, positions: Tensor, kl: Tensor, agreed: Tensor) -> None:
        self.kl.index_add_(0, positions, kl.double().cpu())
        self.agreed.index_add_(0, positions, agreed.double().cpu())


def _add_batch(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    schedules: Sequence[TransPointSchedule | None],
    batch: dict[str, Tensor],
    common: int,
    teacher_sums: _Sums,
    sums: Sequence[_Sums],
    first_window: int,
) -> tuple[Tensor, Tensor]:
    """Add a batch to the sums; return position and window of its predicted tokens.

    The vocabulary is gone through in pieces of tokens, so that memory holds hidden states of the batch and logits of a
    piece.
    """
    taught = predicted_tokens(teacher, batch)
    step = max(1, LOGITS_AT_ONCE // max(_vocab_size(teacher), _vocab_size(student)))
    for number, schedule in enumerate(schedules):
        if schedule is not None:
            assert isinstance(student, TransMambaForCausalLM)
            student.set_trans_points(schedule)
        learned = predicted_tokens(student, batch)
        for start in range(0, len(taught.targets), step):
            part = slice(start, start + step)
            positions, windows = taught.positions[part], taught.windows[part] + first_window
            expected, found = taught.logits_of(taught.rows[part]), learned.logits_of(learned.rows[part])
            if number == 0:
                losses = cross_entropy(expected, taught.targets[part], reduction="none")
                teacher_sums.add_losses(positions, windows, losses)
            losses = cross_entropy(found, learned.targets[part], reduction="none")
            sums[number].add_losses(positions, windows, losses)
            sums[number].add_agreement(positions, *_agreement(expected[:, :common], found[:, :common]))
    return taught.positions, taught.windows


def _agreement(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(expected || found) and whether the largest is the same, of logits (tokens, ids) each; both (tokens,)."""
    log_expected, log_found = log_softmax(expected, -1), log_softmax(found.to(expected.device), -1)
    kl = (log_expected.exp() * (log_expected - log_found)).sum(-1)
    return kl, log_expected.argmax(-1) == log_found.argmax(-1)


def _score(
    schedule: TransPointSchedule | None,
    sums: _Sums,
    teacher: _Sums,
    counts: Tensor,
    counts_of_windows: Tensor,
    num_bytes: int,
) -> StudentScore:
    evaluation = evaluation_of(sums.loss, counts, num_bytes)
    num_tokens = int(counts.sum())
    bins = []
    for start, end in doubling_bins(len(counts)):
        count = int(counts[start:end].sum())
        if count:
            kl, top1 = (float(x[start:end].sum()) / count for x in (sums.kl, sums.agreed))
            bins.append(PositionAgreement(start=start, end=end, kl=kl, top1=top1, num_tokens=count))
    difference = (float(sums.loss.sum()) - float(teacher.loss.sum())) / num_tokens
    return StudentScore(
        trans_points=None if schedule is None else tuple(schedule),
        evaluation=evaluation,
        agreement=Agreement(
            kl=float(sums.kl.sum()) / num_tokens,
            top1=float(sums.agreed.sum()) / num_tokens,
            num_tokens=num_tokens,
            by_position=tuple(bins),
        ),
        loss_difference=difference,
        standard_error=_standard_error(sums.loss_of_windows - teacher.loss_of_windows, counts_of_windows),
    )


def _standard_error(sums: Tensor, counts: Tensor) -> float:
    """Of the ratio of two totals over windows, sums / counts, both (windows,); linearised."""
    windows = len(sums)
    if windows < 2:
        return math.nan
    residuals = sums - sums.sum() / counts.sum() * counts
    return float((residuals.square().sum() * windows / (windows - 1)).sqrt() / counts.sum())


def _planned(
    student: PreTrainedModel, schedules: Sequence[Sequence[int | None]] | None
) -> list[TransPointSchedule | None]:
    if not isinstance(student, TransMambaForCausalLM):
        if schedules is not None:
            raise InputError(f"{type(student).__name__} has no schedules; leave them out, or give a TransMamba.")
        return [None]
    if schedules is None:
        return [student.config.schedule]
    if not schedules:
        raise InputError("schedules is empty; give at least one, or None for the student's own.")
    return [student.config.check_schedule(list(schedule)) for schedule in schedules]


def _common_ids(teacher: PreTrainedModel, student: PreTrainedModel, vocab_size: int | None) -> int:
    least = min(_vocab_size(teacher), _vocab_size(student))
    if vocab_size is None:
        return least
    if not 1 <= vocab_size <= least:
        raise InputError(
            f"vocab_size={vocab_size} must be between 1 and {least}: the teacher has {_vocab_size(teacher)} token ids "
            f"and the student {_vocab_size(student)}, and both must have what the tokenizer makes."
        )
    return vocab_size


def _windows_at_once(model: PreTrainedModel, seq_len: int) -> int:
    if isinstance(model, TransMambaForCausalLM):
        return 1 << 30  # its logits are made in pieces
    return max(1, LOGITS_OF_A_FORWARD // (seq_len * _vocab_size(model)))


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
