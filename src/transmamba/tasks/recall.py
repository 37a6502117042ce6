"""Recall: whether a model finds in its context what it is asked for, from prompts with answers to choose from.

Three measures of one prompt, from strict to sensitive: whether greedy decoding writes the answer; whether the answer is
likelier than each of the other choices; and the loss of the answer's tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from transmamba.errors import InputError
from transmamba.progress import progress_bar

__all__ = ["RecallOutcome", "RecallScore", "mean_recall", "score_recall"]


class AskedPrompt(Protocol):
    """A prompt such as data.RecallPrompt: token ids, and the choices as they would go on."""

    @property
    def task(self) -> str: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def choices(self) -> Sequence[Sequence[int]]: ...
    @property
    def answer(self) -> int: ...
    @property
    def depth(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallOutcome:
    """What a model did with one prompt.

    exact: greedy decoding writes the answer. chosen: the answer's tokens are, together, likelier than those of every
    other choice; a tie is not. loss: of the answer, nats per token. chance: of being chosen by a guess.
    """

    task: str
    length: int
    depth: float
    exact: bool
    chosen: bool
    loss: float
    chance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallScore:
    """Means over `count` prompts of one task and length; of one depth, or of all where depth is None."""

    task: str
    length: int
    depth: float | None
    count: int
    exact: float
    chosen: float
    loss: float
    chance: float


@torch.no_grad()
def score_recall(model: PreTrainedModel, prompts: Sequence[AskedPrompt], *, batch_size: int = 1) -> list[RecallOutcome]:
    """Ask a causal language model of any kind, in its own dtype; outcomes in the order of the prompts.

    A prompt is read once into the model's cache, and every choice goes on from a copy of it. batch_size: prompts of
    equal length at a time; the cache is then held once for each of their choices.

    Raises:
        InputError: batch_size is out of range, a choice is empty, or the model makes no cache.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    for number, prompt in enumerate(prompts):
        if not prompt.prompt or len(prompt.choices) < 2 or not all(prompt.choices):
            raise InputError(f"prompt {number} needs tokens, and two choices or more with tokens each.")
    outcomes: dict[int, RecallOutcome] = {}
    order = sorted(range(len(prompts)), key=lambda i: _shape(prompts[i]))
    was_training = model.training
    model.eval()
    try:
        with progress_bar("Recalling", len(prompts)) as advance:
            for _, group in groupby(order, key=lambda i: _shape(prompts[i])):
                alike = list(group)
                for start in range(0, len(alike), batch_size):
                    chosen = alike[start : start + batch_size]
                    found = _ask(model, [prompts[i] for i in chosen])
                    outcomes |= dict(zip(chosen, found, strict=True))
                    advance(len(chosen))
    finally:
        model.train(was_training)
    return [outcomes[number] for number in range(len(prompts))]


def mean_recall(outcomes: Iterable[RecallOutcome], *, by_depth: bool = False) -> list[RecallScore]:
    """The means for every task and length, and with by_depth for every depth too, in that order."""

    def key(outcome: RecallOutcome) -> tuple[str, int, float]:
        return outcome.task, outcome.length, outcome.depth if by_depth else 0.0

    scores = []
    for (task, length, depth), group in groupby(sorted(outcomes, key=key), key=key):
        alike = list(group)
        scores.append(
            RecallScore(
                task=task,
                length=length,
                depth=depth if by_depth else None,
                count=len(alike),
                exact=sum(outcome.exact for outcome in alike) / len(alike),
                chosen=sum(outcome.chosen for outcome in alike) / len(alike),
                loss=sum(outcome.loss for outcome in alike) / len(alike),
                chance=sum(outcome.chance for outcome in alike) / len(alike),
            )
        )
    return scores


def _shape(prompt: AskedPrompt) -> tuple[int, int]:
    return len(prompt.prompt), len(prompt.choices)


def _ask(model: PreTrainedModel, prompts: Sequence[AskedPrompt]) -> list[RecallOutcome]:
    """Outcomes of prompts that have one length and one number of choices."""
    tokens = torch.tensor([list(prompt.prompt) for prompt in prompts], device=model.device)
    read = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    cache = read.get("past_key_values")
    if cache is None:
        raise InputError(
            f"{type(model).__name__} gives no past_key_values to go on from, so recall cannot be measured."
        )
    num_choices = len(prompts[0].choices)
    answers = [list(choice) for prompt in prompts for choice in prompt.choices]
    longest = max(map(len, answers))
    # Padding stands behind what is scored, and nothing reads it.
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers], device=model.device)
    logits = read.logits[:, -1:].repeat_interleave(num_choices, dim=0)
    if longest > 1:
        cache.batch_repeat_interleave(num_choices)
        further = model(input_ids=padded[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, further], dim=1)
    picked, greedy = _pick(logits, padded)
    lengths = torch.tensor([len(ids) for ids in answers], device=model.device)[:, None]
    scored = torch.arange(longest, device=model.device) < lengths
    sums = (picked * scored).sum(-1).view(-1, num_choices).cpu()
    exact = (greedy | ~scored).all(-1).view(-1, num_choices).cpu()
    return [_outcome(prompt, sums[i], exact[i]) for i, prompt in enumerate(prompts)]


def _pick(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of each token, and whether it is the likeliest; logits (rows, tokens, ids), both (rows, tokens).

    Row by row, so that memory holds fp32 logits of one.
    """
    picked, greedy = [], []
    for row, ids in zip(logits, tokens, strict=True):
        row = row if row.dtype == torch.float64 else row.float()
        picked.append(log_softmax(row, -1).gather(-1, ids[:, None])[:, 0])
        greedy.append(row.argmax(-1) == ids)
    return torch.stack(picked), torch.stack(greedy)


def _outcome(prompt: AskedPrompt, sums: Tensor, exact: Tensor) -> RecallOutcome:
    right = sums[prompt.answer]
    others = torch.cat([sums[: prompt.answer], sums[prompt.answer + 1 :]])
    return RecallOutcome(
        task=prompt.task,
        length=len(prompt.prompt),
        depth=prompt.depth,
        exact=bool(exact[prompt.answer]),
        chosen=bool((right > others).all()),
        loss=-float(right) / len(prompt.choices[prompt.answer]),
        chance=1 / len(prompt.choices),
    )
