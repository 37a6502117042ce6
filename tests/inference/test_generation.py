"""Continuing a prompt: text, positions, streams, and what is refused."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from transmamba import TransMambaConfig, TransMambaForCausalLM
from transmamba.data import load_tokenizer
from transmamba.errors import InputError
from transmamba.inference import continue_prompt, measure_speed


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> TransMambaForCausalLM:
    torch.manual_seed(0)
    config = TransMambaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        trans_points=[0, 12, None],
        eos_token_id=256,
        pad_token_id=256,
    )
    return TransMambaForCausalLM(config).eval()


def test_greedy_text_is_that_of_the_full_forward_pass(model, tokenizer) -> None:
    result = continue_prompt(model, tokenizer, "abcdefgh", max_new_tokens=12, temperature=0, stop_at_end=False)
    ids = tokenizer("abcdefgh", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert result.text == tokenizer.decode(ids[0, 8:], skip_special_tokens=True)
    assert result.prompt_tokens == 8


def test_pieces_are_streamed_in_order_with_their_positions(model, tokenizer) -> None:
    streamed: list[tuple[int, str]] = []
    result = continue_prompt(
        model,
        tokenizer,
        "ab",
        max_new_tokens=30,
        seed=1,
        stop_at_end=False,
        on_piece=lambda at, text: streamed.append((at, text)),
    )
    positions = [position for position, _ in result.pieces]
    assert tuple(streamed) == result.pieces
    assert positions == sorted(set(positions))
    assert positions[0] >= 2
    assert positions[-1] < 32


def test_characters_of_several_tokens_come_whole(model, tokenizer, monkeypatch) -> None:
    written = tokenizer("é€", add_special_tokens=False)["input_ids"]  # two and three bytes, a token each

    def generate(ids: torch.Tensor, *, streamer, **options: object) -> object:
        streamer.put(ids)
        for token in written:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return type("Outputs", (), {"past_key_values": model.make_cache()})

    monkeypatch.setattr(model, "generate", generate)
    assert continue_prompt(model, tokenizer, "ab").pieces == ((2, "é"), (4, "€"))


def test_equal_seeds_write_equal_text(model, tokenizer) -> None:
    texts = [continue_prompt(model, tokenizer, "ab", max_new_tokens=20, seed=seed).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_begins_a_document(model, tokenizer) -> None:
    assert continue_prompt(model, tokenizer, "", max_new_tokens=4).prompt_tokens == 1


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str
)
def test_values_out_of_range_are_refused_by_name(model, tokenizer, wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        continue_prompt(model, tokenizer, "ab", **wrong)


def test_speed_is_measured_at_every_length_and_the_cache_counted(model) -> None:
    points = measure_speed(model, [4, 40], decode_steps=3, repeats=1)
    assert [point.length for point in points] == [4, 40]
    assert all(point.prefill_tokens_per_second > 0 and point.decode_tokens_per_second > 0 for point in points)
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.zeros(1, 40, dtype=torch.int64), past_key_values=cache)
    assert points[1].cache_bytes == cache.memory_bytes()
    with pytest.raises(InputError, match="lengths"):
        measure_speed(model, [0])
