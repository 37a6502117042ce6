"""Recall against whole forwards, and models whose recall is known."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.conversion.checkpoints import tiny_source, token_ids
from transmamba.conversion import convert
from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.tasks import RecallOutcome, mean_recall, score_recall


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    task: str = "needle"
    depth: float = 0.5


def prompts() -> list[Asked]:
    """Of two lengths, with choices of unequal lengths."""
    choices = ((7, 8, 9), (7, 10), (11,), (12, 13, 14, 15))
    return [
        Asked(tuple(token_ids(length, seed=seed).tolist()), choices, seed % 4)
        for seed, length in enumerate((17, 30, 17, 17, 30))
    ]


def student() -> TransMambaForCausalLM:
    model, _ = convert(tiny_source("Llama"), schedule=[0, 18, None], initialisation="local")
    return model


def whole(model: PreTrainedModel, asked: Asked) -> tuple[list[float], bool]:
    """Log probability of each choice, and whether greedy decoding writes the answer."""
    sums = []
    for choice in asked.choices:
        tokens = torch.tensor([[*asked.prompt, *choice]])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, len(asked.prompt) - 1 : -1]
        sums.append(log_softmax(logits, -1).gather(-1, torch.tensor(choice)[:, None]).sum().item())
    written: list[int] = []
    for _ in asked.choices[asked.answer]:
        with torch.no_grad():
            written.append(
                int(model(torch.tensor([[*asked.prompt, *written]]), use_cache=False).logits[0, -1].argmax())
            )
    return sums, tuple(written) == asked.choices[asked.answer]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [student, lambda: tiny_source("Llama"), lambda: tiny_source("GPT-2")])
def test_outcomes_are_those_of_whole_forwards(make, batch_size: int) -> None:
    model = make().double()
    for asked, outcome in zip(prompts(), score_recall(model, prompts(), batch_size=batch_size), strict=True):
        sums, exact = whole(model, asked)
        # fp64, and a cache that computes the same: exact to some 2^-45.
        assert outcome.loss == pytest.approx(-sums[asked.answer] / len(asked.choices[asked.answer]), rel=1e-9)
        assert outcome.chosen == (sums[asked.answer] == max(sums))
        assert outcome.exact == exact
        assert (outcome.length, outcome.chance) == (len(asked.prompt), 0.25)


class Copier(PreTrainedModel):
    """A model that goes on as its context did after the last token, if it may look back; else it knows nothing."""

    config_class = PreTrainedConfig

    def __init__(self, *, looks_back: bool) -> None:
        super().__init__(PreTrainedConfig(vocab_size=50))
        self.looks_back = looks_back
        self.anything = nn.Parameter(torch.zeros(1))
        self.seen = torch.zeros(0, 0, dtype=torch.long)

    def forward(
        self, input_ids: Tensor, past_key_values: DynamicCache | None = None, **kwargs: object
    ) -> CausalLMOutputWithPast:
        if past_key_values is None:
            past_key_values, self.seen = DynamicCache(), input_ids
            history = input_ids
        else:
            repeats = len(input_ids) // len(self.seen)
            history = torch.cat([self.seen.repeat_interleave(repeats, 0), input_ids], dim=1)
        logits = torch.zeros(*input_ids.shape, 50)
        for row in range(len(input_ids)):
            for place in range(input_ids.shape[1]):
                read = history[row, : history.shape[1] - input_ids.shape[1] + place + 1].tolist()
                places = [i for i, token in enumerate(read[:-1]) if token == read[-1]]
                if places and self.looks_back:
                    logits[row, place, read[places[-1] + 1]] = 9.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def copies() -> list[Asked]:
    """20 is followed by 31, 32: the second choice."""
    context = (1, 2, 20, 31, 32, 3, 4, 20)
    return [Asked(context, ((30, 32), (31, 32), (31, 33)), 1), Asked(context, ((31, 32), (40,)), 0)]


def test_who_looks_back_is_right_and_who_does_not_is_not() -> None:
    for outcome in score_recall(Copier(looks_back=True), copies()):
        assert (outcome.exact, outcome.chosen) == (True, True)
        assert outcome.loss < 0.05
    for outcome in score_recall(Copier(looks_back=False), copies()):
        assert (outcome.exact, outcome.chosen) == (False, False)  # a tie is not a choice
        assert outcome.loss == pytest.approx(3.912, abs=1e-3)  # ln 50


def test_means_are_by_task_and_length_and_depth() -> None:
    def outcome(task: str, length: int, depth: float, right: bool) -> RecallOutcome:
        return RecallOutcome(
            task=task, length=length, depth=depth, exact=False, chosen=right, loss=1.0 + right, chance=0.25
        )

    outcomes = [
        outcome("needle", 64, 0.0, True),
        outcome("needle", 64, 1.0, False),
        outcome("needle", 128, 0.0, True),
        outcome("book", 64, 0.0, False),
    ]
    means = {(row.task, row.length): (row.count, row.chosen, row.loss) for row in mean_recall(outcomes)}
    assert means == {("book", 64): (1, 0, 1), ("needle", 64): (2, 0.5, 1.5), ("needle", 128): (1, 1, 2)}
    by_depth = mean_recall(outcomes, by_depth=True)
    assert [(row.task, row.length, row.depth, row.chosen) for row in by_depth] == [
        ("book", 64, 0.0, 0),
        ("needle", 64, 0.0, 1),
        ("needle", 64, 1.0, 0),
        ("needle", 128, 0.0, 1),
    ]
    assert mean_recall([]) == []


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = student().train()
    score_recall(model, prompts()[:1])
    assert model.training


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        (Asked((1,), ((2,),), 0), {}, "prompt 0 needs tokens, and two choices"),
        (Asked((1,), ((2,), ()), 0), {}, "prompt 0 needs tokens"),
        (Asked((), ((2,), (3,)), 0), {}, "prompt 0 needs tokens"),
        (Asked((1,), ((2,), (3,)), 0), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: Asked, settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_recall(student(), [asked], **settings)
