"""Agreement against logits that are held whole, and against a student that is its teacher."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from tests.conversion.checkpoints import VOCAB_SIZE, tiny_source
from transmamba.conversion import convert
from transmamba.data import PackedDataset, load_tokenizer, pack_documents
from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.tasks import Comparison, compare_language_models, evaluate_language_model

DOCUMENTS = ["a state space", "is ättention", "x", "that forgets nothing " * 5, "up to a point"]
SEQ_LEN = 24
SCHEDULE = [0, 5, None]


def windows(*, boundaries: bool = True) -> PackedDataset:
    tokenizer = load_tokenizer("bytes")
    return pack_documents(DOCUMENTS, tokenizer, SEQ_LEN, boundaries=boundaries, drop_last=False)


def teacher_of(name: str = "Llama", **changes: object) -> PreTrainedModel:
    return tiny_source(name, **changes).double()


def student_of(teacher: PreTrainedModel) -> TransMambaForCausalLM:
    student, _ = convert(teacher, schedule=SCHEDULE, initialisation="local")
    return student.double()


def whole_logits(model: PreTrainedModel, dataset: PackedDataset) -> Iterator[tuple[int, int, torch.Tensor, int]]:
    """(window, position, logits, next token) of every predicted token, one document's prefix at a time."""
    for index in range(len(dataset)):
        window = dataset[index]
        ids, labels, positions = (window[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        for place in range(1, dataset.seq_len):
            if labels[place] != -100:
                start = place - 1 - positions[place - 1]
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start:place]]), use_cache=False).logits[0, -1]
                yield index, positions[place - 1], logits, labels[place]


def test_scores_are_those_of_whole_logits() -> None:
    teacher = teacher_of()
    student = student_of(teacher)
    dataset = windows()
    found = compare_language_models(teacher, student, dataset, batch_size=3)
    rows = []
    for (window, position, expected, label), (_, _, actual, _) in zip(
        whole_logits(teacher, dataset), whole_logits(student, dataset), strict=True
    ):
        log_expected, log_actual = log_softmax(expected, -1), log_softmax(actual, -1)
        kl = kl_div(log_actual, log_expected, log_target=True, reduction="sum").item()
        agreed = int(expected.argmax() == actual.argmax())
        rows.append((window, position, kl, agreed, (log_expected[label] - log_actual[label]).item()))
    (score,) = found.students
    count = len(rows)
    # fp64 throughout: each number is exact to some 2^-45, and a token too many or too few moves it by 1 %.
    assert score.agreement.kl == pytest.approx(sum(row[2] for row in rows) / count, rel=1e-9)
    assert score.agreement.top1 == sum(row[3] for row in rows) / count
    assert 0 < score.agreement.top1 < 1
    assert score.loss_difference == pytest.approx(sum(row[4] for row in rows) / count, rel=1e-9)
    for part in score.agreement.by_position:
        inside = [row for row in rows if part.start <= row[1] < part.end]
        assert part.num_tokens == len(inside)
        assert part.kl == pytest.approx(sum(row[2] for row in inside) / len(inside), rel=1e-9)
        assert part.top1 == pytest.approx(sum(row[3] for row in inside) / len(inside), rel=1e-12)
    assert sum(part.num_tokens for part in score.agreement.by_position) == score.agreement.num_tokens == count

    sums, counts = ([0.0] * len(dataset) for _ in range(2))
    for window, _, _, _, difference in rows:
        sums[window] += difference
        counts[window] += 1
    mean, n = sum(sums) / sum(counts), len(dataset)
    residuals = [a - mean * b for a, b in zip(sums, counts, strict=True)]
    variance = sum(x * x for x in residuals) / (n - 1) * n / sum(counts) ** 2
    assert score.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_losses_are_those_of_an_evaluation() -> None:
    teacher = teacher_of()
    student = student_of(teacher)
    found = compare_language_models(teacher, student, windows(), schedules=[SCHEDULE, [0, 0, 0]])
    assert found.teacher.loss == pytest.approx(evaluate_language_model(teacher, windows()).loss, rel=1e-12)
    for score, schedule in zip(found.students, (SCHEDULE, [0, 0, 0]), strict=True):
        student.set_trans_points(schedule)
        expected = evaluate_language_model(student, windows())
        assert score.trans_points == tuple(schedule)
        assert score.evaluation.loss == pytest.approx(expected.loss, rel=1e-12)
        assert score.evaluation.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-12)
        assert score.evaluation.loss_by_position[-1].loss == pytest.approx(expected.loss_by_position[-1].loss)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "GPT-2"])
def test_a_student_that_never_switches_is_its_teacher(name: str) -> None:
    """On packed documents too: both must begin anew at each."""
    teacher = teacher_of(name)
    found = compare_language_models(teacher, student_of(teacher), windows(), schedules=[[None] * 3, SCHEDULE])
    exact, other = found.students
    # The sources' norms compute in fp32, whose spacing of 2^-23 a few layers make 1e-6 of; KL is of its square.
    assert abs(exact.agreement.kl) < 1e-12
    assert exact.agreement.top1 == 1
    assert abs(exact.loss_difference) < 1e-6
    assert other.agreement.kl > 0.01


def test_the_student_keeps_its_schedule_and_both_their_mode() -> None:
    teacher = teacher_of().train()
    student = student_of(teacher).eval()
    compare_language_models(teacher, student, windows(), schedules=[[None] * 3])
    assert student.config.trans_points == SCHEDULE
    assert (teacher.training, student.training) == (True, False)


def padded(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The model with a larger vocabulary, whose further entries are likelier than any other."""
    with torch.no_grad():
        model.resize_token_embeddings(size, mean_resizing=False)
        model.get_output_embeddings().weight[VOCAB_SIZE:] = 3 * model.get_output_embeddings().weight[65]
    return model


def test_padding_of_the_vocabulary_is_left_out() -> None:
    changes = {"tie_word_embeddings": False}
    teacher = teacher_of("Llama", **changes)
    student = student_of(teacher)
    plain = compare_language_models(teacher, student, windows()).students[0]
    wide = padded(teacher_of("Llama", **changes), 320)
    for taught, size in ((wide, None), (wide, VOCAB_SIZE)):
        found = compare_language_models(taught, student, windows(), vocab_size=size).students[0]
        assert found.agreement.kl == pytest.approx(plain.agreement.kl, rel=1e-9)
        assert found.agreement.top1 == plain.agreement.top1
    both = compare_language_models(wide, padded(student, 300), windows(), vocab_size=VOCAB_SIZE).students[0]
    assert both.agreement.kl == pytest.approx(plain.agreement.kl, rel=1e-9)
    seen = compare_language_models(wide, student_of(padded(teacher_of("Llama", **changes), 320)), windows()).students[0]
    assert abs(seen.agreement.kl - plain.agreement.kl) > 1e-3  # the padding would have been seen


def scores(found: Comparison) -> list[float]:
    return [number for s in found.students for number in (s.agreement.kl, s.loss_difference, s.standard_error)]


@pytest.mark.parametrize(
    "limit", ["tasks.agreement.LOGITS_AT_ONCE", "tasks.agreement.LOGITS_OF_A_FORWARD"], ids=["piece", "forward"]
)
def test_pieces_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    teacher = teacher_of()
    student = student_of(teacher)
    schedules = [SCHEDULE, [None, 0, 2]]
    expected = scores(compare_language_models(teacher, student, windows(), schedules=schedules))
    monkeypatch.setattr(f"transmamba.{limit}", 3 * VOCAB_SIZE)
    found = scores(compare_language_models(teacher, student, windows(), schedules=schedules, batch_size=4))
    assert found == pytest.approx(expected, rel=1e-10)


def test_logits_are_never_those_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = student_of(teacher_of())  # of ours, so that no forward makes logits
    student = student_of(teacher_of())
    monkeypatch.setattr("transmamba.tasks.agreement.LOGITS_AT_ONCE", 4 * VOCAB_SIZE)
    most = []
    for model in (teacher, student):
        model.lm_head.register_forward_hook(lambda module, inputs, output: most.append(output.numel()))
    compare_language_models(teacher, student, windows(), batch_size=7)
    assert max(most) == 4 * VOCAB_SIZE


def test_two_models_of_transformers_can_be_compared() -> None:
    found = compare_language_models(teacher_of(), teacher_of("Qwen2"), windows())
    assert found.students[0].trans_points is None
    assert found.students[0].agreement.kl > 0.1


def test_one_window_has_no_standard_error() -> None:
    teacher = teacher_of()
    found = compare_language_models(teacher, student_of(teacher), windows(), max_tokens=1)
    assert math.isnan(found.students[0].standard_error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 258}, "vocab_size=258 must be between 1 and 257"),
        ({"schedules": []}, "schedules is empty"),
        ({"schedules": [[0, 0]]}, "2 entries and the model 3 layers"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, object], message: str) -> None:
    teacher = teacher_of()
    with pytest.raises(ValueError, match=message):
        compare_language_models(teacher, student_of(teacher), windows(), **settings)


def test_schedules_are_for_students_that_have_them() -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no schedules"):
        compare_language_models(teacher_of(), teacher_of(), windows(), schedules=[SCHEDULE])
