"""Speed is of the model's own cache, whose bytes are counted, for our models and others."""

import pytest
import torch

from tests.conversion.checkpoints import tiny_source
from transmamba.conversion import convert
from transmamba.errors import InputError
from transmamba.inference import measure_speed


def test_the_cache_of_a_teacher_is_its_keys_and_values() -> None:
    for point in measure_speed(tiny_source("Llama"), (5, 40), decode_steps=2, repeats=1, batch_size=2):
        # 3 layers, 2 rows, 2 key heads of 8, keys and values, fp32
        assert point.cache_bytes == 3 * 2 * 2 * 8 * 2 * 4 * point.length
        assert point.prefill_tokens_per_second > 0
        assert point.decode_tokens_per_second > 0
        assert (point.peak_bytes is None) == (not torch.cuda.is_available())


def test_the_cache_of_a_student_stops_growing() -> None:
    student, _ = convert(tiny_source("Llama"), schedule=[0, 8, 16], initialisation="local")
    short, long = measure_speed(student, (20, 90), decode_steps=2, repeats=1)
    assert short.cache_bytes == long.cache_bytes
    assert [point.length for point in (short, long)] == [20, 90]


def test_a_teacher_goes_on_from_its_cache() -> None:
    """Each decoding step reads one token."""
    model, read = tiny_source("Qwen3"), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    measure_speed(model, (7,), decode_steps=4, repeats=2)
    assert read == [7, 1, 1, 1, 1] * 3


@pytest.mark.parametrize(
    "settings", [{"lengths": (0,)}, {"batch_size": 0}, {"decode_steps": 1}, {"repeats": 0}], ids=str
)
def test_numbers_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="give lengths, batch_size and repeats >= 1, and decode_steps >= 2"):
        measure_speed(tiny_source("Llama"), **{"lengths": (4,), **settings})
