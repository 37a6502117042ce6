"""Published ViM checkpoints (hustvl/Vim)."""

from typing import Any

from transmamba.conversion.plan import Move
from transmamba.models import VimConfig, VimForImageClassification

from .table import PublishedFamily, Shapes, count, shape_of, side_of

# (theirs, ours). {i} is a layer. The mixer's parameters have one name on both sides.
ONCE: tuple[tuple[str, str], ...] = (
    ("cls_token", "backbone.cls_token"),
    ("pos_embed", "backbone.pos_embed"),
    ("patch_embed.proj.weight", "backbone.patch_embed.proj.weight"),
    ("patch_embed.proj.bias", "backbone.patch_embed.proj.bias"),
    ("norm_f.weight", "backbone.norm.weight"),
    ("head.weight", "classifier.weight"),
    ("head.bias", "classifier.bias"),
)
PER_LAYER: tuple[tuple[str, str], ...] = (
    ("layers.{i}.norm.weight", "backbone.layers.{i}.norm.weight"),
    *(
        (f"layers.{{i}}.mixer.{name}", f"backbone.layers.{{i}}.mixer.{name}")
        for name in (
            *("in_proj.weight", "out_proj.weight"),
            *("conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"),
            *("conv1d_b.weight", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias", "A_b_log", "D_b"),
        )
    ),
)
CONV_BIAS = ("conv1d.bias", "conv1d_b.bias")
BIAS = ("in_proj.bias", "out_proj.bias")


def told_by_mixer(path: str, shapes: Shapes, hidden_size: int) -> dict[str, Any]:
    """What the tensors of a bidirectional mixer tell."""
    mixer = "layers.0.mixer."
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count(shapes, r"layers\.(\d+)\..*"),
        "state_size": shape_of(path, shapes, mixer + "A_log")[1],
        "conv_kernel": shape_of(path, shapes, mixer + "conv1d.weight")[2],
        "expand": shape_of(path, shapes, mixer + "D")[0] // hidden_size,
        "dt_rank": shape_of(path, shapes, mixer + "dt_proj.weight")[1],
        "conv_bias": mixer + "conv1d.bias" in shapes,
        "use_bias": mixer + "in_proj.bias" in shapes,
        "num_labels": shape_of(path, shapes, "head.weight")[0],
    }


def bidirectional_moves(layers: int, conv_bias: bool, bias: bool) -> list[Move]:
    """The rows of the layers."""
    extra = (*(CONV_BIAS if conv_bias else ()), *(BIAS if bias else ()))
    rows = (*PER_LAYER, *((f"layers.{{i}}.mixer.{name}", f"backbone.layers.{{i}}.mixer.{name}") for name in extra))
    return [Move(source=theirs.format(i=i), target=ours.format(i=i)) for i in range(layers) for theirs, ours in rows]


def vim_configuration(path: str, shapes: Shapes, fields: dict[str, Any]) -> VimConfig:
    """The sizes that the tensors tell; fields replace them. patch_stride must be given where it is not patch_size."""
    hidden, num_channels, patch_size, _ = shape_of(path, shapes, "patch_embed.proj.weight")
    told = told_by_mixer(path, shapes, hidden) | {
        "patch_size": patch_size,
        "num_channels": num_channels,
        "class_token": "middle" if "cls_token" in shapes else "none",
    }
    if "image_size" not in fields:
        patches = shape_of(path, shapes, "pos_embed")[1] - ("cls_token" in shapes)
        stride = fields.get("patch_stride") or patch_size
        told["image_size"] = (side_of(path, patches) - 1) * stride + patch_size
    return VimConfig(**(told | fields))


def vim_moves(config: VimConfig, shapes: Shapes) -> list[Move]:
    """The table for a model of these sizes."""
    once = [Move(source=theirs, target=ours) for theirs, ours in ONCE]
    if config.class_token == "none":
        once = [move for move in once if move.source != "cls_token"]
    return once + bidirectional_moves(config.num_hidden_layers, config.conv_bias, config.use_bias)


VIM = PublishedFamily(
    name="vim",
    signs=(r"layers\.0\.mixer\.A_b_log", r"layers\.0\.mixer\.conv1d_b\.weight"),
    absent=(r"temporal_pos_embedding",),
    configuration=vim_configuration,
    model=VimForImageClassification,
    moves=vim_moves,
)
