"""Map B for encoders: BERT's block stays, and two state spaces take the attention's place.

Q becomes C, K becomes B, V becomes x, O the output projection; embeddings, norms and MLP are copied. Whole heads are
taken, so that a query and a key keep their common channels. Where each direction has weights of its own, both begin
with the teacher's.
"""

import math

import torch
from torch import Tensor, nn

from transmamba.conversion.initialisation import OPEN_GATE
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config

from .builder import TableBuilder
from .rankings import choose
from .table import SubcloningPlan

SHORTEST, LONGEST = 2.0, 64.0  # time constants of the heads, in tokens
GAIN = 0.1  # of tau dt: the weight of all tokens together, before q k


def add_encoder_rows(
    table: TableBuilder, config: BiMamba2Config, blocks_of: tuple[int | None, ...], *, convolution: str
) -> None:
    """Add the rows of Map B. blocks_of: the depth map."""
    _check_fits(table, config)
    residual = table.residual(config.hidden_size)
    rows = table.sizes["position"]
    places = None if config.num_positions == 1 else table.given_set("positions", "position", range(config.num_positions))
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        is_mean = name == "position_embeddings" and config.num_positions == 1 < rows
        table.take(
            f"embeddings.{name}.weight",
            f"embeddings.{name}.weight",
            (places if name == "position_embeddings" else None, residual),
            transform="mean" if is_mean else "copy",
        )
    for ending in ("weight", "bias"):
        table.take(f"embeddings.norm.{ending}", f"embeddings.norm.{ending}", (residual,))
    for number, source in enumerate(blocks_of):
        if source is not None:
            _add_block(table, config, number, source, residual)
        if convolution == "identity":
            for ending in ("", "_b"):
                table.set_value(f"layers.{number}.mixer.conv1d{ending}.weight", "identity_tap", "1 at the token itself")
                table.set_value(f"layers.{number}.mixer.conv1d{ending}.bias", "zero", "0")


def _add_block(table: TableBuilder, config: BiMamba2Config, number: int, source: int, residual: str | None) -> None:
    ours, theirs = f"layers.{number}.", f"layers.{source}."
    heads = _heads(table, config, source)
    keys = table.given_set(f"block {number} keys", f"key {source}", heads)
    values = table.given_set(f"block {number} values", f"value {source}", heads)
    inner = table.index_set(f"block {number} MLP", f"inner {source}", config.intermediate_size)
    for direction in ("", "_b"):
        for name, rows in (("q_proj", keys), ("k_proj", keys), ("v_proj", values)):
            _take_linear(table, f"{ours}mixer.{name}{direction}", f"{theirs}mixer.{name}", rows, residual)
    _take_linear(table, f"{ours}mixer.o_proj", f"{theirs}mixer.o_proj", residual, values)
    _take_linear(table, f"{ours}up_proj", f"{theirs}up_proj", inner, residual)
    _take_linear(table, f"{ours}down_proj", f"{theirs}down_proj", residual, inner)
    for norm in ("mixer_norm", "mlp_norm"):
        for ending in ("weight", "bias"):
            table.take(f"{ours}{norm}.{ending}", f"{theirs}{norm}.{ending}", (residual,))


def _take_linear(table: TableBuilder, target: str, source: str, rows: str | None, columns: str | None) -> None:
    table.take(f"{target}.weight", f"{source}.weight", (rows, columns), is_linear=True)
    table.take(f"{target}.bias", f"{source}.bias", (rows,))


def _heads(table: TableBuilder, config: BiMamba2Config, source: int) -> list[int]:
    """The channels of queries, keys and values that a block keeps: whole heads, the best by all of them together."""
    size = config.head_dim or 1
    theirs = table.sizes[f"key {source}"] // size
    scores = [table.scores.get(f"{kind} {source}") for kind in ("key", "value")]
    known = [score.unflatten(0, (-1, size)).sum(1) for score in scores if score is not None]
    kept = choose(torch.stack(known).sum(0) if known else None, theirs, config.num_heads)
    return [head * size + channel for head in kept for channel in range(size)]


def _check_fits(table: TableBuilder, config: BiMamba2Config) -> None:
    """Raise InputError where the student is of another kind than the teacher, or bigger."""
    theirs = table.teacher.model.config
    size = theirs.hidden_size // theirs.num_attention_heads
    equal = {
        "vocab_size": theirs.vocab_size,
        "type_vocab_size": theirs.type_vocab_size,
        "hidden_act": theirs.hidden_act,
        "head_dim": size,
    }
    for name, wanted in equal.items():
        if getattr(config, name) != wanted:
            raise InputError(f"the student's {name} is {getattr(config, name)!r}; it must be the teacher's {wanted!r}.")
    at_most = {
        "num_heads": theirs.num_attention_heads,
        "intermediate_size": theirs.intermediate_size,
        "num_positions": table.sizes["position"],
    }
    for name, most in at_most.items():
        if getattr(config, name) > most:
            raise InputError(f"the student's {name} is {getattr(config, name)}; it must be at most the teacher's {most}.")


def encoder_start(name: str, shape: tuple[int, ...]) -> tuple[str, Tensor] | None:
    """In words and numbers, how a parameter that no Transformer has begins beside attention's weights; None = as new.

    Each head averages its last 2 to 64 tokens in each direction, whatever the token, and the gate is open.
    """
    place = name.rpartition(".mixer.")[2].replace("_b.", ".").removesuffix("_b")
    if place in ("dt_bias", "A_log"):
        taus = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), shape[0])
        dt = GAIN / taus
        if place == "A_log":
            return f"{-math.log(GAIN):.4g} (A = -1 / (tau dt))", torch.full(shape, -math.log(GAIN))
        words = f"inverse softplus of {GAIN:g} / tau, tau {SHORTEST:g} to {LONGEST:g}"
        return words, dt + torch.log(-torch.expm1(-dt))
    if place == "z_proj.bias":
        return "1.2785 (gate 1)", torch.full(shape, OPEN_GATE)
    if place in ("dt_proj.weight", "z_proj.weight"):
        return "0", torch.zeros(shape)
    return ("0.1", torch.full(shape, 0.1)) if place == "D" else None


@torch.no_grad()
def start_encoder(student: nn.Module, plan: SubcloningPlan) -> None:
    """Write `encoder_start` into the fresh parameters of a subcloned encoder."""
    parameters = dict(student.named_parameters())
    for row in plan.fresh:
        start = encoder_start(row.target, row.shape) if row.value == "drawn" and row.into is None else None
        if start is not None:
            parameters[row.target].copy_(start[1])

