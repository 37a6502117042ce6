"""Published VMamba checkpoints (MzeroMiko/VMamba): the first models (v0) and the last ones (v05_noz)."""

from typing import Any

from transmamba.conversion.plan import Move
from transmamba.models import VMambaConfig, VMambaForImageClassification

from .table import PublishedFamily, Shapes, count, shape_of

WITH_BIAS = ("weight", "bias")

# (theirs, ours, the parameters of both). {i} is a stage, {j} a block of it.
ONCE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("classifier.norm", "backbone.norm", WITH_BIAS),
    ("classifier.head", "classifier", WITH_BIAS),
)
PATCH_EMBEDDING: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "patches": (
        ("patch_embed.0", "backbone.patch_embed.proj", WITH_BIAS),
        ("patch_embed.2", "backbone.patch_embed.norm", WITH_BIAS),
    ),
    "convolutions": (
        ("patch_embed.0", "backbone.patch_embed.conv1", WITH_BIAS),
        ("patch_embed.2", "backbone.patch_embed.norm1", WITH_BIAS),
        ("patch_embed.5", "backbone.patch_embed.conv2", WITH_BIAS),
        ("patch_embed.7", "backbone.patch_embed.norm2", WITH_BIAS),
    ),
}
CONVOLUTION: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("layers.{i}.downsample.1", "backbone.stages.{i}.downsample.conv", WITH_BIAS),
    ("layers.{i}.downsample.3", "backbone.stages.{i}.downsample.norm", WITH_BIAS),
)
DOWNSAMPLING = {
    "conv3": CONVOLUTION,
    "conv2": CONVOLUTION,
    "merge": (
        ("layers.{i}.downsample.norm", "backbone.stages.{i}.downsample.norm", WITH_BIAS),
        ("layers.{i}.downsample.reduction", "backbone.stages.{i}.downsample.reduction", ("weight",)),
    ),
}
PER_BLOCK: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("layers.{i}.blocks.{j}.norm", "backbone.stages.{i}.blocks.{j}.norm1", WITH_BIAS),
    (
        "layers.{i}.blocks.{j}.op",
        "backbone.stages.{i}.blocks.{j}.mixer",
        (
            *("in_proj.weight", "conv2d.weight", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"),
            *("out_norm.weight", "out_norm.bias", "out_proj.weight"),
        ),
    ),
)
MLP: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("layers.{i}.blocks.{j}.norm2", "backbone.stages.{i}.blocks.{j}.norm2", WITH_BIAS),
    ("layers.{i}.blocks.{j}.mlp.fc1", "backbone.stages.{i}.blocks.{j}.mlp.up_proj", WITH_BIAS),
    ("layers.{i}.blocks.{j}.mlp.fc2", "backbone.stages.{i}.blocks.{j}.mlp.down_proj", WITH_BIAS),
)


def vmamba_configuration(path: str, shapes: Shapes, fields: dict[str, Any]) -> VMambaConfig:
    """The sizes that the tensors tell; fields replace them."""
    stages = count(shapes, r"layers\.(\d+)\..*")
    block = "layers.0.blocks.0."
    widths = [shape_of(path, shapes, f"layers.{i}.blocks.0.norm.weight")[0] for i in range(stages)]
    channels, inner = shape_of(path, shapes, block + "op.out_norm.weight")[0], block + "mlp.fc1.weight"
    two = "patch_embed.5.weight" in shapes
    kernel = shape_of(path, shapes, "patch_embed.0.weight")[2]
    told = {
        "patch_size": 2 * (kernel - 1) if two else kernel,
        "num_channels": shape_of(path, shapes, "patch_embed.0.weight")[1],
        "depths": [count(shapes, rf"layers\.{i}\.blocks\.(\d+)\..*") for i in range(stages)],
        "hidden_sizes": widths,
        "state_size": shape_of(path, shapes, block + "op.A_logs")[1],
        "conv_kernel": shape_of(path, shapes, block + "op.conv2d.weight")[2],
        "expand": channels / widths[0],
        "conv_bias": block + "op.conv2d.bias" in shapes,
        "use_bias": block + "op.in_proj.bias" in shapes,
        "use_gate": shape_of(path, shapes, block + "op.in_proj.weight")[0] == 2 * channels,
        "mlp_ratio": shapes[inner][0] / widths[0] if inner in shapes else 0.0,
        "patch_embedding": "convolutions" if two else "patches",
        "downsampling": _downsampling(shapes),
        "num_labels": shape_of(path, shapes, "classifier.head.weight")[0],
    }
    return VMambaConfig(**(told | fields))


def vmamba_moves(config: VMambaConfig, shapes: Shapes) -> list[Move]:
    """The table for a model of these sizes."""
    rows = [*ONCE, *PATCH_EMBEDDING[config.patch_embedding]]
    extra = (
        *(("conv2d.bias",) if config.conv_bias else ()),
        *(("in_proj.bias", "out_proj.bias") if config.use_bias else ()),
    )
    blocks = (*PER_BLOCK, (PER_BLOCK[1][0], PER_BLOCK[1][1], extra), *(MLP if config.mlp_ratio else ()))
    for i, depth in enumerate(config.depths):
        if i + 1 < len(config.depths):
            rows += [(a.format(i=i), b.format(i=i), names) for a, b, names in DOWNSAMPLING[config.downsampling]]
        rows += [(a.format(i=i, j=j), b.format(i=i, j=j), names) for j in range(depth) for a, b, names in blocks]
    return [Move(source=f"{theirs}.{name}", target=f"{ours}.{name}") for theirs, ours, names in rows for name in names]


def _downsampling(shapes: Shapes) -> str:
    if "layers.0.downsample.reduction.weight" in shapes:
        return "merge"
    kernel = shapes.get("layers.0.downsample.1.weight", (0, 0, 3, 3))[2]
    return "conv3" if kernel == 3 else "conv2"


VMAMBA = PublishedFamily(
    name="vmamba",
    signs=(r"layers\.0\.blocks\.0\.op\.A_logs", r"classifier\.head\.weight"),
    absent=(),
    configuration=vmamba_configuration,
    model=VMambaForImageClassification,
    moves=vmamba_moves,
)
