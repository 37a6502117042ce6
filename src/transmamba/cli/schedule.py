"""`transmamba schedule`: draw a TransPoint schedule and compare its costs with a Transformer and a Mamba-2 of its size.

Costs take the schedule as a model trained at --seq-len runs it: layers that switch there or later stay attention.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transmamba.errors import CheckpointError, RecipeError
from transmamba.schedule import MixerShape, ScheduleCost, TransPointSchedule

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# The paper's smaller model, arXiv 2503.24067, section 4; it does not state a vocabulary, 32,000 is ours.
PAPER_SHAPE = MixerShape(
    hidden_size=1536,
    intermediate_size=4096,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_state_heads=16,
    head_dim=96,
    vocab_size=32_000,
)
PAPER_NUM_LAYERS = 24
PAPER_SEQ_LEN = 8192

ATTENTION_STYLE = "blue"
SSM_STYLE = "yellow"
FIGURE_SUFFIXES = (".pdf", ".png", ".svg")


def schedule(
    schedule: Annotated[
        str | None,
        typer.Argument(
            help='A name, such as "v9", or a list, such as "0,128,none"; "0,none,..." repeats. '
            "Default: that of --config, or v9."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of layers. Default: of --config, or 24.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Length of a training document in tokens. Default: of --config, or 8192.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A checkpoint folder, or its config.json, that gives the sizes of the model.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the schedule to this .svg, .png or .pdf file.")] = None,
) -> None:
    """Draw a TransPoint schedule, and what it costs in FLOPs and cache bytes."""
    from rich.console import Console

    if figure is not None and figure.suffix.lower() not in FIGURE_SUFFIXES:
        raise RecipeError(f"--figure {figure} must end in one of {', '.join(FIGURE_SUFFIXES)}.")
    plan = _plan(schedule, layers, seq_len, config)
    console = Console()
    _print_drawing(console, plan)
    _print_costs(console, plan)
    if figure is not None:
        from transmamba.report.figures import schedule_figure

        figure.parent.mkdir(parents=True, exist_ok=True)
        schedule_figure(plan.schedule, plan.seq_len, title=plan.title).savefig(figure, dpi=200)
        console.print(f"Figure: {figure}", markup=False, highlight=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    title: str
    schedule: TransPointSchedule
    shape: MixerShape
    seq_len: int

    @property
    def trained(self) -> TransPointSchedule:
        """The schedule with the layers whose SSM training at this length never reaches kept as attention."""
        return self.schedule.stays_attention_from(self.seq_len)


def _plan(text: str | None, layers: int | None, seq_len: int | None, config: Path | None) -> _Plan:
    shape, num_layers, length, own = PAPER_SHAPE, PAPER_NUM_LAYERS, PAPER_SEQ_LEN, "v9"
    if config is not None:
        content = _read_config(config)
        # float32 is what the checkpoint's own dtype falls back to when config.json does not name one.
        wide = content.get("dtype", "float32") == "float32"
        shape = MixerShape.from_config(content, bytes_per_element=4 if wide else 2)
        num_layers, length = content["num_hidden_layers"], content["max_position_embeddings"]
        own = str(TransPointSchedule(content["trans_points"]))
        if layers not in (None, num_layers):
            raise RecipeError(
                f"--layers {layers} contradicts {config}, which has {num_layers}; leave one of the two out."
            )
    num_layers = num_layers if layers is None else layers
    length = length if seq_len is None else seq_len
    parsed = TransPointSchedule.parse(own if text is None else text, num_layers, length)
    named = text if text is not None else (str(config) if config is not None else own)
    return _Plan(title=f"{named}, {num_layers} layers, {length:,} tokens", schedule=parsed, shape=shape, seq_len=length)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no {file}; --config takes a checkpoint folder or a config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}.") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "transmamba":
        raise CheckpointError(f'{file} describes a model of type {kind!r}; this command reads "transmamba".')
    needed = ("num_hidden_layers", "max_position_embeddings", "trans_points")
    missing = [name for name in needed if content.get(name) is None]
    if missing:
        raise CheckpointError(f"{file} has no {', '.join(missing)}; was it written by transmamba?")
    return content


def _print_drawing(console: "Console", plan: _Plan) -> None:
    from rich.text import Text

    from transmamba.report.units import format_bytes

    segments = plan.schedule.segments(plan.seq_len)
    edges = [0, *(end for _, end in segments)]
    label_width = max(len(str(plan.seq_len)), len("TransPoint"))
    left = len("layer  ") + label_width + 2
    # Equal widths for unequal stretches, as in the figure: V9's early switches would vanish on a linear scale.
    cache_header = f"   cache at {plan.seq_len:,}"
    end_label = len(str(plan.seq_len))
    width = max(
        1, min(12 if len(segments) > 3 else 24, (console.width - left - len(cache_header) - end_label) // len(segments))
    )
    rows = plan.trained.table(plan.shape, positions=[start for start, _ in segments], lengths=[plan.seq_len])

    console.print(f"\n{plan.title}\n", style="bold", markup=False, highlight=False)
    header = f"{'layer':<7}{'TransPoint':>{label_width}}  "
    console.print(Text(header + _ruler(edges, width) + cache_header, style="dim"), no_wrap=True, crop=True)
    for entry, row in zip(plan.schedule, rows, strict=True):
        line = Text(f"{row.layer:<7}{'never' if entry is None else entry:>{label_width}}  ")
        for mode in row.modes:
            line.append(*(("█" * width, ATTENTION_STYLE) if mode == "attention" else ("░" * width, SSM_STYLE)))
        line.append(f"{format_bytes(row.cache_bytes[0]):>{end_label + len(cache_header)}}", style="dim")
        console.print(line, no_wrap=True, crop=True)
    legend = Text("\n").append("██", ATTENTION_STYLE).append(" attention  ").append("░░", SSM_STYLE)
    legend.append(" SSM    positions are not to scale")
    console.print(legend)


def _ruler(edges: Sequence[int], width: int) -> str:
    """Positions, each beginning at its edge of the segments, as many as fit without touching; the last one always."""
    end = (len(edges) - 1) * width
    ruler = ""
    for index, edge in enumerate(edges[:-1]):
        column, text = index * width, str(edge)
        if (index == 0 or column > len(ruler)) and column + len(text) < end:
            ruler = ruler.ljust(column) + text
    return ruler.ljust(end) + str(edges[-1])


def _print_costs(console: "Console", plan: _Plan) -> None:
    num_layers = len(plan.schedule)
    others = {"Transformer": "transformer", "Mamba-2": "mamba2"}
    compared = {"this schedule": plan.trained}
    compared |= {title: TransPointSchedule.named(name, num_layers) for title, name in others.items()}
    costs = {title: entry.cost(plan.shape, plan.seq_len) for title, entry in compared.items()}
    transformer = costs["Transformer"]

    from transmamba.report.units import format_bytes, format_count

    forward = _table(f"Forward pass over {plan.seq_len:,} tokens, in FLOPs", ["", *costs])
    parts: dict[str, Callable[[ScheduleCost], int]] = {
        "attention": lambda cost: cost.attention,
        "SSD": lambda cost: cost.ssd,
        "Memory Converter": lambda cost: cost.converter,
        "projections, conv": lambda cost: cost.projections,
        "MLP": lambda cost: cost.mlp,
        "head": lambda cost: cost.head,
        "total": lambda cost: cost.total,
    }
    for part, of in parts.items():
        forward.add_row(
            part, *(format_count(of(cost)) for cost in costs.values()), style="bold" if part == "total" else ""
        )
    forward.add_row(
        "against Transformer", *(f"{100 * cost.total / transformer.total:.0f} %" for cost in costs.values())
    )
    shares = [cost.schedule.attention_share(plan.seq_len) for cost in costs.values()]
    forward.add_row("layer-tokens by attention", *(f"{100 * share:.0f} %" for share in shares))
    lengths = sorted({max(1, plan.seq_len // 16), max(1, plan.seq_len // 4), plan.seq_len, 4 * plan.seq_len})
    headers = [f"at {length:,}" for length in lengths]
    cache = _table("Cache of one sequence after so many tokens", ["", *headers])
    decode = _table("Reading the last of so many tokens, the others being cached, in FLOPs", ["", *headers])
    for title, cost in costs.items():
        cache.add_row(title, *(format_bytes(cost.cache_bytes(length)) for length in lengths))
        decode.add_row(title, *(format_count(cost.decode_flops(length - 1)) for length in lengths))
    for table in (forward, cache, decode):
        console.print()
        console.print(table)

    late = [layer for layer, entry in enumerate(plan.schedule) if entry is not None and entry >= plan.seq_len]
    if late:
        console.print(
            f"\nTaken as attention at every length: {'layer' if len(late) == 1 else 'layers'} "
            f"{', '.join(map(str, late))}. Training on documents of {plan.seq_len:,} tokens never reaches a TransPoint "
            "there, and the SSM stays untrained.",
            markup=False,
            highlight=False,
        )


def _table(title: str, headers: Sequence[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column, header in enumerate(headers):
        table.add_column(header, justify="right" if column else "left")
    return table
