"""Stage 2 of the adaption for text: directions, layers and sentence embeddings come near a BERT's.

With c_im the mean cosine over tokens of scan m of layer i and the teacher's tokens in that order, c_i that of the
states after layer i, w as in `layer_weights`, N layers and two directions, e and e' the embeddings of student and
teacher,

    L = alpha (1/2) sum over m of (1/N) sum over i of w_im (1 - c_im)  +  states (1/N) sum over i of w_i (1 - c_i)
        + beta L_embedding(e, e')  +  similarity KL(softmax(e' e'^T / tau) || softmax(e e^T / tau))

Source: Chen et al. 2025 (arXiv 2502.15130) for alpha, beta and w; the terms of states, embedding and similarity are
ours. No label is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, normalize

from transmamba.distillation.adaption import Metrics, share_of_step
from transmamba.distillation.directions import direction_cosine, target_layer
from transmamba.distillation.layer_weights import LAYER_WEIGHTS, layer_weights
from transmamba.distillation.projections import LatentProjection, LatentProjections
from transmamba.distillation.text_teacher import TextSignals, TextTeacher
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config
from transmamba.modules import DirectionOutput
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

EMBEDDING_LOSSES = ("cosine", "mse")
DIRECTION_TARGETS = ("tokens", "attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class SentenceLoss:
    """What is compared, and how it is weighed.

    alpha: of the directions. states: of the states after each layer. beta: of the embeddings, by `embedding`: "cosine"
    = 1 - cosine, or "mse" = the squared distance. similarity: of the matrix of similarities within a batch, at
    `similarity_temperature`.
    direction_target: "tokens" = the teacher's after the block, as in the paper; "attention" = what its attention gives.
    target: "mapped" or "final"; see target_layer. layer_weights, temperature: see layer_weights.
    """

    alpha: float = 0.5
    states: float = 1.0
    beta: float = 1.0
    embedding: str = "cosine"
    similarity: float = 0.0
    similarity_temperature: float = 0.05
    direction_target: str = "tokens"
    target: str = "mapped"
    layer_weights: str = "ratio"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (
            ("embedding", EMBEDDING_LOSSES),
            ("direction_target", DIRECTION_TARGETS),
            ("target", ("mapped", "final")),
            ("layer_weights", tuple(LAYER_WEIGHTS)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        weights = ("alpha", "states", "beta", "similarity")
        for name in weights:
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} must be at least 0.")
        if not any(getattr(self, name) for name in weights):
            raise InputError(f"{', '.join(weights)} are all 0, so there is nothing to learn; raise one.")
        for name in ("temperature", "similarity_temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0.")


class SentenceAdaptionObjective:
    """Return the weighed loss, and the cosine and weight of every layer.

    A batch holds input_ids, attention_mask (batch, seq_len) and labels (batch,), one number a text, by which parts of a
    step are weighed. The projections have to be `attached` to the student while it trains, and no longer.
    """

    def __init__(
        self, teacher: TextTeacher, projections: "SentenceProjections", settings: SentenceLoss | None = None
    ) -> None:
        self.teacher = teacher
        self.projections = projections
        self.settings = settings or SentenceLoss()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        s, mask = self.settings, batch["attention_mask"]
        theirs = self.teacher(batch["input_ids"], mask)
        out: Any = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            output_hidden_states=s.states > 0,
            output_directions=s.alpha > 0,
        )
        total = out.pooler_output.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor | float] = {}
        if s.beta:
            loss = embedding_loss(out.pooler_output, theirs.embedding, s.embedding)
            total = total + s.beta * loss
            metrics["embedding_loss"] = loss.detach()
        if s.alpha:
            loss, cosines, weights = directions_loss(out.directions, theirs, self.projections.directions, s)
            total = total + s.alpha * loss
            metrics |= {"direction_loss": loss.detach()} | _by_layer(cosines, weights)
        if s.states:
            loss, cosines, weights = states_loss(out.hidden_states[1:], theirs, mask, self.projections.states, s)
            total = total + s.states * loss
            metrics |= {"state_loss": loss.detach()} | ({} if s.alpha else _by_layer(cosines, weights))
        if s.similarity:
            loss = similarity_loss(out.pooler_output, theirs.embedding, s.similarity_temperature)
            total = total + s.similarity * loss
            metrics["similarity_loss"] = loss.detach()
        return total * share_of_step(batch), metrics


class SentenceProjections(nn.Module):
    """From the student's scans and states to the teacher's width; states of that width need none."""

    def __init__(
        self, config: BiMamba2Config, target: int, *, sharing: str = "direction", padding: bool = True
    ) -> None:
        super().__init__()
        width = config.num_heads * (config.head_dim or 1)
        widths = [{"forward": width, "backward": width} for _ in range(config.num_hidden_layers)]
        self.directions = LatentProjections(widths, target, sharing=sharing, padding=padding)
        narrow = config.hidden_size != target
        self.states: nn.Module = (
            LatentProjection(config.hidden_size, target, padding=padding) if narrow else nn.Identity()
        )


def embedding_loss(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """The mean over the batch of 1 - cosine, or of the squared distance of unit vectors; both (batch, width).

    Raises:
        InputError: the widths differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's embeddings have {student.shape[-1]} numbers and the teacher's {teacher.shape[-1]}, so they "
            "cannot be compared one by one; set loss.beta=0 and loss.similarity=1, which compares texts with texts."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = student.to(dtype), teacher.to(dtype)
    if form == "cosine":
        return (1 - cosine_similarity(ours, theirs, dim=-1)).mean()
    return (normalize(ours, dim=-1) - normalize(theirs, dim=-1)).square().sum(-1).mean()


def similarity_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student), in nats a text, of which other text of the batch is like a text: softmax of cosines /
    temperature, without the text itself. (batch, width) each; of any widths. Zero for a single text.
    """
    if len(student) < 2:
        return 0.0 * student.float().sum()
    dtype = torch.promote_types(student.dtype, torch.float32)
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    log_q, log_p = (
        log_softmax((unit @ unit.T / temperature).masked_fill(itself, -1e4), dim=-1)
        for unit in (normalize(x.to(dtype), dim=-1) for x in (student, teacher))
    )
    return (log_p.exp() * (log_p - log_q)).masked_fill(itself, 0.0).sum(-1).mean()


def directions_loss(
    layers: Sequence[Sequence[DirectionOutput]],
    teacher: TextSignals,
    projections: LatentProjections,
    settings: SentenceLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the scans, and the cosine and weight of every layer, means over both, without gradient."""
    targets = teacher.tokens if settings.direction_target == "tokens" else teacher.attention
    cosines = []
    for number, layer in enumerate(layers):
        tokens = targets[target_layer(number, len(layers), len(targets), target=settings.target)]
        cosines.append(torch.stack([_scan_cosine(projections(number, one), tokens, one.patches) for one in layer]))
    c = torch.stack(cosines)  # (layers, directions)
    weights = torch.stack([_weights(column, settings) for column in c.unbind(1)], dim=1)
    return (weights * (1 - c)).mean(), c.detach().mean(dim=1), weights.mean(dim=1)


def states_loss(
    states: Sequence[Tensor], teacher: TextSignals, mask: Tensor, projection: nn.Module, settings: SentenceLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the states after each layer, (batch, seq_len, hidden_size), in the text's order."""
    count = len(teacher.tokens)
    inside = mask != 0
    c = torch.stack(
        [
            direction_cosine(
                projection(state), teacher.tokens[target_layer(i, len(states), count, target=settings.target)], inside
            )
            for i, state in enumerate(states)
        ]
    )
    weights = _weights(c, settings)
    return (weights * (1 - c)).mean(), c.detach(), weights


def _scan_cosine(features: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """The cosine of a scan's features with the teacher's tokens at its places, (batch, seq_len)."""
    index = places.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1])
    return direction_cosine(features, tokens.gather(1, index), places != TOKEN_WITHOUT_PATCH)


def _weights(cosines: Tensor, settings: SentenceLoss) -> Tensor:
    return layer_weights(cosines, settings.layer_weights, temperature=settings.temperature)


def _by_layer(cosines: Tensor, weights: Tensor) -> dict[str, Tensor]:
    pairs = enumerate(zip(cosines, weights, strict=True))
    return {key: value for i, (c, w) in pairs for key, value in ((f"cosine_{i}", c), (f"weight_{i}", w))}
