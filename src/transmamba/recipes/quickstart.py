"""The quickstart: a small Transformer learns Python's documentation, is converted, and distilled to V9.

Everything that a user would do with a checkpoint of their own, with the same functions: `train_language_model`,
`convert_checkpoint`, `distil`, `measure_student`. A folder of a quickstart holds
    report.html     the page to look at; report.json its numbers
    corpus/         the documents, and the tokenizer trained on them
    teacher/        the run of the Transformer, a Llama of transformers
    converted/      the TransMamba that `transmamba convert` makes of it, with conversion.json
    student/        the run of its distillation
"""

import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from transmamba._version import __version__
from transmamba.conversion import convert_checkpoint
from transmamba.data import Documents, TextSource, load_documents, load_tokenizer, pack_documents
from transmamba.inference import continue_prompt, load_checkpoint, resolve_device
from transmamba.progress import without_progress_bars
from transmamba.recipes.carry_out import TrainedModel, train_language_model
from transmamba.recipes.distil import DistilledModel, distil
from transmamba.recipes.distillation import DistillationRun, descend
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings
from transmamba.recipes.run_folder import claim_folder
from transmamba.recipes.student_report import ReportSettings, measure_student
from transmamba.report import CrossedSample, QuickstartReport, StudentMeasurements

__all__ = ["QuickstartSize", "quickstart_student", "quickstart_teacher", "run_quickstart"]

SCHEDULE = "v9"
PROMPTS = ("The file object returned by this method", "If an exception is raised,")
MARKER = ".transmamba-quickstart"


@dataclass(frozen=True, kw_only=True)
class QuickstartSize:
    """How much the quickstart does.

    teacher_tokens, student_tokens: read in training and in distillation. eval_tokens: of the validation documents, None
    = all. lengths: contexts at which speed is measured. recall_prompts: per task and context.
    """

    teacher_tokens: int
    student_tokens: int
    seq_len: int = 256
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 8
    vocab_size: int = 2048
    eval_tokens: int | None = 32_768
    schedules: int = 5
    lengths: tuple[int, ...] = (256, 1024, 4096)
    recall_prompts: int = 20
    new_tokens: int = 240


FULL = QuickstartSize(teacher_tokens=1_000_000, student_tokens=250_000)
# Every step of it, for tests: the numbers mean nothing.
SMOKE = QuickstartSize(
    teacher_tokens=8_192,
    student_tokens=10_240,
    eval_tokens=2_048,
    schedules=3,
    lengths=(64, 512),
    recall_prompts=1,
    new_tokens=80,
)


def run_quickstart(
    output: Path, *, size: QuickstartSize = FULL, seed: int = 0, device: str = "cpu"
) -> QuickstartReport:
    """Train, convert, distil and measure; write everything into `output`, which must be new or an earlier quickstart's
    (then replaced).

    Two runs with one seed on one CPU give the same losses.

    Raises:
        RecipeError: the folder holds something else.
    """
    began = time.monotonic()
    chosen = resolve_device(device)
    claim_folder(output, MARKER)
    corpus = output / "corpus"
    documents = load_documents(TextSource(source="builtin:python-docs"))
    source = _write_corpus(documents, corpus)
    tokenizer = load_tokenizer(f"train:{size.vocab_size}", documents.train)
    tokenizer.save_pretrained(corpus / "tokenizer")

    with without_progress_bars():
        run = quickstart_teacher(size, source, str(corpus / "tokenizer"), seed=seed, output=str(output / "teacher"))
        teacher = train_language_model(run, device=device, description="Transformer")
        torch.manual_seed(seed)  # the conversion is checked on random tokens
        conversion = convert_checkpoint(
            teacher.model_folder,
            output / "converted",
            schedule=SCHEDULE,
            seq_len=size.seq_len,
            texts=documents.train,
            device=chosen,
        )
        distillation = quickstart_student(
            size,
            source,
            teacher=str(teacher.model_folder),
            student=str(conversion.folder),
            seed=seed,
            output=str(output / "student"),
        )
        student = distil(distillation, device=device)
    converted, untrained, distilled = _measured(
        teacher, conversion.folder, student, documents.validation, size, seed, chosen
    )
    report = QuickstartReport(
        schedule=SCHEDULE.upper(),
        converted=converted,
        untrained=untrained,
        distilled=distilled,
        difference=conversion.difference,
        training=tuple((row.tokens, row.seconds, row.loss) for row in teacher.history.training),
        distillation=_distillation_curve(student),
        samples=tuple(_sample(student, prompt, size, seed + number) for number, prompt in enumerate(PROMPTS)),
        corpus=_describe(documents),
        settings=_settings(size, run, distillation, conversion.plan.initialisation),
        versions={
            "transmamba": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
            "machine": f"{platform.machine()}, {chosen.type}, {torch.get_num_threads()} threads",
        },
        seed=seed,
        command=shlex.join(["transmamba", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=time.monotonic() - began,
    )
    report.write_json(output / "report.json")
    report.write_html(output / "report.html")
    return report


def quickstart_teacher(
    size: QuickstartSize, source: TextSource, tokenizer: str, *, seed: int, output: str
) -> LanguageModelRun:
    """The run that trains the Transformer."""
    return LanguageModelRun(
        name="teacher",
        model=ModelSettings(
            architecture="llama",
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=4,
            rope_theta=100.0,  # windows are short
        ),
        text=source,
        schedule="transformer",
        tokenizer=tokenizer,
        seq_len=size.seq_len,
        batch_size=4,
        max_tokens=size.teacher_tokens,
        learning_rate=4e-3,
        min_learning_rate_ratio=0.05,
        warmup_steps=50,
        log_every=5,
        keep_checkpoints=1,
        dtype="float32",
        seed=seed,
        output=output,
    )


def quickstart_student(
    size: QuickstartSize, source: TextSource, *, teacher: str, student: str, seed: int, output: str
) -> DistillationRun:
    """The run that distils it: the recipe `descend`, for a model a twentieth of the size it was made for.

    Only what the state space alone reads is trained, so that attention stays the teacher's and every schedule up to it
    can be used; and without the cross-entropy of `descend`: after so little training a student that also learns from
    the text overtakes its teacher, and what switching costs would not be seen.
    """
    recipe = descend()
    return replace(
        recipe,
        name="student",
        text=source,
        teacher=teacher,
        student=student,
        seq_len=size.seq_len,
        batch_size=4,
        max_tokens=size.student_tokens,
        mixers=replace(recipe.mixers, share=0.1),
        logits=replace(
            recipe.logits,
            learning_rate=4e-3,
            ce_weight=0.0,
            trainable="ssm",
        ),
        log_every=5,
        save_every=None,
        keep_checkpoints=1,
        dtype="float32",
        seed=seed,
        output=output,
    )


def _write_corpus(documents: Documents, folder: Path) -> TextSource:
    """Keep the documents for both runs: reading the standard library takes seconds."""
    folder.mkdir()
    for name, texts in (("train", documents.train), ("validation", documents.validation)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return TextSource(source=str(folder / "train.jsonl"), validation_source=str(folder / "validation.jsonl"))


def _measured(
    teacher: TrainedModel,
    converted: Path,
    student: DistilledModel,
    texts: list[str],
    size: QuickstartSize,
    seed: int,
    device: torch.device,
) -> tuple[StudentMeasurements, StudentMeasurements, StudentMeasurements]:
    """The student with no layer switching, switched but untrained, and distilled."""
    windows = pack_documents(texts, teacher.tokenizer, size.seq_len, drop_last=False)
    settings = ReportSettings(
        eval_tokens=size.eval_tokens,
        schedules=size.schedules,
        recall_prompts=size.recall_prompts,
        speed_lengths=size.lengths,
        seed=seed,
    )
    little = replace(settings, schedules=1, recall_prompts=0, speed_lengths=(max(size.lengths),))
    model, _ = load_checkpoint(converted, device=device)
    untrained = measure_student(teacher.model, model, teacher.tokenizer, windows, settings=little)
    model.set_trans_points("transformer")
    same = measure_student(teacher.model, model, teacher.tokenizer, windows, settings=little)
    distilled = measure_student(teacher.model, student.model, teacher.tokenizer, windows, hay=texts, settings=settings)
    return same, untrained, distilled


def _distillation_curve(student: DistilledModel) -> tuple[tuple[int, float, float], ...]:
    """KL(teacher || student) over the last stage; what the stages before it read and took is counted first."""
    before = [history for name, history in student.histories.items() if name != "logits"]
    tokens, seconds = sum(history.tokens for history in before), sum(history.seconds for history in before)
    return tuple(
        (tokens + row.tokens, seconds + row.seconds, row.metrics["kl"]) for row in student.histories["logits"].training
    )


def _sample(student: DistilledModel, prompt: str, size: QuickstartSize, seed: int) -> CrossedSample:
    written = continue_prompt(
        student.model,
        student.tokenizer,
        prompt,
        max_new_tokens=size.new_tokens,
        temperature=0.7,
        seed=seed,
        stop_at_end=False,
    )
    return CrossedSample(prompt=prompt, pieces=written.pieces)


def _describe(documents: Documents) -> str:
    size = sum(len(text.encode()) for text in [*documents.train, *documents.validation])
    count = len(documents.train) + len(documents.validation)
    python = platform.python_version()
    return f"the documentation that comes with Python {python}: {count:,} documents, {size / 1e6:.1f} MB"


def _settings(
    size: QuickstartSize, teacher: LanguageModelRun, student: DistillationRun, initialisation: str
) -> dict[str, str]:
    model, logits = teacher.model, student.logits
    loss = " and ".join(
        name if weight == 1 else f"{weight:g} x {name}"
        for name, weight in (("KL from the teacher", logits.kl_weight), ("cross-entropy", logits.ce_weight))
        if weight
    )
    return {
        "tokenizer": f"byte-level BPE of {size.vocab_size:,} entries, trained on the training documents",
        "windows": f"{size.seq_len:,} tokens",
        "teacher": f"{model.num_hidden_layers} layers of width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"MLP {model.intermediate_size}, rope theta {model.rope_theta:g}; batches of {teacher.batch_size}, learning "
        f"rate {teacher.learning_rate:g}",
        "state space at the start": initialisation,
        "distillation": f"recipe descend, batches of {student.batch_size}; layers alone, "
        f"{100 * student.mixers.share:g} % of the tokens at learning rate {student.mixers.learning_rate:g}; then "
        f"together at {logits.learning_rate:g}; trainable: {logits.trainable}; loss: {loss}",
    }
