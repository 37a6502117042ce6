"""A Transformer as subcloning reads it: its tensors, and what each of their dimensions stands for.

Dimensions have names. "residual" is the residual stream, one for the whole network. Of block l, "inner l" are the
neurons of the MLP, "value l" and "key l" what attention computes with. None is anything that is kept whole.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    DeiTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from transmamba.conversion.plan import Part
from transmamba.conversion.source import HEAD, open_source
from transmamba.conversion.sources import FAMILIES
from transmamba.conversion.student import backbone_moves, ignored_tensors
from transmamba.errors import CheckpointError
from transmamba.progress import without_progress_bars
from transmamba.weights import find_folder, in_one_line, read_json

RESIDUAL = "residual"
Axes = tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTensor:
    """A tensor, or part of one, with the names of its dimensions. axes belong to what part and transform leave."""

    source: str
    axes: Axes
    value: Tensor
    part: Part | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class SubcloningTeacher:
    """What a teacher is made of. tensors: by names that are the same for all of a kind; see the readers below.

    unread: tensors that no student has a place for, with the reason.
    """

    name: str
    family: str
    model: PreTrainedModel
    num_layers: int
    tensors: Mapping[str, TeacherTensor]
    unread: Mapping[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """How long every named dimension is."""
        return {
            axis: size
            for tensor in self.tensors.values()
            for axis, size in zip(tensor.axes, tensor.value.shape, strict=True)
            if axis is not None
        }

    @property
    def sources(self) -> dict[str, Tensor]:
        """The tensors by their own names, whole."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}


def open_teacher(teacher: str | Path | PreTrainedModel) -> SubcloningTeacher:
    """A ViT, DeiT or BERT, or a causal language model that `convert` knows: a folder, a Hugging Face id, or in memory.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another family.
    """
    if isinstance(teacher, PreTrainedModel):
        return _read(type(teacher).__name__, teacher)
    folder = find_folder(teacher)
    family = read_json(folder / "config.json").get("model_type")
    loader: Any = AutoModelForImageClassification if family in VISION_READERS else AutoModelForCausalLM
    loader = AutoModel if family in TEXT_READERS else loader
    _check_family(str(teacher), family)
    try:
        with without_progress_bars():
            model = loader.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{teacher} cannot be read: {in_one_line(error)}") from error
    return _read(str(teacher), model)


def _read(name: str, model: PreTrainedModel) -> SubcloningTeacher:
    family = model.config.model_type
    _check_family(name, family)
    return (VISION_READERS | TEXT_READERS).get(family, read_language_model)(name, model.eval())


def _check_family(name: str, family: str | None) -> None:
    known = [*VISION_READERS, *TEXT_READERS, *FAMILIES]
    if family not in known:
        raise CheckpointError(f"{name} is of the family {family!r}, which is not subcloned; known: {', '.join(known)}.")


def read_vision_transformer(name: str, model: PreTrainedModel) -> SubcloningTeacher:
    """A ViT or DeiT, with or without head. Names are those of the backbone, "classifier" for the head."""
    config = model.config
    assert isinstance(config, ViTConfig | DeiTConfig)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    renamed = {"cls_classifier.weight": "classifier.weight", "cls_classifier.bias": "classifier.bias"}
    tensors, unread = {}, {}
    for source, value in state.items():
        own = renamed.get(source, source.removeprefix(prefix))
        axes = _vision_axes(own)
        if axes is None:
            unread[source] = "no student has a place for it"
        else:
            tensors[own] = TeacherTensor(source=source, axes=axes, value=value)
    return SubcloningTeacher(
        name=name,
        family=config.model_type,
        model=model,
        num_layers=config.num_hidden_layers,
        tensors=tensors,
        unread=unread,
    )


def read_language_model(name: str, model: PreTrainedModel) -> SubcloningTeacher:
    """A causal language model. Names are those of a TransMamba that has its weights."""
    source = open_source(model)
    tensors = {}
    moves = backbone_moves(source)
    embedding = next(move.source for move in moves if move.target == "model.embed_tokens.weight")
    tied = source.is_tied(embedding)
    for move in moves:
        value = source.read(move.source)
        if move.part is not None:
            value = value.narrow(move.part.dim, move.part.start, move.part.stop - move.part.start)
        transposed = move.transform == "transpose"
        tensors[move.target] = TeacherTensor(
            source=move.source,
            axes=language_axes(move.target),
            value=value.T if transposed else value,
            part=move.part,
            transposed=transposed,
        )
    if not tied:
        tensors[HEAD] = TeacherTensor(source=HEAD, axes=(None, RESIDUAL), value=source.read(HEAD))
    return SubcloningTeacher(
        name=source.name,
        family=source.family.model_type,
        model=model,
        num_layers=model.config.num_hidden_layers,
        tensors=tensors,
        unread={tensor.source: tensor.reason for tensor in ignored_tensors(source, tied=tied)},
    )


def read_text_encoder(name: str, model: PreTrainedModel) -> SubcloningTeacher:
    """A BERT, with or without head. Names are those of a BiMamba2Model that has its weights."""
    config = model.config
    assert isinstance(config, BertConfig)
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    tensors, unread = {}, {}
    for source, value in model.state_dict().items():
        own = source.removeprefix(prefix)
        for theirs, ours in _BERT_NAMES:
            own = re.sub(theirs, ours, own)
        axes = _text_axes(own)
        if axes is None:
            unread[source] = "no student has a place for it"
        else:
            tensors[own] = TeacherTensor(source=source, axes=axes, value=value.detach())
    return SubcloningTeacher(
        name=name,
        family=config.model_type,
        model=model,
        num_layers=config.num_hidden_layers,
        tensors=tensors,
        unread=unread,
    )


def image_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """The patches of a ViT's image_size, (rows, columns)."""
    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    return height // patch_height, width // patch_width


def pair(size: Any) -> tuple[int, int]:
    """A size given once or for each side."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _vision_axes(name: str) -> Axes | None:
    whole: dict[str, Axes] = {
        "embeddings.cls_token": (None, None, RESIDUAL),
        "embeddings.position_embeddings": (None, None, RESIDUAL),
        "embeddings.patch_embeddings.projection.weight": (RESIDUAL, None, None, None),
        "embeddings.patch_embeddings.projection.bias": (RESIDUAL,),
        "layernorm.weight": (RESIDUAL,),
        "layernorm.bias": (RESIDUAL,),
        "classifier.weight": (None, RESIDUAL),
        "classifier.bias": (None,),
    }
    if not name.startswith("layers."):
        return whole.get(name)
    layer, place = name.removeprefix("layers.").split(".", 1)
    return _block_axes(
        place,
        layer,
        norms=("layernorm_before", "layernorm_after"),
        key=("attention.q_proj", "attention.k_proj"),
        value=("attention.v_proj",),
        attention_output="attention.o_proj",
        inner=("mlp.fc1",),
        mlp_output="mlp.fc2",
    )


def _text_axes(name: str) -> Axes | None:
    whole: dict[str, Axes] = {
        "embeddings.word_embeddings.weight": (None, RESIDUAL),
        "embeddings.position_embeddings.weight": ("position", RESIDUAL),
        "embeddings.token_type_embeddings.weight": (None, RESIDUAL),
        "embeddings.norm.weight": (RESIDUAL,),
        "embeddings.norm.bias": (RESIDUAL,),
    }
    if not name.startswith("layers."):
        return whole.get(name)
    layer, place = name.removeprefix("layers.").split(".", 1)
    return _block_axes(
        place,
        layer,
        norms=("mixer_norm", "mlp_norm"),
        key=("mixer.q_proj", "mixer.k_proj"),
        value=("mixer.v_proj",),
        attention_output="mixer.o_proj",
        inner=("up_proj",),
        mlp_output="down_proj",
    )


def language_axes(name: str) -> Axes:
    """The dimensions of a TransMamba's parameter that a Transformer has too; queries and keys are "query l", "kv l"."""
    if name in ("model.embed_tokens.weight", "model.embed_positions.weight", HEAD):
        return (None, RESIDUAL)
    if not name.startswith("model.layers."):
        return (RESIDUAL,)
    layer, place = name.removeprefix("model.layers.").split(".", 1)
    if place.startswith(("mixer.q_norm", "mixer.k_norm")):
        return (None,)
    if place.startswith("mixer.q_proj"):
        return (f"query {layer}", RESIDUAL)[: 2 if place.endswith("weight") else 1]
    if place.startswith("mixer.o_proj"):
        return (RESIDUAL, f"query {layer}") if place.endswith("weight") else (RESIDUAL,)
    axes = _block_axes(
        place,
        layer,
        norms=("input_layernorm", "post_attention_layernorm"),
        key=("mixer.k_proj", "mixer.v_proj"),
        value=(),
        attention_output="",
        inner=("mlp.gate_proj", "mlp.up_proj"),
        mlp_output="mlp.down_proj",
    )
    assert axes is not None, f"{name} has no dimensions"
    return axes


def _block_axes(
    place: str,
    layer: str,
    *,
    norms: tuple[str, ...],
    key: tuple[str, ...],
    value: tuple[str, ...],
    attention_output: str,
    inner: tuple[str, ...],
    mlp_output: str,
) -> Axes | None:
    module, _, ending = place.rpartition(".")
    dims = 2 if ending == "weight" else 1
    if module in norms:
        return (RESIDUAL,)
    for modules, axis in ((key, f"key {layer}"), (value, f"value {layer}"), (inner, f"inner {layer}")):
        if module in modules:
            return (axis, RESIDUAL)[:dims]
    for module_name, axis in ((attention_output, f"value {layer}"), (mlp_output, f"inner {layer}")):
        if module == module_name:
            return (RESIDUAL, axis)[:dims]
    return None


_BERT_NAMES = (
    (r"^embeddings\.LayerNorm", "embeddings.norm"),
    (r"^encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".mixer.\1_proj."),
    (r"\.attention\.output\.dense\.", ".mixer.o_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".mixer_norm."),
    (r"\.intermediate\.dense\.", ".up_proj."),
    (r"\.output\.dense\.", ".down_proj."),
    (r"\.output\.LayerNorm\.", ".mlp_norm."),
)
TEXT_READERS: dict[str, Callable[[str, PreTrainedModel], SubcloningTeacher]] = {"bert": read_text_encoder}
VISION_READERS: dict[str, Callable[[str, PreTrainedModel], SubcloningTeacher]] = {
    "vit": read_vision_transformer,
    "deit": read_vision_transformer,
}


@torch.no_grad()
def run_on(model: PreTrainedModel, inputs: Tensor, batch_size: int = 32) -> None:
    """Run a model on its main input, some rows at a time."""
    device = next(model.parameters()).device
    for start in range(0, len(inputs), batch_size):
        model(**{model.main_input_name: inputs[start : start + batch_size].to(device)})
