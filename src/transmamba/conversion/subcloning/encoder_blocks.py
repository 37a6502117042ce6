"""Map B for encoders: BERT's block stays, and two state spaces take the attention's place.

Q becomes C, K becomes B, V becomes x, O the output projection; embeddings, norms and MLP are copied. Whole heads are
taken, so that a query and a key keep their common channels. Where each direction has weights of its own, both begin
with the teacher's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.conversion.initialisation import OPEN_GATE
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config, BiMamba2Model

from .builder import TableBuilder
from .rankings import choose
from .table import SubcloningPlan
from .teachers import RESIDUAL, SubcloningTeacher

SHORTEST, LONGEST = 2.0, 64.0  # time constants of the heads, in tokens
A_START = 2.0  # of -A: dt = 1 / (2 tau), so that both directions together weigh a text's tokens by about 1 in all
LEAST_STEP = 1e-3  # of dt: a head whose best weight is negative keeps a gradient
TAUS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # that a fit chooses from
LONGEST_FIT = 512  # tokens of a row that heads are fitted on: the fit forms matrices of that size


def add_encoder_rows(
    table: TableBuilder, config: BiMamba2Config, blocks_of: tuple[int | None, ...], *, convolution: str
) -> None:
    """Add the rows of Map B. blocks_of: the depth map."""
    _check_fits(table, config)
    residual = table.residual(config.hidden_size)
    rows = table.sizes["position"]
    places = (
        None if config.num_positions == 1 else table.given_set("positions", "position", range(config.num_positions))
    )
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
            raise InputError(
                f"the student's {name} is {getattr(config, name)}; it must be at most the teacher's {most}."
            )


def encoder_start(name: str, shape: tuple[int, ...]) -> tuple[str, Tensor] | None:
    """In words and numbers, how a parameter that no Transformer has begins beside attention's weights; None = as new.

    Each head averages 2 to 64 tokens in each direction, and the gate is open.
    """
    place = name.rpartition(".mixer.")[2].replace("_b.", ".").removesuffix("_b")
    if place == "A_log":
        return f"{math.log(A_START):.4g} (A = {-A_START:g})", torch.full(shape, math.log(A_START))
    if place == "dt_bias":
        dt = 1 / (A_START * torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), shape[0]))
        words = f"inverse softplus of 1 / ({A_START:g} tau), tau {SHORTEST:g} to {LONGEST:g}"
        return words, _inverse_softplus(dt)
    constants = {
        "z_proj.bias": ("1.2785 (gate 1)", OPEN_GATE),
        "z_proj.weight": ("0", 0.0),
        "dt_proj.weight": ("0", 0.0),
        "mean_proj.weight": ("0", 0.0),
        "mean_proj.bias": ("1", 1.0),
        "D": ("0", 0.0),
    }
    if place not in constants:
        return None
    words, value = constants[place]
    return words, torch.full(shape, value)


@torch.no_grad()
def start_encoder(student: nn.Module, plan: SubcloningPlan) -> None:
    """Write `encoder_start` into the fresh parameters of a subcloned encoder."""
    parameters = dict(student.named_parameters())
    for row in plan.fresh:
        start = encoder_start(row.target, row.shape) if row.value == "drawn" and row.into is None else None
        if start is not None:
            parameters[row.target].copy_(start[1])


@torch.no_grad()
def calibrate_encoder(
    student: BiMamba2Model, teacher: SubcloningTeacher, plan: SubcloningPlan, tokens: Tensor
) -> tuple[float, ...]:
    """Fit tau, step, mean weight and D of every head to the attention that it comes from, on tokens (texts, length).

    Every layer reads what it reads in the teacher. tau is the best of TAUS, the other three are least squares given
    tau. Returns for every fitted layer the share of attention's output that the heads explain: 1 - squared error /
    squared output. Only with attention's own projections: no SiLU behind the convolution, which is the identity.

    Raises:
        InputError: tokens are no ids, or longer than the teacher reads.
    """
    longest = min(LONGEST_FIT, int(teacher.model.config.max_position_embeddings))
    if tokens.dim() != 2 or tokens.is_floating_point() or not 0 < tokens.shape[1] <= longest:
        raise InputError(
            f"calibration has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give token ids (texts, length) "
            f"without padding, of at most {longest} tokens."
        )
    contexts: list[Tensor] = []
    blocks = teacher.model.base_model.encoder.layer
    handles = [block.attention.output.dense.register_forward_pre_hook(_keep(contexts)) for block in blocks]
    try:
        states = teacher.model.base_model(
            input_ids=tokens.to(teacher.model.device), output_hidden_states=True
        ).hidden_states
    finally:
        for handle in handles:
            handle.remove()
    explained = []
    for number, source in enumerate(plan.depth_map):
        if source is None:
            continue
        residual = plan.index_sets.get(RESIDUAL)
        heads = plan.index_sets.get(f"block {number} values")
        x = states[source] if residual is None else states[source][..., list(residual)]
        wanted = contexts[source] if heads is None else contexts[source][..., list(heads)]
        explained.append(_fit_mixer(student.layers[number].mixer, x, wanted))
    return tuple(explained)


def _fit_mixer(mixer: Any, x: Tensor, wanted: Tensor) -> float:
    size = mixer.head_dim
    q, k, v, y = (
        rows.unflatten(-1, (-1, size)).transpose(1, 2).double()
        for rows in (mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x), wanted)
    )
    scores = q @ k.transpose(-1, -2) / size**0.5
    places = torch.arange(x.shape[1], device=x.device)
    apart = (places[:, None] - places).abs().double()
    best: Tensor | None = None  # (heads, 5): squared error, tau, step, mean weight, D
    for tau in TAUS:
        decay = torch.exp(-apart / tau)
        decay = decay + torch.eye(len(places), dtype=decay.dtype, device=decay.device)  # both directions read a token
        columns = [(scores * decay) @ v, decay @ v, v] if mixer.mean_term else [(scores * decay) @ v, v]
        found = torch.stack(
            [_least_squares([c[:, h].flatten() for c in columns], y[:, h].flatten()) for h in range(y.shape[1])]
        )
        found = torch.cat([found[:, :1], torch.full_like(found[:, :1], tau), found[:, 1:]], dim=1)
        best = found if best is None else torch.where((found[:, :1] < best[:, :1]), found, best)
    assert best is not None
    error, tau_best, step = best[:, 0], best[:, 1], best[:, 2]
    for ending in ("", "_b"):
        mixer.get_parameter("dt_bias" + ending).copy_(_inverse_softplus(step))
        mixer.get_parameter("A_log" + ending).copy_(-torch.log(tau_best * step))
        mixer.get_parameter("D" + ending).copy_(best[:, -1] / 2)
        if mixer.mean_term and (mixer.is_separate or not ending):
            mixer.get_parameter(f"mean_proj{ending}.bias").copy_(best[:, 3] / step)
    return 1 - float(error.sum() / y.square().sum())


def _least_squares(columns: list[Tensor], y: Tensor) -> Tensor:
    """The squared error and the weights, of which the first is at least LEAST_STEP."""
    X = torch.stack(columns, dim=1)
    weights = _solve(X, y)
    if weights[0] < LEAST_STEP:
        rest = _solve(X[:, 1:], y - LEAST_STEP * X[:, 0])
        weights = torch.cat([weights.new_full((1,), LEAST_STEP), rest])
    return torch.cat([(y - X @ weights).square().sum()[None], weights])


def _solve(X: Tensor, y: Tensor) -> Tensor:
    gram = X.T @ X
    ridge = 1e-9 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), X.T @ y)


def _inverse_softplus(dt: Tensor) -> Tensor:
    return dt + torch.log(-torch.expm1(-dt))


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    return hook
