"""Carrying out a distillation.

A run's folder holds
    run.json            the run as it was carried out, with versions, sizes and the command
    1-mixers/, 2-logits/ a folder a stage, with its history.jsonl, tensorboard/ and checkpoint-*/
    model/              the student at its target schedule, and its tokenizer
    evaluation.json     its score on the validation documents, if there are any
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from transmamba.compatibility import check_same_encoding, check_teacher_length, common_vocabulary
from transmamba.data import PackedDataset, load_documents, pack_documents
from transmamba.distillation import (
    AlignmentObjective,
    LogitObjective,
    OnlineTeacher,
    StoredTeacher,
    TaughtWindows,
    matrix_errors,
    output_errors,
)
from transmamba.errors import RecipeError
from transmamba.inference import load_checkpoint, load_language_model, resolve_device
from transmamba.models import TransMambaForCausalLM
from transmamba.modules import SSM_PARAMETERS
from transmamba.ops.softmax_attention.torch import without_cudnn
from transmamba.recipes.distillation import AlignmentStage, DistillationRun, LogitStage
from transmamba.recipes.fit import StageFolder, fit, validate
from transmamba.recipes.run_folder import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    check_folder,
    provenance,
    save_model,
)
from transmamba.recipes.training_run import is_main_process
from transmamba.schedule import TransPointSchedule
from transmamba.tasks import Evaluation, evaluate_language_model
from transmamba.training import LossFunction, MovingTransPoints, TrainingHistory
from transmamba.training.checkpoints import write_atomically

__all__ = ["DistilledModel", "distil"]

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = frozenset({"output", "log_every", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"})
# Nats a token between teacher and student at None. A lossless conversion has 1e-7 in fp32, and a teacher stored or run
# in 16 bits up to 1e-3; a student that has learnt something has far more.
SAME_MODEL = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilledModel:
    """What a distillation leaves: the student, on the device it was trained on, and where everything is.

    histories: of every stage, by its name.
    """

    run: DistillationRun
    folder: Path
    model: TransMambaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    histories: dict[str, TrainingHistory]
    evaluation: Evaluation | None

    @property
    def model_folder(self) -> Path:
        return self.folder / MODEL_FOLDER


def distil(run: DistillationRun, *, resume: bool = False, device: str = "auto") -> DistilledModel:
    """Carry out a distillation in its output folder, or go on with the one that is in it.

    resume: the folder must hold this run; without it, it must be empty or absent. Resuming on the CPU gives the same
    losses and weights, bit for bit, as a run that was never interrupted.

    Raises:
        RecipeError: the run contradicts itself, the data or the folder, or the loss is not finite.
        InputError: teacher and student do not fit each other.
        CheckpointError: teacher or student cannot be read, or a checkpoint cannot be written.
        CorpusError: the text cannot be read or is too little.
    """
    chosen = resolve_device(device)
    folder = Path(run.output)
    if is_main_process():
        check_folder(run, resume, FREE_TO_CHANGE)
    plan = _prepare(run, chosen)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN_FILE, json.dumps(_record(run, plan, chosen.type), indent=2) + "\n")
    histories = {}
    for number, (name, steps) in enumerate(plan.steps.items(), start=1):
        stage_folder = folder / f"{number}-{name}"
        histories[name] = _carry_out_stage(run, plan, name, steps, stage_folder, chosen, resume=resume, seed=number)
    plan.student.set_trans_points(plan.target)
    evaluation = None
    if plan.validation is not None:
        evaluation = evaluate_language_model(plan.student, plan.validation, batch_size=run.micro_batch)
    if is_main_process():
        save_model(plan.student, plan.tokenizer, folder / MODEL_FOLDER)
        if evaluation is not None:
            write_atomically(folder / EVALUATION_FILE, json.dumps(asdict(evaluation)) + "\n")
    return DistilledModel(
        run=run,
        folder=folder,
        model=plan.student,
        tokenizer=plan.tokenizer,
        histories=histories,
        evaluation=evaluation,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A run with everything loaded. The student is trained in place."""

    student: TransMambaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    teacher: OnlineTeacher | StoredTeacher
    train: Dataset[dict[str, Tensor]]
    validation: PackedDataset | None
    target: TransPointSchedule
    seq_len: int
    steps: dict[str, int]


def _prepare(run: DistillationRun, device: torch.device) -> _Plan:
    for name in ("teacher", "student"):
        if not getattr(run, name):
            raise RecipeError(f"{name} is not given; name its folder with --{name}.")
    student, tokenizer = load_checkpoint(run.student, dtype=torch.float32)
    # Sources often name no padding, tokenizers do; the Trainer would make them agree by itself, and say so.
    student.config.pad_token_id = student.generation_config.pad_token_id = tokenizer.pad_token_id
    seq_len = run.seq_len or student.config.max_position_embeddings
    target = _target(run, student, seq_len)
    documents = load_documents(run.text)
    teacher = _load_teacher(run, student, tokenizer, seq_len, device, documents.train)
    train: Any = pack_documents(documents.train, tokenizer, seq_len, boundaries=run.document_boundaries)
    validation = None
    if documents.validation:
        validation = pack_documents(
            documents.validation, tokenizer, seq_len, boundaries=run.document_boundaries, drop_last=False
        )
    if isinstance(teacher, StoredTeacher):
        train = TaughtWindows(train, teacher)
    run.check_batches(seq_len, len(train), run.text.source)
    plan = _Plan(
        student=student.to(device),
        tokenizer=tokenizer,
        teacher=teacher,
        train=train,
        validation=validation,
        target=target,
        seq_len=seq_len,
        steps=run.stage_steps(seq_len),
    )
    if "matrices" in plan.steps or "mixers" in plan.steps:
        _check_same_model(plan)
    return plan


def _target(run: DistillationRun, student: TransMambaForCausalLM, seq_len: int) -> TransPointSchedule:
    layers = student.config.num_hidden_layers
    if isinstance(run.schedule, str):
        asked = TransPointSchedule.parse(run.schedule, layers, seq_len)
    else:
        asked = TransPointSchedule(run.schedule or student.config.schedule).check_num_layers(layers)
    target = asked.stays_attention_from(seq_len)
    if all(point is None for point in target):
        raise RecipeError(
            f"the schedule {asked} switches no layer within {seq_len} tokens, so there is nothing to distil; give one "
            'that does with --schedule, such as "v9".'
        )
    return target


def _load_teacher(
    run: DistillationRun,
    student: TransMambaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
    device: torch.device,
    texts: Sequence[str],
) -> OnlineTeacher | StoredTeacher:
    if StoredTeacher.is_stored(run.teacher):
        stored = StoredTeacher(run.teacher)
        if stored.info.seq_len != seq_len:
            raise RecipeError(
                f"{run.teacher} was stored for windows of {stored.info.seq_len} tokens and this run has {seq_len}; set "
                f"seq_len={stored.info.seq_len}."
            )
        if stored.info.temperature != run.logits.temperature:
            raise RecipeError(
                f"{run.teacher} was stored at temperature {stored.info.temperature:g} and this run has "
                f"{run.logits.temperature:g}; set logits.temperature={stored.info.temperature:g}."
            )
        return stored
    model, teacher_tokenizer = load_language_model(run.teacher, dtype=torch.float32)
    check_teacher_length(model.config, seq_len)
    known = common_vocabulary(teacher_tokenizer, model.config, tokenizer, student.config)
    check_same_encoding(teacher_tokenizer, tokenizer, texts)
    dtype = torch.bfloat16 if run.uses_bf16(device.type) else torch.float32
    return OnlineTeacher(model.to(device, dtype), vocab_size=known)


def _check_same_model(plan: _Plan) -> None:
    """Layers are aligned with the student's own attention, so at None it must be the teacher."""
    batch = {name: x[None].to(plan.student.device) for name, x in plan.train[0].items()}
    plan.student.set_trans_points("transformer")
    objective = LogitObjective(plan.student, plan.teacher)
    with torch.no_grad():
        difference = float(objective(plan.student, batch)[1]["kl"])
    if not difference < SAME_MODEL:
        raise RecipeError(
            f"with every TransPoint at None the student differs from its teacher by {difference:.2g} nats a token, so "
            "its layers cannot be aligned with the teacher's; give a student as `transmamba convert` writes it, or set "
            "matrices.share=0 and mixers.share=0."
        )


def _carry_out_stage(
    run: DistillationRun,
    plan: _Plan,
    name: str,
    steps: int,
    folder: Path,
    device: torch.device,
    *,
    resume: bool,
    seed: int,
) -> TrainingHistory:
    stage: AlignmentStage | LogitStage = getattr(run, name)
    student = plan.student
    set_seed(run.seed + seed)
    kept = StageFolder.begin(folder, resume=resume)
    rank = stage.lora_rank if isinstance(stage, LogitStage) else None
    with training_only(student, stage.trainable, lora_rank=rank):
        finished = kept.result_of(steps)
        if finished is not None:
            load_weights(student, finished)
            return kept.history
        curriculum = stage.trans_point_schedule

        def schedule_at(step: int) -> TransPointSchedule:
            return curriculum.schedule_at(step, steps, plan.target, plan.seq_len, seed=run.seed)

        arguments = run.training_arguments(
            folder,
            device.type,
            num_steps=steps,
            learning_rate=stage.learning_rate,
            warmup_steps=round(run.warmup_share * steps),
            seed=run.seed + seed,
            evaluates=plan.validation is not None,
            has_unused_parameters=True,
        )
        with without_cudnn(device) if curriculum.moves else nullcontext():
            fit(
                student,
                arguments,
                train=plan.train,
                validation=plan.validation,
                evaluate_fn=lambda model, dataset: _validate_at(model, dataset, run, plan.target),
                tokenizer=plan.tokenizer,
                history=kept.history,
                checkpoint=kept.checkpoint,
                description=f"Stage {folder.name}",
                keep_checkpoints=run.keep_checkpoints,
                loss_fn=_objective(run, plan, stage, name, device),
                callbacks=[MovingTransPoints(student, schedule_at)],
            )
    return kept.history


@contextmanager
def training_only(student: TransMambaForCausalLM, trainable: str, *, lora_rank: int | None = None) -> Iterator[None]:
    """Within, only some parameters learn: "ssm", "mixers" or "all", or with a rank LoRA updates of their matrices.

    On leaving, updates are merged and everything can learn again.
    """
    for name, parameter in student.named_parameters():
        place = name.rpartition(".mixer.")[2] if ".mixer." in name else ""
        is_ssm = place in SSM_PARAMETERS
        parameter.requires_grad_(trainable == "all" or is_ssm or (trainable == "mixers" and place != ""))
    adapted = None if lora_rank is None else _with_lora(student, lora_rank)
    try:
        yield
    finally:
        if adapted is not None:
            adapted.merge_and_unload()
        student.requires_grad_(True)


def _with_lora(student: TransMambaForCausalLM, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("lora_rank needs the package peft: pip install 'transmamba[peft]'") from error
    ssm = [name for name, _ in student.named_parameters() if name.rpartition(".mixer.")[2] in SSM_PARAMETERS]
    linear = [
        name
        for name, module in student.model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and f"model.{name}.weight" not in ssm
    ]
    if not linear:
        raise RecipeError(
            f"lora_rank={rank}: nothing that comes from the teacher is trainable; set trainable to mixers or all."
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[f"model.{name}" for name in linear])
    adapted = get_peft_model(student, config)
    named = dict(student.named_parameters())
    for name in ssm:
        named[name].requires_grad_(True)
    return adapted


def _objective(
    run: DistillationRun, plan: _Plan, stage: AlignmentStage | LogitStage, name: str, device: torch.device
) -> LossFunction:
    if isinstance(stage, LogitStage):
        return LogitObjective(
            plan.student,
            plan.teacher,
            temperature=stage.temperature,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
        )
    source, _ = load_checkpoint(run.student, dtype=torch.float32, device=device)
    source.requires_grad_(False)
    return AlignmentObjective(plan.student, source, matrix_errors if name == "matrices" else output_errors)


def load_weights(student: PreTrainedModel, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a model that has them all."""
    weights: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(file)
    missing = student.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, f"{checkpoint} lacks {missing}"
    student.tie_weights()


def _validate_at(model: Any, dataset: Any, run: DistillationRun, target: TransPointSchedule) -> dict[str, float]:
    model.set_trans_points(target)  # the next step sets its own
    return validate(model, dataset, run)


def _record(run: DistillationRun, plan: _Plan, device: str) -> dict[str, Any]:
    return {
        "recipe": run.to_json(),
        "model": {**plan.student.config.to_dict(), "trans_points": plan.target.to_list()},
        "num_parameters": sum(parameter.numel() for parameter in plan.student.parameters()),
        "stages": plan.steps,
        "seq_len": plan.seq_len,
        "training_windows": len(plan.train),  # type: ignore[arg-type]
        **provenance(device),
    }
