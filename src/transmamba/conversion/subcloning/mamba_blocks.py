"""Map A: Mamba blocks of images out of the blocks of a ViT or DeiT.

A block of a Transformer has LN1, V, O, LN2, FC1 (width -> 4 width) and FC2; a Mamba block a norm, in_proj (width -> x
and the gate z), a convolution, a scan and out_proj. With mixer_source

    "mlp"     x <- the best of FC1's neurons, out_proj <- FC2 at the same neurons, the norm <- LN2
    "value"   x <- V, and after its channels FC1; out_proj <- O, and FC2; the norm <- LN1
    "none"    in_proj and out_proj begin as in a new model; the norm <- LN1

The gate z takes FC1's remaining neurons. What the scan reads cannot come from Q and K, which read another input and
have another size. An MLP of the student (VMamba) is the teacher's.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from transmamba.conversion.plan import Part
from transmamba.errors import InputError
from transmamba.models import PlainMambaConfig, VideoMambaConfig, VimConfig, VMambaConfig

from .builder import TableBuilder
from .table import PositionChange
from .teachers import image_grid, pair

MIXER_SOURCES = ("mlp", "value", "none")
GATE_SOURCES = ("mlp", "none")
CONVOLUTIONS = ("drawn", "identity")
VISION_CONFIGS = (PlainMambaConfig, VideoMambaConfig, VimConfig, VMambaConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaBlock:
    """Where the parts of one block of a student are. channels: of the mixer. mlp: neurons of its MLP, 0 = none."""

    prefix: str
    width: int
    channels: int
    norm: str
    has_gate: bool
    convolutions: tuple[str, ...]
    mlp: int = 0


def mamba_blocks(config: PreTrainedConfig) -> list[MambaBlock]:
    """The blocks of a student, first to last."""
    if isinstance(config, VMambaConfig):
        return [
            MambaBlock(
                prefix=f"backbone.stages.{stage}.blocks.{block}.",
                width=width,
                channels=int(config.expand * width),
                norm="norm1",
                has_gate=config.use_gate,
                convolutions=("conv2d",),
                mlp=int(width * config.mlp_ratio),
            )
            for stage, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True))
            for block in range(depth)
        ]
    assert isinstance(config, PlainMambaConfig | VideoMambaConfig | VimConfig)
    return [
        MambaBlock(
            prefix=f"backbone.layers.{layer}.",
            width=config.hidden_size,
            channels=config.expand * config.hidden_size,
            norm="norm",
            has_gate=True,
            convolutions=("conv2d",) if isinstance(config, PlainMambaConfig) else ("conv1d", "conv1d_b"),
        )
        for layer in range(config.num_hidden_layers)
    ]


def add_mamba_rows(
    table: TableBuilder,
    config: PreTrainedConfig,
    blocks_of: tuple[int | None, ...],
    *,
    mixer_source: str | None,
    gate_source: str,
    convolution: str,
) -> None:
    """Add the rows of Map A. blocks_of: the depth map. mixer_source: None = "value" where the student has an MLP of its
    own, else "mlp".
    """
    for name, value, known in (
        ("mixer_source", mixer_source or "mlp", MIXER_SOURCES),
        ("gate_source", gate_source, GATE_SOURCES),
        ("convolution", convolution, CONVOLUTIONS),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    blocks = mamba_blocks(config)
    for number, (block, source) in enumerate(zip(blocks, blocks_of, strict=True)):
        if convolution == "identity":
            _add_identity_convolutions(table, block)
        if source is not None:
            chosen = mixer_source or ("value" if block.mlp else "mlp")
            _add_block(table, number, block, source, chosen, gate_source)
    _add_embeddings(table, config)
    last = table.residual(blocks[-1].width)
    for ending in ("weight", "bias"):
        table.take(f"backbone.norm.{ending}", f"layernorm.{ending}", (last,))
    head = table.teacher.tensors.get("classifier.weight")
    if head is not None and table.shapes.get("classifier.weight", (0,))[0] == head.value.shape[0]:
        table.take("classifier.weight", "classifier.weight", (None, last), is_linear=True)
        table.take("classifier.bias", "classifier.bias", (None,))


def _add_identity_convolutions(table: TableBuilder, block: MambaBlock) -> None:
    for name in block.convolutions:
        at = f"{block.prefix}mixer.{name}"
        table.set_value(f"{at}.weight", "identity_tap", "1 at the token itself, 0 elsewhere")
        table.set_value(f"{at}.bias", "zero", "0")


def _add_block(
    table: TableBuilder, number: int, block: MambaBlock, source: int, mixer_source: str, gate_source: str
) -> None:
    residual = table.residual(block.width)
    ours, theirs = block.prefix, f"layers.{source}."
    neurons = _Neurons(table, number, source)
    mlp_set = neurons.next("MLP", block.mlp)
    norm = "layernorm_after" if mixer_source == "mlp" else "layernorm_before"
    for ending in ("weight", "bias"):
        table.take(f"{ours}{block.norm}.{ending}", f"{theirs}{norm}.{ending}", (residual,))
    if block.mlp:
        for ending in ("weight", "bias"):
            table.take(f"{ours}norm2.{ending}", f"{theirs}layernorm_after.{ending}", (residual,))
        table.take(f"{ours}mlp.up_proj.weight", f"{theirs}mlp.fc1.weight", (mlp_set, residual), is_linear=True)
        table.take(f"{ours}mlp.up_proj.bias", f"{theirs}mlp.fc1.bias", (mlp_set,))
        table.take(f"{ours}mlp.down_proj.weight", f"{theirs}mlp.fc2.weight", (residual, mlp_set), is_linear=True)
        table.take(f"{ours}mlp.down_proj.bias", f"{theirs}mlp.fc2.bias", (residual,))
    if mixer_source == "none":
        return
    filled = 0
    if mixer_source == "value":
        width = min(block.channels, block.width)
        values = table.index_set(f"block {number} x of V", f"value {source}", width)
        _add_pieces(table, ours, f"{theirs}attention.v_proj", f"{theirs}attention.o_proj", values, residual, 0, width)
        filled = width
    x = neurons.next("x", block.channels - filled)
    fc1, fc2 = f"{theirs}mlp.fc1", f"{theirs}mlp.fc2"
    _add_pieces(table, ours, fc1, fc2, x, residual, filled, filled + neurons.taken)
    bias = fc2 if mixer_source == "mlp" else f"{theirs}attention.o_proj"
    table.take(f"{ours}mixer.out_proj.bias", f"{bias}.bias", (residual,))
    if block.has_gate and gate_source == "mlp" and filled + neurons.taken == block.channels:
        z = neurons.next("z", block.channels)
        _add_input(table, ours, fc1, z, residual, block.channels, block.channels + neurons.taken)


def _add_pieces(
    table: TableBuilder,
    ours: str,
    reads: str,
    writes: str,
    chosen: str | None,
    residual: str | None,
    start: int,
    stop: int,
) -> None:
    """Channels start to stop of x, and what out_proj makes of them."""
    if start == stop:
        return
    _add_input(table, ours, reads, chosen, residual, start, stop)
    columns = Part(dim=1, start=start, stop=stop)
    indices = (residual, chosen)
    table.take(f"{ours}mixer.out_proj.weight", f"{writes}.weight", indices, into=columns, is_linear=True)


def _add_input(
    table: TableBuilder, ours: str, reads: str, chosen: str | None, residual: str | None, start: int, stop: int
) -> None:
    if start == stop:
        return
    rows = Part(dim=0, start=start, stop=stop)
    table.take(f"{ours}mixer.in_proj.weight", f"{reads}.weight", (chosen, residual), into=rows, is_linear=True)
    table.take(f"{ours}mixer.in_proj.bias", f"{reads}.bias", (chosen,), into=rows)


class _Neurons:
    """The neurons of a block's MLP, each given away once. taken: how many the last call gave."""

    def __init__(self, table: TableBuilder, number: int, source: int) -> None:
        self.table = table
        self.number = number
        self.axis = f"inner {source}"
        self.left = list(range(table.sizes[self.axis]))
        self.taken = 0

    def next(self, use: str, wanted: int) -> str | None:
        """An index set of the best that are left, as many as are wanted, or all of them."""
        self.taken = min(wanted, len(self.left))
        if self.taken == 0:
            return None
        name = f"block {self.number} {use}"
        found = self.table.index_set(name, self.axis, self.taken, self.left)
        given = set(self.left if found is None else self.table.index_sets[name])
        self.left = [neuron for neuron in self.left if neuron not in given]
        return found


def _add_embeddings(table: TableBuilder, config: PreTrainedConfig) -> None:
    """Patches, positions and class token, where the student has those of a ViT."""
    if isinstance(config, VMambaConfig):
        return
    assert isinstance(config, PlainMambaConfig | VideoMambaConfig | VimConfig)
    residual = table.residual(config.hidden_size)
    own = "embeddings.patch_embeddings.projection"
    patches = table.teacher.tensors[f"{own}.weight"].value.shape
    wanted = table.shapes.get("backbone.patch_embed.proj.weight", ())
    stride = getattr(config, "patch_stride", config.patch_size)
    if not isinstance(config, PlainMambaConfig) and (stride, stride) == pair(table.teacher.model.config.patch_size):
        is_video = len(wanted) == 5
        if (wanted[1], *wanted[-2:]) == tuple(patches[1:]):
            indices = (residual, None, None, None)
            table.take(
                "backbone.patch_embed.proj.weight",
                f"{own}.weight",
                indices,
                transform="middle_frame" if is_video else "copy",
            )
            table.take("backbone.patch_embed.proj.bias", f"{own}.bias", (residual,))
    theirs = table.teacher.tensors["embeddings.position_embeddings"]
    grid = image_grid(table.teacher.model.config)
    ours = config.trained_grid
    if isinstance(config, VimConfig):
        class_at = config.class_token_position(ours[0] * ours[1])
    else:
        class_at = 0 if isinstance(config, VideoMambaConfig) else None
    change = PositionChange(
        tokens=theirs.value.shape[1] - grid[0] * grid[1], source_grid=grid, target_grid=ours, class_at=class_at
    )
    assert theirs.source.endswith("position_embeddings")
    table.take("backbone.pos_embed", "embeddings.position_embeddings", (None, None, residual), positions=change)
    table.take("backbone.cls_token", "embeddings.cls_token", (None, None, residual))
