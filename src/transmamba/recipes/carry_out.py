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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from transmamba.data import PackedDataset, TextSource, load_documents, load_tokenizer, pack_documents
from transmamba.errors import RecipeError
from transmamba.inference.checkpoint import load_language_model
from transmamba.inference.device import resolve_device
from transmamba.models import TransMambaConfig
from transmamba.recipes.fields import from_json
from transmamba.recipes.fit import fit, validate
from transmamba.recipes.language_model import LanguageModelRun
from transmamba.recipes.run_folder import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    check_folder,
    provenance,
    read_record,
    save_model,
)
from transmamba.recipes.sizes import count_parameters, new_model
from transmamba.recipes.training_run import is_main_process
from transmamba.tasks import Evaluation, evaluate_language_model
from transmamba.training import TrainingHistory, last_complete_checkpoint
from transmamba.training.checkpoints import write_atomically

__all__ = ["TrainedModel", "train_language_model", "validation_source"]

logger = logging.getLogger(__name__)

# What may differ when a run is resumed, because the trained weights do not depend on it.
FREE_TO_CHANGE = frozenset(
    {"output", "log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints", "recompute_activations"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """What a run leaves: the model, on the device it was trained on, and where everything is."""

    run: LanguageModelRun
    folder: Path
    model: PreTrainedModel
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
    if is_main_process():
        check_folder(run, resume, FREE_TO_CHANGE)
    plan = _prepare(run)
    checkpoint = last_complete_checkpoint(folder) if resume else None
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

    if is_main_process():
        _log_beginning(run, checkpoint, resume)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN_FILE, json.dumps(_record(run, plan, chosen.type), indent=2) + "\n")
    history = TrainingHistory(folder if is_main_process() else None, resume_step=step)
    if checkpoint is not None and step >= plan.num_steps:
        model, _ = load_language_model(checkpoint, device=chosen)
    else:
        model = _train(run, plan, chosen.type, folder, history, checkpoint, description or run.name)
    evaluation = None
    if plan.validation is not None:
        evaluation = evaluate_language_model(model, plan.validation, batch_size=run.micro_batch)
    if is_main_process():
        save_model(model, plan.tokenizer, folder / MODEL_FOLDER)
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
    source = None if record is None else from_json(TextSource, read_record(record)["recipe"]["text"])
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
    config: TransMambaConfig | LlamaConfig
    num_parameters: int
    num_steps: int


def _prepare(run: LanguageModelRun) -> _Plan:
    documents = load_documents(run.text)
    tokenizer = load_tokenizer(run.tokenizer, documents.train)
    config = run.model_config(tokenizer)
    train = pack_documents(documents.train, tokenizer, run.seq_len)
    run.check_batches(run.seq_len, len(train), run.text.source)
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
) -> PreTrainedModel:
    set_seed(run.seed)
    # Layers that never run a mode have parameters without gradients, which DistributedDataParallel must be told.
    unused = (
        isinstance(plan.config, TransMambaConfig)
        and plan.config.mixer_form == "shared"
        and (None in plan.config.trans_points or plan.config.mode_norm)
    )
    arguments = run.training_arguments(
        folder,
        device,
        num_steps=plan.num_steps,
        learning_rate=run.learning_rate,
        warmup_steps=run.warmup_steps,
        seed=run.seed,
        evaluates=plan.validation is not None,
        has_unused_parameters=unused,
    )
    return fit(
        new_model(plan.config),
        arguments,
        train=plan.train,
        validation=plan.validation,
        evaluate_fn=lambda model, dataset: validate(model, dataset, run),
        tokenizer=plan.tokenizer,
        history=history,
        checkpoint=checkpoint,
        description=description,
        keep_checkpoints=run.keep_checkpoints,
    )


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
    return {
        "recipe": run.to_json(),
        "model": plan.config.to_dict(),
        "num_parameters": plan.num_parameters,
        "num_steps": plan.num_steps,
        "training_tokens": plan.train.num_tokens,
        "validation_tokens": plan.validation.num_tokens if plan.validation else 0,
        **provenance(device),
    }
