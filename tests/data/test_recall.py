"""Recall prompts: exactly as long as asked, with the fact where it should be, and no hint in the question."""

from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transmamba.data import RECALL_TASKS, RecallPrompt, load_tokenizer, recall_prompts, shortest_recall
from transmamba.data.recall import FIRST_NAMES, LAST_NAMES, PLACES
from transmamba.errors import CorpusError, InputError

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40, "A state space forgets slowly, and says so. " * 40, " "]
BYTES = load_tokenizer("bytes")


def sentencepiece(bos: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's: a space in front of every text, bytes for what is unknown, <s> first."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-:.,'"
    vocab = {"<s>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    vocab |= {letter: len(vocab) + number for number, letter in enumerate(letters)}
    merges = [("o", "f"), ("▁", "of"), (":", "▁")]  # the last crosses from question to answer
    vocab |= {"".join(pair): len(vocab) + number for number, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def merged_across() -> PreTrainedTokenizerFast:
    """Bytes whose merges join the end of a question with the space before the answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate([*alphabet, ":Ġ", "fĠ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "Ġ"), ("f", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {
    "bytes": BYTES,
    "trained": load_tokenizer("train:400", TEXTS),
    "sentencepiece": sentencepiece(),
    "merged across": merged_across(),
}


def text_of(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def written(tokenizer: PreTrainedTokenizerFast, prompt: RecallPrompt, choice: int) -> str:
    """The last line of a prompt that goes on with a choice."""
    return text_of(tokenizer, prompt.prompt + prompt.choices[choice]).rpartition("\n")[2].strip()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("task", RECALL_TASKS)
@pytest.mark.parametrize("length", [317, 400])
def test_a_prompt_has_exactly_the_length_and_holds_the_line_it_asks_for(tokenizer, task: str, length: int) -> None:
    prompts = recall_prompts(task, tokenizer, TEXTS, length=length, count=5, num_choices=3)
    assert len(prompts) == 5
    for prompt in prompts:
        assert len(prompt.prompt) == length
        answered = [written(tokenizer, prompt, choice) for choice in range(3)]
        before = text_of(tokenizer, prompt.prompt)
        assert [answer in before for answer in answered] == [choice == prompt.answer for choice in range(3)]
        fact = text_of(tokenizer, prompt.prompt[prompt.fact_position :])
        assert fact.lstrip().startswith(answered[prompt.answer])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("task", RECALL_TASKS)
def test_the_question_holds_nothing_of_the_answer(tokenizer, task: str) -> None:
    """Were the answers' common beginning part of the question, fewer answers would be right by chance."""
    for prompt in recall_prompts(task, tokenizer, TEXTS, length=400, count=8, num_choices=3):
        question = text_of(tokenizer, prompt.prompt).rpartition("\n")[2].rstrip()
        assert question.endswith(("of", "o", ":")) or question.split()[-1] in LAST_NAMES.split()
        answers = [text_of(tokenizer, choice) for choice in prompt.choices]
        full = [written(tokenizer, prompt, choice) for choice in range(3)]
        wanted = [line.rpartition(" ")[2] for line in full]
        assert all(want in answer for want, answer in zip(wanted, answers, strict=True))
        assert len(set(prompt.choices)) == 3


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_equal_seeds_give_equal_prompts(task: str) -> None:
    def draw(seed: int, count: int = 4) -> list[RecallPrompt]:
        return recall_prompts(task, BYTES, TEXTS, length=400, count=count, num_choices=4, seed=seed)

    assert draw(1) == draw(1)
    assert draw(1) == draw(1, count=6)[:4]
    assert not set(draw(1)) & set(draw(2))


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_facts_stand_at_all_depths(task: str) -> None:
    prompts = recall_prompts(task, BYTES, TEXTS, length=600, count=5, num_choices=4)
    assert [prompt.depth for prompt in prompts] == [0, 0.25, 0.5, 0.75, 1]
    positions = [prompt.fact_position for prompt in prompts]
    assert positions == sorted(positions)
    assert positions[0] < 150
    assert positions[-1] > 400


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_the_right_answer_is_anywhere_among_the_choices(task: str) -> None:
    prompts = recall_prompts(task, BYTES, TEXTS, length=300, count=100, num_choices=4)
    places = Counter(prompt.answer for prompt in prompts)
    # Binomial, 100 draws of 1/4: 25 with a standard deviation of 4.3; five of them are never seen.
    assert all(4 <= places[place] <= 46 for place in range(4))


def test_every_number_to_choose_from_is_in_the_book() -> None:
    for prompt in recall_prompts("phone-book", BYTES, TEXTS, length=500, count=5, num_choices=6):
        book = text_of(BYTES, prompt.prompt).partition("Phone book")[2]
        assert all(text_of(BYTES, choice).strip() in book for choice in prompt.choices)


def test_a_book_fills_its_prompt_and_the_rest_is_text() -> None:
    short, long = (recall_prompts("phone-book", BYTES, TEXTS, length=n, count=1)[0] for n in (300, 2000))
    lines = [text_of(BYTES, prompt.prompt).partition("Phone book")[2].count(":") for prompt in (short, long)]
    assert lines[1] > 2000 / 25 > 300 / 20 > lines[0]  # of 20 to 25 bytes each
    assert len(text_of(BYTES, long.prompt).partition("Phone book")[0]) < 60


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("task", RECALL_TASKS)
def test_the_shortest_length_is_the_shortest(tokenizer, task: str) -> None:
    shortest = shortest_recall(task, tokenizer, count=3, num_choices=3)
    prompts = recall_prompts(task, tokenizer, TEXTS, length=shortest, count=3, num_choices=3)
    assert {len(prompt.prompt) for prompt in prompts} == {shortest}
    with pytest.raises(InputError, match=f"length={shortest - 1} is too short.*at least {shortest} tokens"):
        recall_prompts(task, tokenizer, TEXTS, length=shortest - 1, count=3, num_choices=3)


def test_a_document_begins_where_the_tokenizer_begins_one() -> None:
    for bos in (True, False):
        (prompt,) = recall_prompts("needle", sentencepiece(bos), TEXTS, length=200, count=1)
        assert (prompt.prompt[0] == 0) is bos


def test_short_texts_are_put_behind_each_other() -> None:
    (prompt,) = recall_prompts("needle", BYTES, ["abc", "def"], length=500, count=1)
    hay = text_of(BYTES, prompt.prompt).partition("\n")[2]
    assert set(hay.rpartition(".\n")[2].partition("\n")[0]) <= set("abcdef")


def test_names_are_distinct_and_none_begins_another() -> None:
    for words in (FIRST_NAMES.split(), LAST_NAMES.split(), PLACES.split()):
        assert len(set(words)) == len(words)
    places = PLACES.split()
    assert not [(a, b) for a in places for b in places if a != b and b.startswith(a)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "hay"}, "no recall task 'hay'; choose needle or phone-book"),
        ({"count": 0}, "count=0"),
        ({"num_choices": 1}, "num_choices=1 must be between 2 and 39"),
        ({"depths": (0.5, 2)}, "depths="),
        ({"texts": "one text"}, "pass a list of texts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"task": "needle", "tokenizer": BYTES, "texts": TEXTS, "length": 200, "count": 1} | changes
    with pytest.raises(InputError, match=message):
        recall_prompts(**arguments)


def test_no_text_is_an_error() -> None:
    with pytest.raises(CorpusError, match="no text to hide facts in"):
        recall_prompts("needle", BYTES, [" ", ""], length=200, count=1)
