"""Evaluation against a computation token by token."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from transmamba.data import PackedDataset, load_tokenizer, pack_documents
from transmamba.errors import InputError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.tasks import evaluate_language_model

DOCUMENTS = ["a state space", "is ättention", "x", "that forgets nothing " * 5, "up to a point"]
SEQ_LEN = 24


def windows(*, tokenizer: str = "bytes", boundaries: bool = True) -> PackedDataset:
    return pack_documents(DOCUMENTS, load_tokenizer(tokenizer), SEQ_LEN, boundaries=boundaries, drop_last=False)


def ours() -> TransMambaForCausalLM:
    config = TransMambaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=SEQ_LEN,
        trans_points=[0, 5, None],
        initializer_range=0.2,  # logits far from uniform, so that a mistaken token shows
    )
    return TransMambaForCausalLM(config).double()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double()


@torch.no_grad()
def token_by_token(model: PreTrainedModel, dataset: PackedDataset) -> list[tuple[int, float]]:
    """(position of the token read last, loss of the next) for every predicted token, one prefix at a time."""
    model.eval()
    found = []
    for index in range(len(dataset)):
        window = dataset[index]
        ids, labels, positions = (window[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        for place in range(1, dataset.seq_len):
            if labels[place] != -100:
                start = place - 1 - positions[place - 1]
                logits = model(torch.tensor([ids[start:place]]), use_cache=False).logits[0, -1]
                found.append((positions[place - 1], -torch.log_softmax(logits, -1)[labels[place]].item()))
    return found


@pytest.mark.parametrize("make", [ours, llama])
def test_scores_are_those_of_a_computation_token_by_token(make) -> None:
    model, dataset = make(), windows()
    expected = token_by_token(model, dataset)
    score = evaluate_language_model(model, dataset, batch_size=3)
    total = sum(loss for _, loss in expected)
    # Every loss is exact to some 2^-45 in fp64; a token too many or too few moves the mean by 1 %.
    assert score.loss == pytest.approx(total / len(expected), rel=1e-10)
    assert score.num_tokens == len(expected)
    assert score.num_bytes == dataset.num_bytes()
    assert score.bits_per_byte == pytest.approx(total / math.log(2) / dataset.num_bytes(), rel=1e-10)
    for position, loss, count in score.loss_at_position:
        losses = [value for at, value in expected if at == position]
        assert (loss, count) == (pytest.approx(sum(losses) / len(losses), rel=1e-10), len(losses))
    for row in score.loss_by_position:
        losses = [value for at, value in expected if row.start <= at < row.end]
        assert (row.loss, row.num_tokens) == (pytest.approx(sum(losses) / len(losses), rel=1e-10), len(losses))


def test_bins_double_and_leave_out_nothing() -> None:
    score = evaluate_language_model(ours(), windows())
    assert [(row.start, row.end) for row in score.loss_by_position] == [
        (0, 1),
        (1, 2),
        (2, 4),
        (4, 8),
        (8, 16),
        (16, 24),
    ]
    assert sum(row.num_tokens for row in score.loss_by_position) == score.num_tokens
    assert sum(count for _, _, count in score.loss_at_position) == score.num_tokens


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = ours()
    score, other = (evaluate_language_model(model, windows(), batch_size=size) for size in (3, batch_size))
    assert other.loss == pytest.approx(score.loss, rel=1e-12)
    assert other.num_tokens == score.num_tokens


def test_the_vocabulary_is_read_in_pieces_that_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    score = evaluate_language_model(model, windows())
    monkeypatch.setattr("transmamba.tasks.language_modeling.LOGITS_AT_ONCE", 3 * 257)
    assert evaluate_language_model(model, windows()).loss == pytest.approx(score.loss, rel=1e-12)


def test_bits_per_byte_compare_between_tokenizers() -> None:
    """A model that knows nothing spends log2(vocabulary) on every token, and the ends of documents have no bytes."""
    for spec in ("bytes", "train:300"):
        tokenizer = load_tokenizer(spec, DOCUMENTS)
        dataset = pack_documents(DOCUMENTS, tokenizer, SEQ_LEN, drop_last=False)
        config = TransMambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=SEQ_LEN,
            trans_points=[0],
        )
        model = TransMambaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        score = evaluate_language_model(model, dataset)
        assert score.loss == pytest.approx(math.log(len(tokenizer)), rel=1e-5)
        bits = score.num_tokens * math.log2(len(tokenizer))
        assert score.bits_per_byte == pytest.approx(bits / dataset.num_bytes(), rel=1e-5)


class Counted:
    """Windows that remember which of them were read."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.add(index)
        return self.dataset[index]

    def num_bytes(self, index: int | None = None) -> int:
        return self.dataset.num_bytes(index)


@pytest.mark.parametrize(("max_tokens", "read"), [(1, {0}), (3 * SEQ_LEN, {0, 2, 4}), (10**6, {0, 1, 2, 3, 4, 5, 6})])
def test_max_tokens_reads_windows_spread_over_the_data(max_tokens: int, read: set[int]) -> None:
    dataset = Counted(windows())
    score = evaluate_language_model(ours(), dataset, max_tokens=max_tokens)
    assert dataset.read == read
    assert score.num_bytes == sum(dataset.num_bytes(index) for index in read)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    model = ours().train(training)
    evaluate_language_model(model, windows())
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def mamba2() -> Mamba2ForCausalLM:
    config = Mamba2Config(
        vocab_size=257,
        hidden_size=16,
        state_size=8,
        num_hidden_layers=1,
        num_heads=2,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    )
    return Mamba2ForCausalLM(config)


def test_a_model_without_positions_gets_whole_windows_only() -> None:
    with pytest.raises(InputError, match=r"Mamba2ForCausalLM takes no position_ids.*boundaries=False"):
        evaluate_language_model(mamba2(), windows())
    dataset = windows(boundaries=False)
    assert evaluate_language_model(mamba2(), dataset).num_tokens == dataset.num_tokens - len(dataset)


class NothingPredicted(Counted):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.dataset[index], "labels": torch.full((SEQ_LEN,), -100)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size=0 must be at least 1"), ({"max_tokens": 0}, "max_tokens=0 must be at least 1")],
)
def test_numbers_out_of_range_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_language_model(ours(), windows(), **settings)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        evaluate_language_model(ours(), NothingPredicted(windows()))
