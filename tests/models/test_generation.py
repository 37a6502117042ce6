"""Generation: every token is the argmax (or draw) of the full forward pass, however batched, cached or searched."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tests.helpers import DEVICE
from tests.models.language_models import TRANS_POINT, VARIANTS, shared_model, tiny_model, tokens
from transmamba import TransMambaForCausalLM
from transmamba.errors import InputError

PAD = 0
NEW = 8  # with prompts of 5, generation crosses the TransPoint


def generate(model: TransMambaForCausalLM, ids: Tensor, **given: Any) -> Tensor:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | given)


@pytest.mark.parametrize("prompt_length", [1, 5, TRANS_POINT, TRANS_POINT + 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_the_argmax_of_the_full_forward(variant: str, prompt_length: int) -> None:
    model, ids = shared_model(variant, torch.float64), tokens(2, prompt_length)
    out = generate(model, ids)
    assert out.shape == (2, prompt_length + NEW)
    assert torch.equal(out[:, :prompt_length], ids)
    best = model(out, use_cache=False).logits.argmax(dim=-1)
    assert torch.equal(out[:, prompt_length:], best[:, prompt_length - 1 : -1])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_generation_is_the_same_with_and_without_cache(given: dict[str, Any]) -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        outputs.append(generate(model, ids, use_cache=use_cache, **given))
    assert outputs[0].shape == (2 * given.get("num_return_sequences", 1), 5 + NEW)
    assert torch.equal(*outputs)


def test_sampling_depends_on_the_seed_alone() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(generate(model, ids, do_sample=True))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("variant", ["default", "standard form", "rope in both modes"])
def test_a_left_padded_batch_generates_what_its_rows_do(variant: str, num_beams: int) -> None:
    model, ids = shared_model(variant, torch.float64), tokens(3, 9)
    lengths = (9, 5, 2)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : 9 - length], ids[row, : 9 - length] = 0, PAD
    together = generate(model, ids, attention_mask=mask, num_beams=num_beams)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 9 - length :], num_beams=num_beams)
        assert torch.equal(together[row, 9:], alone[0, length:])


def test_prompts_may_be_embeddings() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    embeds = model.get_input_embeddings()(ids)
    for use_cache in (True, False):
        new = model.generate(
            inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, use_cache=use_cache
        )
        assert torch.equal(new, generate(model, ids)[:, 5:])


def test_generation_goes_on_from_a_cache() -> None:
    model, ids = shared_model("default", torch.float64), tokens(1, 5)
    whole = generate(model, ids, max_new_tokens=12)
    first = generate(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 10
    rest = generate(model, first.sequences, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


def test_prefill_may_come_in_chunks() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 12)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))


def test_scores_are_the_logits_of_the_full_forward() -> None:
    model, ids = shared_model("default", torch.float64), tokens(1, 5)
    out = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    full = model(out.sequences, use_cache=False).logits[:, 4:-1]
    assert torch.allclose(torch.stack(out.logits, dim=1), full.float(), rtol=1e-5, atol=1e-6)


def test_a_stop_token_stops_its_row() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    free = generate(model, ids)
    stop = free[0, 7].item()
    assert stop not in free[0, 5:7]
    out = generate(model, ids[:1], eos_token_id=stop)
    assert torch.equal(out, free[:1, :8])


class Collector(BaseStreamer):
    """Keep what a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token_as_it_comes() -> None:
    model, ids = shared_model("default", torch.float64), tokens(1, 5)
    streamer = Collector()
    out = generate(model, ids, streamer=streamer)
    assert [len(piece) for piece in streamer.pieces] == [5] + [1] * NEW
    assert torch.equal(torch.cat(streamer.pieces), out[0].cpu())
    assert streamer.ended


@pytest.mark.parametrize("schedule", ["transformer", "mamba2", [6, 8, 10]], ids=str)
def test_another_schedule_generates_as_its_own_full_forward(schedule: str | list[int]) -> None:
    model = tiny_model(torch.float64).requires_grad_(False)
    model.set_trans_points(schedule)
    out = generate(model, tokens(1, 5))
    assert torch.equal(out[:, 5:], model(out, use_cache=False).logits.argmax(-1)[:, 4:-1])


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_caches_are_refused(implementation: str) -> None:
    with pytest.raises(InputError, match=f"cache_implementation='{implementation}' does not fit TransMamba"):
        generate(shared_model("default", torch.float32), tokens(1, 5), cache_implementation=implementation)


def test_assisted_generation_is_refused_with_its_reason() -> None:
    model = shared_model("default", torch.float32)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, tokens(1, 5), assistant_model=model)


def test_generation_in_bf16_runs_across_the_trans_point() -> None:
    out = generate(tiny_model(torch.bfloat16), tokens(2, 5))
    assert out.shape == (2, 5 + NEW)
    assert out.device.type == DEVICE.type
