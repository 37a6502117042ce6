"""Measuring students of tiny random teachers, and one of a real teacher."""

import lzma
from dataclasses import replace
from math import exp, log
from pathlib import Path

import pytest
import torch

from tests.conversion.checkpoints import save_source, tiny_source, tiny_tokenizer
from tests.helpers import data_folder
from transmamba.conversion import convert, convert_checkpoint
from transmamba.data import TextSource, load_tokenizer, pack_documents
from transmamba.errors import InputError, RecipeError, TransMambaError
from transmamba.recipes import ReportSettings, measure_student, report_student
from transmamba.report import StudentReport

TEXT = "Every layer has its own TransPoint, and what stands before it is read by attention. " * 40
SETTINGS = ReportSettings(
    text=TextSource(source="", validation_share=0),
    seq_len=64,
    eval_tokens=256,
    batch_size=3,
    schedules=3,
    recall_lengths=(120,),
    recall_prompts=5,
    recall_choices=2,
    speed_lengths=(16, 40),
    speed_repeats=1,
    decode_steps=2,
)
SCHEDULE = [0, 9, None]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, ReportSettings]:
    """Student, teacher, and settings with a text."""
    teacher = save_source(tiny_source("Llama"), tmp_path / "teacher")
    convert_checkpoint(teacher, tmp_path / "student", schedule=SCHEDULE, initialisation="local")
    (tmp_path / "text.txt").write_text(TEXT)
    settings = replace(SETTINGS, text=TextSource(source=str(tmp_path / "text.txt"), validation_share=0))
    return tmp_path / "student", teacher, settings


def test_a_report_is_written_and_is_what_was_measured(folders, tmp_path: Path) -> None:
    student, teacher, settings = folders
    report = report_student(student, teacher, output=tmp_path / "out", settings=settings, device="cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["student_report.html", "student_report.json"]
    assert StudentReport.from_json((tmp_path / "out" / "student_report.json").read_text()) == report
    measured = report.measured
    assert (measured.seq_len, measured.own.trans_points) == (64, SCHEDULE)
    own, _, attention = measured.schedules
    assert attention.trans_points == [None] * 3
    # fp32, where two forms of one function differ by 1e-6.
    assert abs(attention.loss_difference) < 1e-4
    assert attention.kl < 1e-6
    assert attention.top1 == 1
    assert own.kl > 0.01
    assert own.loss_difference == pytest.approx(measured.student.nats_per_token - measured.teacher.nats_per_token)
    for model in (measured.teacher, measured.student):
        assert {(row.task, row.length, row.count, row.chance) for row in model.recall} == {
            ("needle", 120, 5, 0.5),
            ("phone-book", 120, 5, 0.5),
        }
        assert len({row.depth for row in model.recall_by_depth}) == 5
        assert [row.length for row in model.speed] == [16, 40]
    assert (measured.teacher.kind, measured.teacher.trans_points) == ("llama", None)
    ratio = exp(measured.student.nats_per_token - measured.teacher.nats_per_token)
    assert f"{ratio:.2f} times its teacher" in (tmp_path / "out" / "student_report.html").read_text()


def test_the_page_can_be_named(folders, tmp_path: Path) -> None:
    student, teacher, settings = folders
    little = replace(settings, schedules=1, recall_prompts=0, speed_repeats=0)
    report = report_student(student, teacher, output=tmp_path / "new" / "a.html", settings=little, device="cpu")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.html", "a.json"]
    assert (report.measured.tasks, report.measured.student.speed, len(report.measured.schedules)) == ([], (), 1)


def test_a_student_that_has_not_moved_keeps_everything(folders, tmp_path: Path) -> None:
    _, teacher, settings = folders
    convert_checkpoint(teacher, tmp_path / "same", initialisation="local")
    report = report_student(tmp_path / "same", teacher, output=tmp_path / "out", settings=settings, device="cpu")
    assert len(report.measured.schedules) == 1
    kept = " ".join(report.measured.findings().kept)
    assert "Perplexity is the teacher's: 1.000 times" in kept
    assert "For 100 % of tokens" in kept
    pairs = zip(report.measured.teacher.recall, report.measured.student.recall, strict=True)
    assert all(theirs.loss == pytest.approx(ours.loss, rel=1e-4) for theirs, ours in pairs)


def test_models_in_memory_are_measured() -> None:
    teacher = tiny_source("GPT-2")
    student, _ = convert(teacher, schedule=SCHEDULE, initialisation="local")
    tokenizer = tiny_tokenizer()
    windows = pack_documents([TEXT], tokenizer, 32)
    settings = replace(SETTINGS, recall_lengths=(), speed_lengths=())
    measured = measure_student(teacher, student.train(), tokenizer, windows, hay=[TEXT], settings=settings)
    assert student.training
    assert student.config.trans_points == SCHEDULE
    assert measured.tasks == []  # no fact fits into 32 tokens
    # 4 * 32 would be beyond GPT-2's 128 positions with the steps of decoding.
    assert [row.length for row in measured.student.speed] == [8, 32]
    assert not measure_student(teacher, student, tokenizer, windows, settings=settings).tasks


def test_a_longer_vocabulary_of_the_teacher_is_padding(folders, tmp_path: Path) -> None:
    student, teacher, settings = folders
    little = replace(settings, recall_prompts=0, speed_repeats=0)
    plain = report_student(student, teacher, output=tmp_path / "plain", settings=little, device="cpu").measured
    model = tiny_source("Llama")
    model.resize_token_embeddings(320, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[257:] = 5.0
    wide = report_student(
        student, save_source(model, tmp_path / "wide"), output=tmp_path / "out", settings=little, device="cpu"
    ).measured
    assert wide.own.kl == pytest.approx(plain.own.kl, rel=1e-3)
    assert wide.own.top1 == plain.own.top1


def test_other_tokenizers_are_refused(folders, tmp_path: Path) -> None:
    student, _, settings = folders
    other = tiny_source("Llama")
    other.save_pretrained(tmp_path / "other")
    load_tokenizer("bytes").save_pretrained(tmp_path / "other")  # another order of the same bytes
    with pytest.raises(InputError, match=r"vocabularies differ: id \d+ is .* in the teacher's and .* in the student's"):
        report_student(student, tmp_path / "other", output=tmp_path / "out", settings=settings, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 129}, "seq_len=129 is longer than the 128 positions of the teacher"),
        ({"recall_lengths": (30,)}, "length=30 is too short for needle prompts"),
        ({"text": TextSource(source="absent.txt")}, "absent.txt"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    folders, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    student, teacher, settings = folders
    with pytest.raises(TransMambaError, match=message):
        report_student(student, teacher, output=tmp_path / "out", settings=replace(settings, **changes), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed_lengths": (127,)}, "the models can read at most 126 tokens"),
        ({"recall_lengths": (128,)}, "the models can read at most 112 tokens and an answer"),
    ],
)
def test_learned_positions_have_an_end(changes: dict[str, object], message: str) -> None:
    teacher = tiny_source("GPT-2")
    student, _ = convert(teacher, schedule=SCHEDULE, initialisation="local")
    windows = pack_documents([TEXT], tiny_tokenizer(), 32)
    with pytest.raises(RecipeError, match=message):
        measure_student(teacher, student, tiny_tokenizer(), windows, hay=[TEXT], settings=replace(SETTINGS, **changes))


def test_an_output_that_cannot_be_written_is_refused_first(folders, tmp_path: Path) -> None:
    student, teacher, settings = folders
    (tmp_path / "folder.html").mkdir()
    for output, message in ((tmp_path / "text.txt", "is a file"), (tmp_path / "folder.html", "is a folder")):
        with pytest.raises(RecipeError, match=message):
            report_student(student, teacher, output=output, settings=settings, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": 0}, "schedules=0 must be at least 1"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"recall_choices": 1}, "recall_choices=1 must be at least 2"),
        ({"recall_lengths": (0.5,)}, "recall_lengths="),
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of auto, float32"),
    ],
)
def test_settings_check_themselves(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ReportSettings(**changes)


def test_lengths_are_whole_numbers_in_order() -> None:
    assert ReportSettings(recall_lengths=(512.0, 64.0, 512.0)).recall_lengths == (64, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_memory_is_counted_and_attention_is_the_teacher(folders, tmp_path: Path, dtype: str) -> None:
    student, teacher, settings = folders
    settings = replace(settings, dtype=dtype)
    measured = report_student(student, teacher, output=tmp_path / "out", settings=settings, device="cuda").measured
    for model in (measured.teacher, measured.student):
        assert all(row.peak_bytes is not None and row.peak_bytes > row.cache_bytes for row in model.speed)
    # A bf16 logit is off by 2^-9 of itself, and these are of the order of 10; KL is of the square.
    assert abs(measured.schedules[-1].kl) < (1e-5 if dtype == "float32" else 1e-2)
    assert measured.own.kl > 0.01


@pytest.mark.data
def test_a_real_teacher_is_kept_at_none_and_recalls(tmp_path: Path) -> None:
    """A state space that was never distilled loses what the teacher knows; attention throughout loses nothing."""
    teacher = data_folder() / "teachers" / "llama_wiki_31m"
    with lzma.open(data_folder() / "text" / "wiki_en_valid.txt.xz", "rt", encoding="utf-8") as file:
        (tmp_path / "valid.txt").write_text(file.read(100_000), encoding="utf-8")
    convert_checkpoint(teacher, tmp_path / "student", schedule="v9", seq_len=256, initialisation="local")
    settings = replace(
        SETTINGS,
        text=TextSource(source=str(tmp_path / "valid.txt"), validation_share=0),
        seq_len=256,
        eval_tokens=1024,
        recall_lengths=(128,),
        recall_prompts=10,
        recall_choices=8,
        speed_repeats=0,
    )
    report = report_student(tmp_path / "student", teacher, output=tmp_path / "out", settings=settings, device="cpu")
    measured = report.measured
    own, middle, attention = measured.schedules
    assert abs(attention.loss_difference) < 1e-4
    assert attention.top1 > 0.995
    assert own.loss_difference > middle.loss_difference > log(1.1)
    needle = measured.teacher.recalled("needle")
    assert needle is not None
    assert needle.chosen >= 0.4  # guessing gives 0.125; 4 of 10 or more by accident once in 40
    assert "It costs" in (tmp_path / "out" / "student_report.html").read_text()
