"""Published PlainMamba checkpoints (ChenhongyiYang/PlainMamba, an mmcls classifier)."""

from typing import Any

from transmamba.conversion.plan import Move
from transmamba.models import PlainMambaConfig, PlainMambaForImageClassification

from .table import PublishedFamily, Shapes, count, shape_of, side_of

NORM = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# (theirs, ours, the parameters of both). {i} is a layer, {c} a convolution of the stem.
ONCE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("backbone", "backbone", ("pos_embed",)),
    ("backbone.patch_embed.stem.0", "backbone.patch_embed.stem.0", ("weight",)),
    ("backbone.patch_embed.stem.1", "backbone.patch_embed.stem.1", BATCH_NORM),
    ("backbone.patch_embed.projection", "backbone.patch_embed.proj", ("weight", "bias")),
    ("backbone.ln1", "backbone.norm", NORM),
    ("head.fc", "classifier", ("weight", "bias")),
)
PER_LAYER: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("backbone.layers.{i}.norm", "backbone.layers.{i}.norm", NORM),
    (
        "backbone.layers.{i}.mamba",
        "backbone.layers.{i}.mixer",
        (
            *("in_proj.weight", "conv2d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
            *("A_log", "D", "direction_Bs", "out_proj.weight"),
        ),
    ),
)
BIASES = ("in_proj.bias", "out_proj.bias")
LOCAL_CONV: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("backbone.layers.{i}.dw.0", "backbone.local_convs.{i}.0", ("weight",)),
    ("backbone.layers.{i}.dw.1", "backbone.local_convs.{i}.1", BATCH_NORM),
)


def plain_mamba_configuration(path: str, shapes: Shapes, fields: dict[str, Any]) -> PlainMambaConfig:
    """The sizes that the tensors tell; fields replace them."""
    _, patches, hidden = shape_of(path, shapes, "backbone.pos_embed")
    mixer = "backbone.layers.0.mamba."
    patch_size = 2 * shape_of(path, shapes, "backbone.patch_embed.projection.weight")[2]
    layers = count(shapes, r"backbone\.layers\.(\d+)\..*")
    told = {
        "patch_size": patch_size,
        "num_channels": shape_of(path, shapes, "backbone.patch_embed.stem.0.weight")[1],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_stem_convs": (count(shapes, r"backbone\.patch_embed\.convs\.(\d+)\.weight") + 1) // 3,
        "state_size": shape_of(path, shapes, mixer + "A_log")[1],
        "conv_kernel": shape_of(path, shapes, mixer + "conv2d.weight")[2],
        "expand": shape_of(path, shapes, mixer + "D")[0] // hidden,
        "dt_rank": shape_of(path, shapes, mixer + "dt_proj.weight")[1],
        "conv_bias": mixer + "conv2d.bias" in shapes,
        "use_bias": mixer + "in_proj.bias" in shapes,
        "layers_with_local_conv": [i for i in range(layers) if f"backbone.layers.{i}.dw.0.weight" in shapes],
        "num_labels": shape_of(path, shapes, "head.fc.weight")[0],
    }
    if "image_size" not in fields:
        told["image_size"] = patch_size * side_of(path, patches)
    return PlainMambaConfig(**(told | fields))


def plain_mamba_moves(config: PlainMambaConfig, shapes: Shapes) -> list[Move]:
    """The table for a model of these sizes."""
    rows = list(ONCE)
    for c in range(config.num_stem_convs):
        theirs, ours = "backbone.patch_embed.convs.", "backbone.patch_embed.stem."
        rows.append((f"{theirs}{3 * c}", f"{ours}{3 * c + 3}", ("weight",)))
        rows.append((f"{theirs}{3 * c + 1}", f"{ours}{3 * c + 4}", BATCH_NORM))
    biases = (*(BIASES if config.use_bias else ()), *(("conv2d.bias",) if config.conv_bias else ()))
    for i in range(config.num_hidden_layers):
        per_layer = [*PER_LAYER, (PER_LAYER[1][0], PER_LAYER[1][1], biases)]
        per_layer += LOCAL_CONV if i in config.layers_with_local_conv else ()
        rows += [(theirs.format(i=i), ours.format(i=i), names) for theirs, ours, names in per_layer]
    return [Move(source=f"{theirs}.{name}", target=f"{ours}.{name}") for theirs, ours, names in rows for name in names]


PLAIN_MAMBA = PublishedFamily(
    name="plain_mamba",
    signs=(r"backbone\.layers\.0\.mamba\.direction_Bs",),
    absent=(),
    configuration=plain_mamba_configuration,
    model=PlainMambaForImageClassification,
    moves=plain_mamba_moves,
)
