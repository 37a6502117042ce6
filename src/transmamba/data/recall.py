"""Prompts that ask for something that stood far back: a needle in real text, and a line of a phone book.

    needle       one sentence, "Ada Baker was born in the city of Oslo", hidden in real text; the wrong answers are
                 other cities. Who has kept a trace of the right one can tell it from them.
    phone-book   lines of a name and a number, real text before them; the wrong answers are numbers of the same book.
                 Who has not kept which number belongs to whom can only guess.

A prompt ends where the answer begins, with the very words that stood before it. The right answer is drawn from its
choices whatever the rest of the prompt, so a model that does not look back is right one time in `len(choices)`. Equal
seeds give equal prompts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from transmamba.data.tokenizers import corpus_backend
from transmamba.errors import CorpusError, InputError

__all__ = ["RECALL_TASKS", "RecallPrompt", "recall_prompts", "shortest_recall"]

RECALL_TASKS = ("needle", "phone-book")

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the fact, as a share of the room it can stand in
CHARACTERS_PER_TOKEN = 8  # read at once when text is looked for; more than tokens have in any usual text

# Names with spaces between; no place begins another.
PLACES = (
    "Amsterdam Athens Berlin Boston Brussels Cairo Chicago Copenhagen Dallas Denver Detroit Dublin Edinburgh "
    "Geneva Hamburg Helsinki Houston Lisbon London Madrid Melbourne Milan Montreal Moscow Munich Naples Oslo "
    "Paris Prague Rome Seville Stockholm Sydney Tokyo Toronto Venice Vienna Warsaw Zurich"
)
FIRST_NAMES = (
    "Ada Alan Alice Anna Arthur Ben Carl Carol Clara Daniel David Diana Edward Ellen Emma Eric Eva Felix Frank "
    "Fred George Grace Hannah Harry Helen Henry Hugo Ida Irene Jack James Jane John Julia Karl Kate Laura Leo "
    "Louis Lucy Maria Mark Martin Mary Max Nina Nora Oliver Oscar Paul Peter Rachel Robert Rosa Ruth Sam Sarah "
    "Simon Sofia Susan Thomas Victor Walter William"
)
LAST_NAMES = (
    "Adams Allen Baker Barnes Bell Bennett Brooks Brown Butler Carter Clark Collins Cook Cooper Cox Davis Edwards "
    "Evans Fisher Foster Gray Green Hall Harris Hill Howard Hughes Jackson Jenkins Johnson Jones Kelly King Lee "
    "Lewis Long Martin Miller Mitchell Moore Morgan Morris Murphy Nelson Parker Perry Peterson Phillips Price "
    "Reed Richardson Roberts Rogers Ross Russell Scott Smith Taylor Turner Walker Ward Watson White Wood"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallPrompt:
    """A prompt of token ids and the answers to choose from, each as it would go on.

    depth: where the fact stands, 0 = first and 1 = last in the room there is. fact_position: index of its first token.
    """

    task: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int  # index into choices
    depth: float
    fact_position: int


def recall_prompts(
    task: str,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    length: int,
    count: int,
    num_choices: int = 8,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[RecallPrompt]:
    """`count` prompts of exactly `length` tokens each, real text out of `texts` around the fact.

    depths: gone through in turn. The beginning of a document (bos_token) stands first where the tokenizer puts one.

    Raises:
        InputError: an argument is out of range, or length is too short for the fact and the question.
        CorpusError: the texts are empty.
    """
    _check(task, texts, count, num_choices, depths)
    plans = _plans(task, tokenizer, count, num_choices, seed)
    shortest = max(plan.shortest for plan in plans)
    if length < shortest:
        raise InputError(
            f"length={length} is too short for {task} prompts under this tokenizer; give at least {shortest} tokens"
            + (", or a smaller num_choices." if task == "phone-book" else ".")
        )
    hay = _Hay(texts, corpus_backend(tokenizer))
    return [plan.fill(hay, length, depths[number % len(depths)]) for number, plan in enumerate(plans)]


def shortest_recall(
    task: str, tokenizer: PreTrainedTokenizerFast, *, count: int, num_choices: int = 8, seed: int = 0
) -> int:
    """The least length that `recall_prompts` takes with these arguments."""
    _check(task, ["text"], count, num_choices, DEPTHS)
    return max(plan.shortest for plan in _plans(task, tokenizer, count, num_choices, seed))


def _check(task: str, texts: Sequence[str], count: int, num_choices: int, depths: Sequence[float]) -> None:
    if task not in RECALL_TASKS:
        raise InputError(f"There is no recall task {task!r}; choose {' or '.join(RECALL_TASKS)}.")
    if count < 1:
        raise InputError(f"count={count} must be at least 1.")
    if not 2 <= num_choices <= len(PLACES.split()):
        raise InputError(f"num_choices={num_choices} must be between 2 and {len(PLACES.split())}.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths={tuple(depths)} must be numbers between 0 and 1, at least one.")
    if isinstance(texts, str):
        raise InputError("texts is one text; pass a list of texts, [text] for a single one.")
    if not any(text.strip() for text in texts):
        raise CorpusError("There is no text to hide facts in; give a text source that holds some.")


def _plans(
    task: str, tokenizer: PreTrainedTokenizerFast, count: int, num_choices: int, seed: int
) -> "list[_Needle | _PhoneBook]":
    backend = corpus_backend(tokenizer)
    first = tokenizer.bos_token_id
    begins = first is not None and tokenizer("a").input_ids[:1] == [first]
    kind: type[_Needle] | type[_PhoneBook] = _Needle if task == "needle" else _PhoneBook
    # A seed per prompt, so that more of them begin with the same ones.
    return [kind(backend, [first] if begins else [], num_choices, f"{seed} {task} {n}") for n in range(count)]


class _Needle:
    """One needle, of which only the text around it is open."""

    def __init__(self, backend: Tokenizer, start: list[int], num_choices: int, seed: str) -> None:
        self.rng = random.Random(seed)
        self.start = start
        name = f"{self.rng.choice(FIRST_NAMES.split())} {self.rng.choice(LAST_NAMES.split())}"
        places = self.rng.sample(PLACES.split(), num_choices)
        self.answer = self.rng.randrange(num_choices)
        question = f"\n{name} was born in the city of"
        self.question, self.choices = _question_and_answers(backend, question, places)
        self.fact = [*self.question, *self.choices[self.answer], *_encode(backend, ".\n")]

    @property
    def shortest(self) -> int:
        return len(self.start) + len(self.fact) + len(self.question)

    def fill(self, hay: "_Hay", length: int, depth: float) -> RecallPrompt:
        around = hay.take(length - self.shortest, self.rng)
        before = round(depth * len(around))
        prompt = [*self.start, *around[:before], *self.fact, *around[before:], *self.question]
        return RecallPrompt(
            task="needle",
            prompt=tuple(prompt),
            choices=self.choices,
            answer=self.answer,
            depth=depth,
            fact_position=len(self.start) + before,
        )


class _PhoneBook:
    """One phone book, which is as long as the prompt will be."""

    def __init__(self, backend: Tokenizer, start: list[int], num_choices: int, seed: str) -> None:
        self.rng = random.Random(seed)
        self.backend = backend
        self.start = start
        self.heading = _encode(backend, "\n\nPhone book\n")
        self.num_choices = num_choices
        self.entries = self._draw()
        self.lines: list[tuple[str, str]] = []
        self.ids: list[list[int]] = []
        self.size = len(start) + len(self.heading)  # of all but the question
        self.longest = 0  # line; a question is shorter than its line
        for line in islice(self.entries, num_choices):
            self._add(line, _encode(backend, _line(*line)))

    @property
    def shortest(self) -> int:
        return self.size + self.longest

    def fill(self, hay: "_Hay", length: int, depth: float) -> RecallPrompt:
        for line in self.entries:
            ids = _encode(self.backend, _line(*line))
            if self.size + len(ids) + max(self.longest, len(ids)) > length:
                break
            self._add(line, ids)
        asked = round(depth * (len(self.lines) - 1))
        name, right = self.lines[asked]
        others = [number for place, (_, number) in enumerate(self.lines) if place != asked]
        numbers = self.rng.sample(others, self.num_choices - 1)
        answer = self.rng.randrange(self.num_choices)
        numbers.insert(answer, right)
        question, choices = _question_and_answers(self.backend, f"\n{name}:", numbers)
        around = hay.take(length - self.size - len(question), self.rng)
        head = [*self.start, *around, *self.heading]
        return RecallPrompt(
            task="phone-book",
            prompt=(*head, *chain.from_iterable(self.ids), *question),
            choices=choices,
            answer=answer,
            depth=depth,
            fact_position=len(head) + sum(map(len, self.ids[:asked])),
        )

    def _add(self, line: tuple[str, str], ids: list[int]) -> None:
        self.lines.append(line)
        self.ids.append(ids)
        self.size += len(ids)
        self.longest = max(self.longest, len(ids))

    def _draw(self) -> Iterator[tuple[str, str]]:
        """Lines with names and numbers of their own, as many as there are names."""
        names = [f"{first} {last}" for first in FIRST_NAMES.split() for last in LAST_NAMES.split()]
        self.rng.shuffle(names)
        numbers = map(str, self.rng.sample(range(2_000_000, 10_000_000), len(names)))
        for name, digits in zip(names, numbers, strict=True):
            yield name, f"{digits[:3]}-{digits[3:]}"


class _Hay:
    """Stretches of token ids from anywhere in the texts."""

    def __init__(self, texts: Sequence[str], backend: Tokenizer) -> None:
        self.texts = [text for text in texts if text.strip()]
        self.encode = partial(_encode, backend)

    def take(self, count: int, rng: random.Random) -> list[int]:
        """`count` token ids: the end of a stretch of text that begins at random, further stretches before it."""
        ids: list[int] = []
        while len(ids) < count:
            text = rng.choice(self.texts)
            size = CHARACTERS_PER_TOKEN * (count - len(ids))
            begin = rng.randrange(max(1, len(text) - size + 1))
            ids = self.encode(text[begin : begin + size]) + ids
        return ids[len(ids) - count :]


def _line(name: str, number: str) -> str:
    return f"\n{name}: {number}"


def _encode(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _question_and_answers(
    backend: Tokenizer, question: str, answers: Sequence[str]
) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Token ids of the question, and of each answer as it goes on after a space.

    The two are encoded together, as they would stand in a text. What a token shares between them belongs to the
    answers, so that the question tells nothing of any.
    """
    encodings = [backend.encode(f"{question} {answer}", add_special_tokens=False) for answer in answers]
    asked = []
    for encoding in encodings:
        within = next(i for i, (_, end) in enumerate(encoding.offsets) if end > len(question))
        asked.append(encoding.ids[:within])
    shared = 0
    while all(len(ids) > shared and ids[shared] == asked[0][shared] for ids in asked):
        shared += 1
    return asked[0][:shared], tuple(tuple(encoding.ids[shared:]) for encoding in encodings)
