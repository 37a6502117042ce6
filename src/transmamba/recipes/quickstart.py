"""The quickstart: four models of one size learn Python's documentation, then are compared in a report.

The baselines are in their standard form, with as many parameters as TransMamba V9. All see the same tokens in the same
order. A folder of a quickstart holds
    report.html     the page to look at; report.json its numbers
    corpus/         the documents, and the tokenizer trained on them
    <model>/        the run of each model: run.json, history.jsonl, checkpoint-*/, model/
"""

import json
import platform
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from transmamba._version import __version__
from transmamba.data import Documents, TextSource, load_documents, load_tokenizer
from transmamba.errors import RecipeError
from transmamba.inference import continue_prompt, measure_speed, resolve_device
from transmamba.progress import without_progress_bars
from transmamba.recipes.carry_out import TrainedModel, train_language_model
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings
from transmamba.report import CrossedSample, ModelRun, QuickstartReport

__all__ = ["QuickstartSize", "run_quickstart"]

SUBJECT = "TransMamba V9"
MODELS = {  # name: (schedule, form, learning rate: the best of those tried for each, docs/log.md)
    "Transformer": ("transformer", "standard", 2e-3),
    "Mamba-2": ("mamba2", "standard", 8e-3),
    "Layer hybrid 1:1": ("hybrid-1-1", "standard", 2e-3),
    SUBJECT: ("v9", "shared", 2e-3),
}
PROMPTS = ("The file object returned by this method", "If an exception is raised,")
MARKER = ".transmamba-quickstart"


@dataclass(frozen=True, kw_only=True)
class QuickstartSize:
    """How much the quickstart does.

    tokens: read by each model in training. lengths: contexts at which speed is measured.
    """

    tokens: int
    seq_len: int = 256
    hidden_size: int = 128
    intermediate_size: int = 192
    num_hidden_layers: int = 8
    vocab_size: int = 2048
    lengths: tuple[int, ...] = (256, 1024, 4096)
    new_tokens: int = 240


FULL = QuickstartSize(tokens=260_000)
SMOKE = QuickstartSize(
    tokens=8_192, lengths=(64, 512), new_tokens=80
)  # every step of it, for tests: the numbers mean nothing


def run_quickstart(
    output: Path, *, size: QuickstartSize = FULL, seed: int = 0, device: str = "cpu"
) -> QuickstartReport:
    """Train, measure and compare; write everything into `output`, which must be new or an earlier quickstart's (then
    replaced).

    Two runs with one seed on one CPU give the same losses.

    Raises:
        RecipeError: the folder holds something else.
    """
    began = time.monotonic()
    resolve_device(device)
    _claim_folder(output)
    corpus = output / "corpus"
    documents = load_documents(TextSource(source="builtin:python-docs"))
    source = _write_corpus(documents, corpus)
    tokenizer = load_tokenizer(f"train:{size.vocab_size}", documents.train)
    tokenizer.save_pretrained(corpus / "tokenizer")

    trained = {}
    with without_progress_bars():
        for name, (schedule, form, learning_rate) in MODELS.items():
            run = quickstart_run(
                size,
                source,
                str(corpus / "tokenizer"),
                schedule=schedule,
                form=form,
                learning_rate=learning_rate,
                seed=seed,
                output=str(output / schedule),
            )
            trained[name] = train_language_model(run, device=device, description=name)
    runs = tuple(_measured(name, model, size, seed) for name, model in trained.items())
    samples = tuple(_sample(trained[SUBJECT], prompt, size, seed + number) for number, prompt in enumerate(PROMPTS))
    report = QuickstartReport(
        subject=SUBJECT,
        runs=runs,
        samples=samples,
        seq_len=size.seq_len,
        corpus=_describe(documents),
        tokenizer=f"byte-level BPE of {len(tokenizer):,} entries, trained on the training documents",
        versions={
            "transmamba": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
            "machine": f"{platform.machine()}, {trained[SUBJECT].model.device}",
        },
        seed=seed,
        command=shlex.join(["transmamba", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=time.monotonic() - began,
    )
    report.write_json(output / "report.json")
    report.write_html(output / "report.html")
    return report


def quickstart_run(
    size: QuickstartSize,
    source: TextSource,
    tokenizer: str,
    *,
    schedule: str,
    form: str,
    learning_rate: float,
    seed: int,
    output: str,
) -> LanguageModelRun:
    """The run of one of the models."""
    return LanguageModelRun(
        name=Path(output).name,
        model=ModelSettings(
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_hidden_layers,
            num_attention_heads=4,
            mixer_form=form,
            match_shared_size=form == "standard",
        ),
        text=source,
        schedule=schedule,
        tokenizer=tokenizer,
        seq_len=size.seq_len,
        batch_size=4,
        max_tokens=size.tokens,
        learning_rate=learning_rate,
        warmup_steps=20,
        log_every=5,
        keep_checkpoints=1,
        dtype="float32",
        seed=seed,
        output=output,
    )


def _claim_folder(output: Path) -> None:
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / MARKER).is_file()):
            raise RecipeError(
                f"output={str(output)!r} holds something that is not a quickstart; give another --output."
            )
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def _write_corpus(documents: Documents, folder: Path) -> TextSource:
    """Keep the documents for all four runs: reading the standard library takes seconds."""
    folder.mkdir()
    for name, texts in (("train", documents.train), ("validation", documents.validation)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return TextSource(source=str(folder / "train.jsonl"), validation_source=str(folder / "validation.jsonl"))


def _measured(name: str, trained: TrainedModel, size: QuickstartSize, seed: int) -> ModelRun:
    evaluation = trained.evaluation
    assert evaluation is not None
    points = measure_speed(trained.model, size.lengths, seed=seed)
    return ModelRun(
        name=name,
        trans_points=trained.model.config.schedule,
        mixer_form=trained.run.model.mixer_form,
        num_parameters=trained.num_parameters,
        training_curve=tuple((row.tokens, row.seconds, row.loss) for row in trained.history.training),
        bits_per_byte=evaluation.bits_per_byte,
        nats_per_token=evaluation.loss,
        loss_by_position=tuple(((part.start + part.end - 1) / 2, part.loss) for part in evaluation.loss_by_position),
        prefill=tuple((point.length, point.prefill_tokens_per_second) for point in points),
        decode=tuple((point.length, point.decode_tokens_per_second) for point in points),
        cache=tuple((point.length, point.cache_bytes) for point in points),
    )


def _sample(trained: TrainedModel, prompt: str, size: QuickstartSize, seed: int) -> CrossedSample:
    written = continue_prompt(
        trained.model,
        trained.tokenizer,
        prompt,
        max_new_tokens=size.new_tokens,
        temperature=0.7,
        seed=seed,
        stop_at_end=False,
    )
    return CrossedSample(model=SUBJECT, prompt=prompt, pieces=written.pieces)


def _describe(documents: Documents) -> str:
    size = sum(len(text.encode()) for text in [*documents.train, *documents.validation])
    count = len(documents.train) + len(documents.validation)
    python = platform.python_version()
    return f"the documentation that comes with Python {python}: {count:,} documents, {size / 1e6:.1f} MB"
