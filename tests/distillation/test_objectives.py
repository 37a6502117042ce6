"""The last stage's objective and its online teacher."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from tests.conversion.checkpoints import SOURCES, tiny_source
from tests.distillation.students import packed_batch, pair
from tests.helpers import relative_rms_error
from transmamba.distillation import (
    AlignmentObjective,
    DenseTarget,
    GivenTarget,
    LogitObjective,
    OnlineTeacher,
    output_errors,
)
from transmamba.errors import InputError
from transmamba.modules import SSM_PARAMETERS


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "SmolLM3", "GPT-2"])
def test_a_student_with_every_trans_point_at_none_is_its_teacher(name: str) -> None:
    source, student = pair(name, (None, None, None))
    loss, metrics = LogitObjective(student, OnlineTeacher(source))(student, packed_batch())
    # fp32 logits of size about 10 that differ by 1e-5 of that: KL is of second order, and its sum rounds at 2^-24.
    assert abs(float(loss.detach())) < 1e-6
    assert float(metrics["ce"]) > 1


@pytest.mark.parametrize("boundaries", [False, True])
def test_the_loss_is_the_mean_over_predicted_tokens_of_full_logits(boundaries: bool) -> None:
    source, student = pair()
    batch = packed_batch(boundaries=boundaries)
    objective = LogitObjective(student, OnlineTeacher(source), temperature=2.0, kl_weight=0.7, ce_weight=0.3)
    loss, metrics = objective(student, batch)
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    counts, targets = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    with torch.no_grad():
        ours = student(**given, use_cache=False).logits[:, :-1][counts]
        theirs = source(**given, use_cache=False).logits[:, :-1][counts]
    kl = 4 * kl_div(log_softmax(ours / 2, -1), log_softmax(theirs / 2, -1), log_target=True, reduction="batchmean")
    ce = cross_entropy(ours, targets[counts])
    for found, exact in ((loss, 0.7 * kl + 0.3 * ce), (metrics["kl"], kl), (metrics["ce"], ce)):
        assert relative_rms_error(torch.as_tensor(found), exact) < 1e-5


def test_micro_batches_add_up_to_the_whole_step() -> None:
    source, student = pair()
    objective = LogitObjective(student, OnlineTeacher(source), ce_weight=1.0)
    batch = packed_batch()
    number = int((batch["labels"][:, 1:] != -100).sum())
    whole = objective(student, {**batch, "num_items_in_batch": number})[0]
    halves = [{name: x[row : row + 1] for name, x in batch.items()} for row in (0, 1)]
    added = sum(objective(student, {**half, "num_items_in_batch": number})[0] for half in halves)
    assert relative_rms_error(torch.as_tensor(added), whole) < 1e-6


@pytest.mark.parametrize("kind", ["logits", "mixers"])
def test_a_step_in_which_no_layer_switches_leaves_the_state_space_as_it_was(kind: str) -> None:
    source, student = pair(schedule=(None, 24, 30))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.rpartition(".mixer.")[2] in SSM_PARAMETERS)
    if kind == "logits":
        objective: Any = LogitObjective(student, OnlineTeacher(source))
    else:
        objective = AlignmentObjective(student, pair()[1], output_errors)
    loss, _ = objective(student, packed_batch())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert not objective(student, packed_batch())[0].requires_grad


@pytest.mark.parametrize("name", list(SOURCES))
def test_plain_heads_are_found_in_every_family(name: str) -> None:
    assert OnlineTeacher(tiny_source(name)).head is not None


def test_a_teacher_whose_logits_are_more_than_its_head_is_asked_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, student = pair()
    forward = type(source).forward

    def capped(self: PreTrainedModel, position_ids: Any = None, **kwargs: Any) -> Any:
        outputs = forward(self, position_ids=position_ids, **kwargs)
        outputs.logits = 5 * torch.tanh(outputs.logits / 5)
        return outputs

    plain = OnlineTeacher(source)
    monkeypatch.setattr(type(source), "forward", capped)
    teacher = OnlineTeacher(source)
    assert teacher.head is None
    batch = packed_batch()
    counts = batch["labels"] != -100
    assert isinstance(plain.target(batch, counts), DenseTarget)
    target = teacher.target(batch, counts)
    assert isinstance(target, GivenTarget)
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    exact = capped(source, **given, use_cache=False).logits[counts]
    assert relative_rms_error(target.all_logits, exact) < 1e-6
    assert float(LogitObjective(student, teacher)(student, batch)[0].detach()) > 0


def test_a_teacher_without_positions_cannot_read_packed_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = pair()
    forward = type(source).forward
    monkeypatch.setattr(
        type(source),
        "forward",
        lambda self, input_ids=None, use_cache=None: forward(self, input_ids=input_ids, use_cache=use_cache),
    )
    teacher = OnlineTeacher(source)
    packed, whole = packed_batch(), packed_batch(boundaries=False)
    with pytest.raises(InputError, match=r"takes no position_ids.*document_boundaries=false"):
        teacher.target(packed, packed["labels"] != -100)
    assert len(teacher.target(whole, whole["labels"] != -100)) == 46


def test_the_teacher_is_frozen_and_gets_no_gradient() -> None:
    source, student = pair()
    LogitObjective(student, OnlineTeacher(source))(student, packed_batch())[0].backward()
    assert not any(parameter.requires_grad for parameter in source.parameters())
    assert student.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("capped", [False, True])
def test_a_padded_head_says_nothing_of_its_padding(capped: bool) -> None:
    source, _ = pair()
    teacher = OnlineTeacher(source, vocab_size=200)
    if capped:
        teacher.head = None
    batch = packed_batch()
    target = teacher.target(batch, batch["labels"] != -100)
    assert target.logits(slice(0, 3)).shape == (3, 200)
