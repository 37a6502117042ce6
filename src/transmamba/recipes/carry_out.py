"""Carrying out a run that trains a language model.

A run's folder holds
    run.json        the recipe as it was carried out, with versions, sizes and the command
    history.jsonl   a line per logged step and per validation
    tensorboard/    the same for TensorBoard, where that is installed
    checkpoint-*/   the last complete checkpoints, from which resuming goes on
    model/          the trained model and its tokenizer
    evaluation.json its score on the validation documents, if there are any
"""

import json
import logging
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast, TrainingArguments, set_seed

from transmamba._version import __version__
from transmamba.data import PackedDataset, TextSource, load_documents, load_tokenizer, pack_documents
from transmamba.errors import CheckpointError, RecipeError
from transmamba.inference.checkpoint import load_checkpoint
from transmamba.inference.device import resolve_device
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.progress import without_progress_bars
from transmamba.recipes.language_model import LanguageModelRun
from transmamba.recipes.sizes import count_parameters
from transmamba.tasks import Evaluation, evaluate_language_model
from transmamba.training import TrainingHistory, TrainingProgress, TransMambaTrainer, last_complete_checkpoint
from transmamba.training.checkpoints import mark_complete, write_atomically
from transmamba.training.progress import tensorboard_callbacks

__all__ = ["TrainedModel", "train_language_model", "validation_source"]

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
MODEL_FOLDER = "model"
EVALUATION_FILE = "evaluation.json"
# What may differ when a run is resumed, because the trained weights do not depend on it.
FREE_TO_CHANGE = frozenset({"output", "log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What a run leaves: the model, on the device it was trained on, and where everything is."""

    run: LanguageModelRun
    folder: Path
    model: TransMambaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    history: TrainingHistory
    evaluation: Evaluation | None
    num_parameters: int

    @property
    def model_folder(self) -> Path:
        return self.folder / MODEL_FOLDER


def train_language_model(
    run: LanguageModelRun, *, resume: bool = False, device: str = "auto", description: str | None = None
) -> TrainedModel:
    """Carry out a run in its output folder, or go on from its last complete checkpoint.

    resume: the folder must hold this run; without it, it must be empty or absent. Resuming on the CPU gives the same
    losses and weights, bit for bit, as a run that was never interrupted. description: what the progress bar says.

    Raises:
        RecipeError: the run contradicts itself, the data or the folder, or the loss is not finite.
        CorpusError: the text cannot be read or is too little.
        CheckpointError: a checkpoint could not be written or read.
    """
    chosen = resolve_device(device)
    folder = Path(run.output)
    if _is_main_process():
        _check_folder(run, folder, resume)
    plan = _prepare(run)
    checkpoint = last_complete_checkpoint(folder) if resume else None
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    if _is_main_process():
        _log_beginning(run, checkpoint, resume)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN_FILE, json.dumps(_record(run, plan, chosen.type), indent=2) + "\n")
    history = TrainingHistory(folder if _is_main_process() else None, resume_step=step)
    if checkpoint is not None and step >= plan.num_steps:
        model, _ = load_checkpoint(checkpoint, device=chosen)
    else:
        model = _train(run, plan, chosen.type, folder, history, checkpoint, description or run.name)
    evaluation = None
    if plan.validation is not None:
        evaluation = evaluate_language_model(model, plan.validation, batch_size=_micro_batch(run))
    if _is_main_process():
        _save_model(model, plan.tokenizer, folder / MODEL_FOLDER)
        if evaluation is not None:
            write_atomically(folder / EVALUATION_FILE, json.dumps(asdict(evaluation)) + "\n")
    return TrainedModel(
        run=run,
        folder=folder,
        model=model,
        tokenizer=plan.tokenizer,
        history=history,
        evaluation=evaluation,
        num_parameters=plan.num_parameters,
    )


def validation_source(checkpoint: Path | str, text: str | None) -> tuple[TextSource, bool]:
    """What to score a checkpoint on, and whether all of it: all of `text`, or what its run kept for validation.

    The fields and separators of `text` are read as the run read its own.

    Raises:
        RecipeError: no text is given, and the checkpoint does not lie in the folder of a run.
    """
    records = [folder / RUN_FILE for folder in (Path(checkpoint), Path(checkpoint).absolute().parent)]
    record = next((path for path in records if path.is_file()), None)
    source = None if record is None else LanguageModelRun.from_json(_read_record(record)["recipe"]).text
    if text is None:
        if source is None:
            raise RecipeError(
                f"{checkpoint} lies in no run, so its validation documents are not known; name a text with --text."
            )
        return source, False
    whole = source or TextSource(source=text)
    return replace(
        whole, source=text, validation_source=None, validation_split=None, validation_share=0, max_documents=None
    ), True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A run with its data read and its sizes known."""

    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset
    validation: PackedDataset | None
    config: TransMambaConfig
    num_parameters: int
    num_steps: int


def _prepare(run: LanguageModelRun) -> _Plan:
    documents = load_documents(run.text)
    tokenizer = load_tokenizer(run.tokenizer, documents.train)
    config = run.model_config(tokenizer)
    train = pack_documents(documents.train, tokenizer, run.seq_len)
    parts = run.gradient_accumulation * _world_size()
    if run.batch_size % parts:
        raise RecipeError(
            f"batch_size={run.batch_size} cannot be cut into {parts} equal parts, gradient_accumulation="
            f"{run.gradient_accumulation} on each of {_world_size()} processes; change one of them."
        )
    if len(train) < run.batch_size:
        raise RecipeError(
            f"batch_size={run.batch_size} windows of {run.seq_len} tokens are more than the {len(train)} that "
            f"{run.text.source} gives for training; use a smaller batch_size or seq_len, or more text."
        )
    validation = None
    if documents.validation:
        validation = pack_documents(documents.validation, tokenizer, run.seq_len, drop_last=False)
    return _Plan(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        config=config,
        num_parameters=count_parameters(config),
        num_steps=run.num_steps(len(train)),
    )


def _train(
    run: LanguageModelRun,
    plan: _Plan,
    device: str,
    folder: Path,
    history: TrainingHistory,
    checkpoint: Path | None,
    description: str,
) -> TransMambaForCausalLM:
    set_seed(run.seed)
    progress = TrainingProgress(history, description)
    trainer = TransMambaTrainer(
        TransMambaForCausalLM(plan.config),
        _training_arguments(run, plan, device, folder),
        train_dataset=plan.train,
        eval_dataset=plan.validation,
        evaluate_fn=lambda model, dataset: _validate(model, dataset, run),
        tokenizer=plan.tokenizer,
        callbacks=[progress, *tensorboard_callbacks(folder / "tensorboard")],
        keep_checkpoints=run.keep_checkpoints,
    )
    try:
        with without_progress_bars():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _training_arguments(run: LanguageModelRun, plan: _Plan, device: str, folder: Path) -> TrainingArguments:
    bf16 = run.dtype == "bfloat16" or (run.dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    evaluates = run.eval_every is not None and plan.validation is not None
    # Layers that never run a mode have parameters without gradients, which DistributedDataParallel must be told.
    unused = plan.config.mixer_form == "shared" and (None in plan.config.trans_points or plan.config.mode_norm)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.num_steps,
        per_device_train_batch_size=_micro_batch(run),
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": run.min_learning_rate_ratio},
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        adam_beta1=run.adam_betas[0],
        adam_beta2=run.adam_betas[1],
        max_grad_norm=run.max_gradient_norm,
        seed=run.seed,
        bf16=bf16,
        use_cpu=device == "cpu",
        logging_steps=run.log_every,
        logging_first_step=True,
        include_num_input_tokens_seen="all",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=run.eval_every,
        save_strategy="steps",
        save_steps=run.save_every or plan.num_steps,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=unused,
        use_cache=True,  # otherwise the Trainer writes use_cache=False into the model's config
    )


def _validate(model: Any, dataset: Any, run: LanguageModelRun) -> dict[str, float]:
    score = evaluate_language_model(model, dataset, batch_size=_micro_batch(run), max_tokens=run.eval_tokens)
    return {"loss": score.loss, "bits_per_byte": score.bits_per_byte}


def _micro_batch(run: LanguageModelRun) -> int:
    return run.batch_size // run.gradient_accumulation // _world_size()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _save_model(model: TransMambaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model and its tokenizer so that the folder is there in whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with without_progress_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        mark_complete(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # safetensors wraps OSError
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} could not be written ({reason}); the checkpoints beside it are whole. Make room on the disk and "
            "resume, which only writes it."
        ) from error


def _check_folder(run: LanguageModelRun, folder: Path, resume: bool) -> None:
    record = folder / RUN_FILE
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            way_out = "pass --resume to go on with the run in it, or" if record.is_file() else "give"
            raise RecipeError(f"output={run.output!r} is not an empty folder; {way_out} another --output.")
        return
    if not record.is_file():
        raise RecipeError(f"output={run.output!r} holds no run to resume: there is no {RUN_FILE}; leave out --resume.")
    before, now = _read_record(record)["recipe"], run.to_json()
    changed = sorted(name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name])
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise RecipeError(
            f"output={run.output!r} holds another run: {listed}. Resume with the same settings, or give another "
            "--output."
        )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} is damaged ({error}); it was written by `transmamba train` and should not be edited."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise RecipeError(f"{path} describes no run: it has no recipe.")
    return content


def _log_beginning(run: LanguageModelRun, checkpoint: Path | None, resume: bool) -> None:
    if resume:
        logger.info("resuming %s from %s", run.output, checkpoint or "its beginning: no checkpoint is complete")
    asked, trained = run.asked_schedule, run.trained_schedule
    changed = [number for number, (a, b) in enumerate(zip(asked, trained, strict=True)) if a != b]
    if changed:
        logger.info(
            "layers %s would switch at %d tokens or later, beyond what is trained; they stay attention (None).",
            ", ".join(map(str, changed)),
            run.seq_len,
        )


def _record(run: LanguageModelRun, plan: _Plan, device: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    versions = {"python": platform.python_version(), "transmamba": __version__}
    return {
        "recipe": run.to_json(),
        "model": plan.config.to_dict(),
        "num_parameters": plan.num_parameters,
        "num_steps": plan.num_steps,
        "training_tokens": plan.train.num_tokens,
        "validation_tokens": plan.validation.num_tokens if plan.validation else 0,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions | {name: version(name) for name in packages},
        "command": shlex.join(sys.argv),
    }
