"""Stage 1 of the adaption: a narrower, shallower or deeper student begins with parts of a Transformer's weights.

Source: weight subcloning (Samragh et al., arXiv 2312.09299) for the index sets; TransMamba (Chen et al., arXiv
2502.15130) for stability and the layered start. Which tensor goes where is ours; see docs/adaption.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from transmamba.conversion.initialisation import describe_initial_value, draw_initial_value, find_initialisation
from transmamba.conversion.subcloning.attention_blocks import add_attention_rows
from transmamba.conversion.subcloning.builder import TableBuilder
from transmamba.conversion.subcloning.depth import depth_map as make_depth_map
from transmamba.conversion.subcloning.encoder_blocks import (
    add_encoder_rows,
    calibrate_encoder,
    encoder_start,
    start_encoder,
)
from transmamba.conversion.subcloning.mamba_blocks import VISION_CONFIGS, add_mamba_rows, mamba_blocks
from transmamba.conversion.subcloning.rankings import rank
from transmamba.conversion.subcloning.teachers import TEXT_READERS, VISION_READERS, SubcloningTeacher, open_teacher
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config, BiMamba2Model, TransMambaConfig, TransMambaForCausalLM, vision_model_of
from transmamba.models.initial_values import find_initial_value
from transmamba.modules import SSM_PARAMETERS

from .rankings import RANKINGS
from .table import FreshPart, PositionChange, SubclonedPart, SubcloningPlan

__all__ = [
    "RANKINGS",
    "FreshPart",
    "PositionChange",
    "SubclonedPart",
    "SubcloningPlan",
    "plan_subcloning",
    "subclone",
]


def plan_subcloning(
    teacher: str | Path | PreTrainedModel,
    student_config: PreTrainedConfig,
    *,
    ranking: str = "uniform",
    pretrained: PreTrainedModel | str | None = None,
    calibration: Tensor | None = None,
    early_layers: int | None = None,
    depth_map: Sequence[int | None] | None = None,
    rescale: bool = True,
    mixer_source: str | None = None,
    gate_source: str = "mlp",
    convolution: str | None = None,
) -> SubcloningPlan:
    """The table of a subcloning, without making the student.

    Args:
        teacher: a ViT or DeiT for a student of images, a causal language model for a TransMamba, or a BERT for a
            BiMamba2: a folder, a Hugging Face id, or a model in memory.
        student_config: of a PlainMamba, ViM, VMamba, VideoMamba, TransMamba or BiMamba2, at most as wide as the
            teacher.
        ranking: a name of RANKINGS: which channels and neurons are kept. "stability" needs pretrained, the model that
            the teacher was fine-tuned from; "activation" needs calibration, pixel values or token ids. The heads of a
            BiMamba2 are fitted to attention on the calibration too, if there is one.
        early_layers: only so many blocks of the student, from the first on, come from the teacher; None = all.
        depth_map: for each block of the student one of the teacher, from 0, or None; without it, one to one, repeated
            in a deeper student, the first ones in a shallower.
        rescale: multiply the weights of a linear layer that loses inputs by sqrt(inputs before / after), which keeps
            the variance of its output.
        mixer_source: of Mamba blocks: "mlp", "value" or "none"; None = "value" in students with an MLP, else "mlp".
        gate_source: of Mamba blocks: "mlp" or "none". convolution: "drawn" or "identity"; None = "identity" in a
            BiMamba2, which begins with attention's weights, else "drawn".

    Raises:
        CheckpointError: the teacher cannot be read.
        InputError: the student is wider than the teacher, or an argument does not fit.
    """
    opened = open_teacher(teacher)
    return _plan(
        opened,
        student_config,
        ranking=ranking,
        pretrained=pretrained,
        calibration=calibration,
        early_layers=early_layers,
        depth_map=depth_map,
        rescale=rescale,
        mixer_source=mixer_source,
        gate_source=gate_source,
        convolution=convolution,
    )


def subclone(
    teacher: str | Path | PreTrainedModel,
    student_config: PreTrainedConfig,
    *,
    ranking: str = "uniform",
    pretrained: PreTrainedModel | str | None = None,
    calibration: Tensor | None = None,
    early_layers: int | None = None,
    depth_map: Sequence[int | None] | None = None,
    rescale: bool = True,
    mixer_source: str | None = None,
    gate_source: str = "mlp",
    convolution: str | None = None,
) -> tuple[PreTrainedModel, SubcloningPlan]:
    """A student that begins with parts of its teacher's weights, fp32, in evaluation mode, and the table.

    Arguments and errors as in `plan_subcloning`. What is drawn follows torch's seed.
    """
    opened = open_teacher(teacher)
    plan = _plan(
        opened,
        student_config,
        ranking=ranking,
        pretrained=pretrained,
        calibration=calibration,
        early_layers=early_layers,
        depth_map=depth_map,
        rescale=rescale,
        mixer_source=mixer_source,
        gate_source=gate_source,
        convolution=convolution,
    )
    student = _new_student(student_config)
    plan.apply(opened.sources, dict(student.named_parameters()))
    if isinstance(student_config, TransMambaConfig):
        _draw_state_space(student, plan, student_config)
    elif isinstance(student_config, BiMamba2Config):
        assert isinstance(student, BiMamba2Model)
        start_encoder(student, plan)
        if calibration is not None and not student_config.conv_activation and convolution in (None, "identity"):
            explained = calibrate_encoder(student, opened, plan, calibration)
            words = ", ".join(f"{share:.2f}" for share in explained)
            plan = replace(plan, notes=(*plan.notes, f"heads fitted to attention, of which they explain {words}"))
    return student.eval(), plan


def _plan(
    teacher: SubcloningTeacher,
    student_config: PreTrainedConfig,
    *,
    ranking: str,
    pretrained: PreTrainedModel | str | None,
    calibration: Tensor | None,
    early_layers: int | None,
    depth_map: Sequence[int | None] | None,
    rescale: bool,
    mixer_source: str | None,
    gate_source: str,
    convolution: str | None,
) -> SubcloningPlan:
    of_images = isinstance(student_config, VISION_CONFIGS)
    of_text = isinstance(student_config, BiMamba2Config)
    if not of_images and not of_text and not isinstance(student_config, TransMambaConfig):
        raise InputError(
            f"a {type(student_config).__name__} is no student; give the configuration of a PlainMamba, ViM, VMamba, "
            "VideoMamba, TransMamba or BiMamba2."
        )
    if (of_images, of_text) != (teacher.family in VISION_READERS, teacher.family in TEXT_READERS):
        wanted = "a ViT or DeiT" if of_images else "a BERT" if of_text else "a causal language model"
        raise InputError(
            f"{teacher.name} is a {teacher.family} and the student a {student_config.model_type}; its teacher must be "
            f"{wanted}."
        )
    if convolution not in (None, "drawn", "identity"):
        raise InputError(f"convolution={convolution!r} is unknown; choose 'drawn' or 'identity'.")
    layers = len(mamba_blocks(student_config)) if of_images else student_config.num_hidden_layers
    blocks_of = make_depth_map(teacher.num_layers, layers, depth_map, early_layers)
    with torch.device("meta"):
        empty = _new_student(student_config)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    scores = rank(teacher, ranking, pretrained=pretrained, calibration=calibration)
    table = TableBuilder(teacher, scores, shapes, rescale=rescale)
    if isinstance(student_config, TransMambaConfig):
        add_attention_rows(table, student_config, blocks_of)
    elif isinstance(student_config, BiMamba2Config):
        add_encoder_rows(table, student_config, blocks_of, convolution=convolution or "identity")
    else:
        add_mamba_rows(
            table,
            student_config,
            blocks_of,
            mixer_source=mixer_source,
            gate_source=gate_source,
            convolution=convolution or "drawn",
        )
    rows, ignored = table.finish(lambda name: _initial_value(empty, student_config, name))
    return SubcloningPlan(
        teacher=teacher.name,
        family=teacher.family,
        student=student_config.model_type,
        ranking=ranking,
        rescale=rescale,
        depth_map=blocks_of,
        index_sets=table.index_sets,
        rows=rows,
        ignored=ignored,
    )


def _new_student(config: PreTrainedConfig) -> PreTrainedModel:
    if isinstance(config, BiMamba2Config):
        return BiMamba2Model(config)
    return TransMambaForCausalLM(config) if isinstance(config, TransMambaConfig) else vision_model_of(config)


def _initial_value(model: PreTrainedModel, config: PreTrainedConfig, name: str) -> str:
    """The initial value of a fresh parameter, in words."""
    if isinstance(config, TransMambaConfig):
        start = "local" if _begins_local(config, name) else "mamba2"
        return describe_initial_value(find_initialisation(start, has_text=False)[1], name, config)
    if isinstance(config, BiMamba2Config):
        begun = encoder_start(name, tuple(model.get_parameter(name).shape))
        if begun is not None:
            return begun[0]
    row = find_initial_value(model.initial_values(config), name)
    numbers = {"constant": f" {row.a:g}", "truncated_normal": f" {row.a:g}", "log_counting": ""}
    return f"{row.distribution}" + numbers.get(row.distribution, f" {row.a:.3g} to {row.b:.3g}")


@torch.no_grad()
def _draw_state_space(student: PreTrainedModel, plan: SubcloningPlan, config: TransMambaConfig) -> None:
    """The state space of a TransMamba begins as that of a converted model without text: "local"."""
    _, start = find_initialisation("local", has_text=False)
    parameters = dict(student.named_parameters())
    for row in plan.fresh:
        if _begins_local(config, row.target):
            parameters[row.target].copy_(draw_initial_value(start, row.target, row.shape, config))


def _begins_local(config: TransMambaConfig, name: str) -> bool:
    """Whether a parameter has a value in "local", which opens the gate by its bias."""
    place = name.rpartition(".mixer.")[2]
    return place in SSM_PARAMETERS and place != "ssm_norm.weight" and (config.gate_bias or not config.use_gate)
