"""Measuring a student against its teacher: the whole of `transmamba report`, and its middle for models in memory."""

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transmamba._version import __version__
from transmamba.compatibility import check_same_encoding, common_vocabulary
from transmamba.data import (
    RECALL_TASKS,
    PackedDataset,
    RecallPrompt,
    TextSource,
    load_documents,
    pack_documents,
    recall_prompts,
    shortest_recall,
)
from transmamba.errors import RecipeError
from transmamba.inference import load_checkpoint, load_language_model, measure_speed, resolve_device
from transmamba.models import TransMambaForCausalLM
from transmamba.report import (
    AgreementRow,
    MeasuredModel,
    MeasuredSchedule,
    RecallRow,
    SpeedRow,
    StudentMeasurements,
    StudentReport,
)
from transmamba.schedule import TransPointSchedule
from transmamba.tasks import Evaluation, StudentScore, compare_language_models, mean_recall, score_recall

__all__ = ["ReportSettings", "measure_student", "report_student"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
PAGE, NUMBERS = "student_report.html", "student_report.json"
ANSWER_ROOM = 16  # tokens; the longest answer of a recall prompt has 11 bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSettings:
    """How much a report measures. Lengths are in tokens, counts of windows and prompts are per model.

    text: what quality is measured on, all of it or eval_tokens, and what facts are hidden in.
    seq_len: of the windows; None = the positions of the student, or the teacher's where they are fewer.
    eval_tokens: read no more windows than hold so many, evenly spread over the text; None reads all.
    batch_size: windows, and recall prompts, at a time.
    schedules: how many the student runs with, from its own to attention throughout; 1 = its own only.
    recall_lengths: contexts; empty = an eighth, a quarter, half of seq_len, and seq_len, where facts fit in.
    recall_prompts: per task and context, at five depths in turn; 0 leaves recall out.
    recall_choices: answers to choose from.
    speed_lengths: contexts; empty = a quarter of seq_len, seq_len, and 4 times seq_len where the models can.
    speed_batch_size: sequences at a time. speed_repeats: 0 leaves speed and memory out.
    dtype: of both models: "auto" is float32 on a CPU and bfloat16 on a GPU that has it.
    """

    text: TextSource = field(default_factory=lambda: TextSource(source="builtin:python-docs", validation_share=0))
    seq_len: int | None = None
    eval_tokens: int | None = 65_536
    batch_size: int = 8
    schedules: int = 5
    recall_lengths: tuple[int, ...] = ()
    recall_prompts: int = 20
    recall_choices: int = 8
    speed_lengths: tuple[int, ...] = ()
    speed_batch_size: int = 1
    speed_repeats: int = 3
    decode_steps: int = 16
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("recall_lengths", "speed_lengths"):
            lengths = getattr(self, name)
            if any(length != int(length) or length < 1 for length in lengths):
                raise RecipeError(f"{name}={lengths} must be whole numbers of tokens, each at least 1.")
            object.__setattr__(self, name, tuple(sorted({int(length) for length in lengths})))
        for name in ("batch_size", "schedules", "speed_batch_size", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} must be at least 1.")
        for name, least in (
            ("seq_len", 2),
            ("decode_steps", 2),
            ("recall_choices", 2),
            ("recall_prompts", 0),
            ("speed_repeats", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}={value} must be at least {least}.")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")


def report_student(
    student: Path | str,
    teacher: Path | str,
    *,
    output: Path,
    settings: ReportSettings | None = None,
    device: str = "auto",
) -> StudentReport:
    """Measure a student against its teacher and write the page and its numbers.

    student: a folder that `transmamba convert` wrote, or any TransMamba. teacher: the folder or Hugging Face id of any
    causal language model with the same tokenizer. output: a folder, which gets student_report.html and .json, or the
    name of the .html file, beside which the .json is put.

    Raises:
        CheckpointError: a model is missing or damaged.
        InputError: the two have different tokenizers.
        CorpusError: the text cannot be read or is too little.
        RecipeError, InputError: a setting does not fit the models.
    """
    settings = settings or ReportSettings()
    began = time.monotonic()
    page, numbers = _output_files(output)
    chosen = resolve_device(device)
    dtype = _dtype(settings.dtype, chosen)
    student_model, tokenizer = load_checkpoint(student, device=chosen, dtype=dtype)
    teacher_model, teacher_tokenizer = load_language_model(teacher, device=chosen, dtype=dtype)
    documents = load_documents(settings.text).train
    common_vocabulary(teacher_tokenizer, teacher_model.config, tokenizer, student_model.config)
    check_same_encoding(teacher_tokenizer, tokenizer, documents)
    seq_len = _seq_len(settings, teacher_model, student_model)
    windows = pack_documents(documents, tokenizer, seq_len, drop_last=False)
    measured = measure_student(teacher_model, student_model, tokenizer, windows, hay=documents, settings=settings)
    report = StudentReport(
        student=str(student),
        teacher=str(teacher),
        text=settings.text.source,
        measured=measured,
        settings=_described(settings, seq_len, dtype),
        versions={
            "transmamba": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
        device=_device_name(chosen),
        command=shlex.join(["transmamba", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=time.monotonic() - began,
    )
    report.write_json(numbers)
    report.write_html(page)
    return report


def measure_student(
    teacher: PreTrainedModel,
    student: TransMambaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    windows: PackedDataset,
    *,
    hay: Sequence[str] = (),
    settings: ReportSettings | None = None,
) -> StudentMeasurements:
    """Measure two models in memory, each in its own dtype on its own device; the student keeps its schedule.

    windows: text that neither was trained on, under the tokenizer of both; its seq_len is the one that counts. hay:
    texts to hide facts in; without any, recall is left out. settings: text, seq_len and dtype are not read.
    """
    settings = settings or ReportSettings()
    seq_len = windows.seq_len
    lengths = _speed_lengths(settings, seq_len, teacher, student)
    prompts = _recall_prompts(settings, seq_len, teacher, student, tokenizer, hay)
    own = student.config.schedule
    comparison = compare_language_models(
        teacher,
        student,
        windows,
        schedules=_family(own, settings.schedules, seq_len),
        batch_size=settings.batch_size,
        max_tokens=settings.eval_tokens,
        vocab_size=len(windows.byte_lengths),
    )
    score = comparison.students[0]
    return StudentMeasurements(
        seq_len=seq_len,
        num_tokens=comparison.teacher.num_tokens,
        teacher=_measured_model(teacher, comparison.teacher, prompts, lengths, settings),
        student=_measured_model(student, score.evaluation, prompts, lengths, settings),
        schedules=tuple(_measured_schedule(entry, seq_len) for entry in comparison.students),
        agreement=tuple(AgreementRow(**asdict(row)) for row in score.agreement.by_position),
    )


def _output_files(output: Path) -> tuple[Path, Path]:
    page = output if output.suffix.lower() in (".html", ".htm") else output / PAGE
    numbers = page.with_suffix(".json") if page is output else output / NUMBERS
    for path in (page, numbers):
        if path.is_dir():
            raise RecipeError(f"output={str(output)!r}: {path} is a folder; give another --output.")
    for folder in page.parents:
        if folder.exists():
            if not folder.is_dir():
                raise RecipeError(f"output={str(output)!r}: {folder} is a file, not a folder; give another --output.")
            break
    return page, numbers


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _positions(model: PreTrainedModel) -> int | None:
    """How many positions a model was made for; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _most_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model can run at all: those it learned. None where a formula gives more."""
    config = model.config.get_text_config()
    is_rotary = (
        config.position_embedding == "rotary"
        if isinstance(model, TransMambaForCausalLM)
        else getattr(config, "rope_parameters", None) is not None
    )
    return None if is_rotary else _positions(model)


def _seq_len(settings: ReportSettings, teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    for role, model in (("teacher", teacher), ("student", student)):
        positions = _positions(model)
        if settings.seq_len is not None and positions is not None and settings.seq_len > positions:
            raise RecipeError(
                f"seq_len={settings.seq_len} is longer than the {positions} positions of the {role}, beyond which it "
                f"was never trained; give at most {positions}."
            )
    known = [positions for model in (teacher, student) if (positions := _positions(model)) is not None]
    return settings.seq_len or min(known)


def _limit(teacher: PreTrainedModel, student: PreTrainedModel) -> int | None:
    most = [positions for model in (teacher, student) if (positions := _most_positions(model)) is not None]
    return min(most, default=None)


def _speed_lengths(
    settings: ReportSettings, seq_len: int, teacher: PreTrainedModel, student: PreTrainedModel
) -> tuple[int, ...]:
    if not settings.speed_repeats:
        return ()
    limit = _limit(teacher, student)
    if limit is not None:
        limit -= settings.decode_steps
    wanted = settings.speed_lengths or tuple(sorted({max(1, seq_len // 4), seq_len, 4 * seq_len}))
    fitting = tuple(length for length in wanted if limit is None or length <= limit)
    if fitting != wanted and settings.speed_lengths:
        raise RecipeError(
            f"speed_lengths={settings.speed_lengths}: with decode_steps={settings.decode_steps} the models can read at "
            f"most {limit} tokens; leave the longer ones out."
        )
    return fitting


def _recall_prompts(
    settings: ReportSettings,
    seq_len: int,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    hay: Sequence[str],
) -> list[RecallPrompt]:
    if not settings.recall_prompts or not hay:
        return []
    limit = _limit(teacher, student)
    if limit is not None:
        limit -= ANSWER_ROOM
    if settings.recall_lengths and limit is not None and max(settings.recall_lengths) > limit:
        raise RecipeError(
            f"recall_lengths={settings.recall_lengths}: the models can read at most {limit} tokens and an answer; "
            "leave the longer ones out."
        )
    usual = sorted({min(seq_len // part, limit or seq_len) for part in (8, 4, 2, 1)})
    prompts = []
    for task in RECALL_TASKS:
        count, num_choices = settings.recall_prompts, settings.recall_choices
        shortest = shortest_recall(task, tokenizer, count=count, num_choices=num_choices, seed=settings.seed)
        for length in settings.recall_lengths or [length for length in usual if length >= shortest]:
            prompts += recall_prompts(
                task, tokenizer, hay, length=length, count=count, num_choices=num_choices, seed=settings.seed
            )
    return prompts


def _family(own: TransPointSchedule, count: int, seq_len: int) -> list[TransPointSchedule]:
    """Schedules from the student's own to attention throughout, each once."""
    attention = TransPointSchedule([None] * len(own))
    return list(dict.fromkeys(own.between(attention, count, seq_len) if count > 1 else [own]))


def _measured_model(
    model: PreTrainedModel,
    evaluation: Evaluation,
    prompts: Sequence[RecallPrompt],
    lengths: Sequence[int],
    settings: ReportSettings,
) -> MeasuredModel:
    outcomes = score_recall(model, prompts, batch_size=settings.batch_size)
    points = (
        measure_speed(
            model,
            lengths,
            batch_size=settings.speed_batch_size,
            decode_steps=settings.decode_steps,
            repeats=settings.speed_repeats,
            seed=settings.seed,
        )
        if lengths
        else []
    )
    is_ours = isinstance(model, TransMambaForCausalLM)
    return MeasuredModel(
        kind=model.config.model_type,
        trans_points=model.config.schedule if is_ours else None,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        nats_per_token=evaluation.loss,
        bits_per_byte=evaluation.bits_per_byte,
        loss_by_position=tuple(((row.start + row.end - 1) / 2, row.loss) for row in evaluation.loss_by_position),
        recall=tuple(RecallRow(**asdict(row)) for row in mean_recall(outcomes)),
        recall_by_depth=tuple(RecallRow(**asdict(row)) for row in mean_recall(outcomes, by_depth=True)),
        speed=tuple(SpeedRow(**asdict(point)) for point in points),
    )


def _measured_schedule(score: StudentScore, seq_len: int) -> MeasuredSchedule:
    assert score.trans_points is not None
    schedule = TransPointSchedule(score.trans_points)
    return MeasuredSchedule(
        trans_points=schedule,
        attention_share=schedule.attention_share(seq_len),
        nats_per_token=score.evaluation.loss,
        bits_per_byte=score.evaluation.bits_per_byte,
        loss_difference=score.loss_difference,
        standard_error=score.standard_error,
        kl=score.agreement.kl,
        top1=score.agreement.top1,
    )


def _described(settings: ReportSettings, seq_len: int, dtype: torch.dtype) -> dict[str, str]:
    """The settings as they were used, without the text, which has a line of its own."""
    used = {"seq_len": seq_len, "dtype": str(dtype).removeprefix("torch.")}
    names = [entry.name for entry in fields(settings) if entry.name != "text"]
    return {name: _words(used.get(name, getattr(settings, name))) for name in names}


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "as seq_len has it"
    return "all" if value is None else str(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"
