"""Making the student: its configuration, its table, and the model itself."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transmamba.errors import InputError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.models.transmamba.modeling import TransMambaRotaryEmbedding
from transmamba.modules import SSM_PARAMETERS
from transmamba.schedule import TransPointSchedule

from .initialisation import calibrate, describe_initial_value, draw_initial_value, find_initialisation
from .plan import ConversionPlan, CopiedParameter, FreshParameter, IgnoredTensor, Move, check_moves
from .source import HEAD, Source, has_tokenizer, open_source

# No convolution: one in both modes would change what softmax reads, and one in the state space alone would give the
# state other keys and values than the cache holds, so that the Memory Converter could not hand them over. The gate can
# begin at 1, since z has a bias.
STUDENT_CHOICES = {"conv_kernel": 0, "use_gate": True, "gate_bias": True, "mixer_form": "shared"}


def convert(
    source: str | Path | PreTrainedModel,
    *,
    schedule: Sequence[int | None] | str | None = None,
    seq_len: int | None = None,
    initialisation: str | None = None,
    calibration: Tensor | None = None,
    ssm_rope: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[TransMambaForCausalLM, ConversionPlan]:
    """Return a student with the source's logits while every TransPoint is None, and the table of what came from where.

    Args:
        source: a folder, a Hugging Face id, or a causal language model in memory, which is left as it is.
        schedule: the student's TransPoints, or a name; None = never switch. Entries at or beyond seq_len become None.
        seq_len: the length that the student is meant for, which named schedules are scaled to; None = the source's.
        initialisation: of the state space, a name of INITIALISATIONS; None = "calibrated" with calibration, else
            "local".
        calibration: token ids (windows, window length) of text to fit the state space to.
        ssm_rope: whether the state space reads rotated q and k, as softmax does. No difference where there is no
            rotary embedding.
        dtype: of the student; None = the source's.

    Raises:
        CheckpointError: the source is missing, incomplete, damaged, or of a family that cannot be converted.
        InputError: an argument is out of range.
        ScheduleError: the schedule does not fit the source's layers.
    """
    opened = open_source(source)
    plan, config = make_plan(
        opened,
        schedule=schedule,
        seq_len=seq_len,
        initialisation=initialisation,
        has_text=calibration is not None,
        ssm_rope=ssm_rope,
    )
    student = build_student(opened, plan, config, dtype=dtype)
    if calibration is not None and plan.initialisation == "calibrated":
        plan = plan.with_initial_values(calibrate(student, calibration))
    return student, plan


def plan_conversion(
    source: str | Path | PreTrainedModel,
    *,
    schedule: Sequence[int | None] | str | None = None,
    seq_len: int | None = None,
    initialisation: str | None = None,
    has_text: bool | None = None,
    ssm_rope: bool = True,
) -> ConversionPlan:
    """Return the table of a conversion without making the student.

    has_text: whether there will be text to calibrate on; None = whether the source's folder has a tokenizer. The rest
    as in `convert`.
    """
    opened = open_source(source)
    if has_text is None:
        has_text = opened.folder is not None and has_tokenizer(opened.folder)
    plan, _ = make_plan(
        opened,
        schedule=schedule,
        seq_len=seq_len,
        initialisation=initialisation,
        has_text=has_text,
        ssm_rope=ssm_rope,
    )
    return plan


def make_plan(
    source: Source,
    *,
    schedule: Sequence[int | None] | str | None,
    seq_len: int | None,
    initialisation: str | None,
    has_text: bool,
    ssm_rope: bool,
) -> tuple[ConversionPlan, TransMambaConfig]:
    """The table, and the configuration of the student; see plan_conversion."""
    name, start = find_initialisation(initialisation, has_text=has_text)
    if seq_len is not None and seq_len < 1:
        raise InputError(f"seq_len={seq_len} must be at least 1.")
    moves = backbone_moves(source)
    embedding = next(move.source for move in moves if move.target == "model.embed_tokens.weight")
    tied = source.is_tied(embedding)
    choices, notes = source.family.choices(source.config, seq_len)
    config = TransMambaConfig(
        **_student_choices(source, choices, schedule, seq_len, ssm_rope), tie_word_embeddings=tied
    )
    with torch.device("meta"):
        empty = TransMambaForCausalLM(config)
    shapes = {target: tuple(parameter.shape) for target, parameter in empty.named_parameters()}
    ignored = ignored_tensors(source, tied=tied)
    if not tied:
        moves.append(Move(source=HEAD, target=HEAD))
    copied = {row.target: row for row in check_moves(source.name, moves, ignored, source.shapes, shapes)}
    rows: list[CopiedParameter | FreshParameter] = []
    for target, shape in shapes.items():
        if target in copied:
            rows.append(copied[target])
            continue
        assert target.rpartition(".mixer.")[2] in SSM_PARAMETERS, f"{target} has neither a source nor an initial value"
        words = describe_initial_value(start, target, config)
        rows.append(FreshParameter(target=target, shape=shape, initial_value=words))
    plan = ConversionPlan(
        source=source.name,
        family=source.family.model_type,
        initialisation=name,
        trans_points=tuple(config.trans_points),
        rows=tuple(rows),
        ignored=tuple(ignored),
        notes=notes,
    )
    return plan, config


def build_student(
    source: Source, plan: ConversionPlan, config: TransMambaConfig, *, dtype: torch.dtype | None
) -> TransMambaForCausalLM:
    """The model of a plan, in evaluation mode. Tensors are read one by one; memory holds the student and one."""
    dtype = dtype or source.dtype
    with torch.device("meta"):
        student = TransMambaForCausalLM(config)
    if config.position_embedding == "rotary":
        student.model.rotary_emb = TransMambaRotaryEmbedding(config)  # its buffers are in no checkpoint
    _, initialisation = find_initialisation(plan.initialisation, has_text=True)
    values: dict[str, Tensor] = {}
    for row in plan.copied:
        values[row.target] = row.take(source.read(row.source)).to(
            dtype=dtype, copy=True, memory_format=torch.contiguous_format
        )
    for fresh in plan.fresh:
        values[fresh.target] = draw_initial_value(initialisation, fresh.target, fresh.shape, config).to(dtype)
    student.load_state_dict(values, strict=False, assign=True)
    student.tie_weights()
    left = [name for name, parameter in student.named_parameters() if parameter.is_meta]
    assert not left, f"no value for {left}"
    student.config.dtype = dtype
    return student.eval()


def backbone_moves(source: Source) -> list[Move]:
    """The family's table with whole names on both sides."""
    return [
        Move(
            source=source.prefix + move.source,
            target=f"model.{move.target}",
            transform=move.transform,
            part=move.part,
        )
        for move in source.family.moves(source.config)
    ]


def ignored_tensors(source: Source, *, tied: bool) -> list[IgnoredTensor]:
    found = []
    for name, shape in source.shapes.items():
        reasons = [reason for ending, reason in source.family.ignored if re.search(rf"(^|\.){ending}$", name)]
        if tied and name == HEAD:
            reasons.append("tied to the embedding")
        if reasons:
            found.append(IgnoredTensor(source=name, shape=shape, reason=reasons[0]))
    return found


def _student_choices(
    source: Source,
    choices: dict[str, Any],
    schedule: Sequence[int | None] | str | None,
    seq_len: int | None,
    ssm_rope: bool,
) -> dict[str, Any]:
    length = seq_len or choices["max_position_embeddings"]
    layers = choices["num_hidden_layers"]
    parsed = (
        TransPointSchedule.parse(schedule or "transformer", layers, length)
        if schedule is None or isinstance(schedule, str)
        else TransPointSchedule(schedule)
    )
    parsed.check_num_layers(layers)
    return {
        **choices,
        **STUDENT_CHOICES,
        "ssm_rope": ssm_rope and choices.get("position_embedding", "rotary") == "rotary",
        "trans_points": parsed.stays_attention_from(length).to_list(),
        **{name: getattr(source.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
