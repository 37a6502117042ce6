"""What is tapped inside a student and its teacher: what every mixer reads, and what it makes of that.

The teacher here is a TransMamba whose TransPoints are all None; right after a lossless conversion that is the source
itself, layer by layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transmamba.models import TransMambaForCausalLM
from transmamba.modules import RotaryTables, TokenLayout, TransMambaMixer


@dataclass(frozen=True)
class MixerSignal:
    """One layer's mixer in one forward pass; tensors are (batch, seq_len, ...) or (1, tokens, ...)."""

    hidden: Tensor
    rotary: RotaryTables | None
    layout: TokenLayout
    output: Tensor


def mixers_of(model: TransMambaForCausalLM) -> list[TransMambaMixer]:
    """The mixers, first layer first."""
    return [cast(Any, layer).mixer for layer in model.model.layers]


@torch.no_grad()
def mixer_signals(teacher: TransMambaForCausalLM, inputs: dict[str, Tensor]) -> list[MixerSignal]:
    """Run the teacher's backbone on what its `forward` takes, and return what every mixer read and wrote."""
    signals: list[MixerSignal] = []

    def record(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        signals.append(MixerSignal(given[0], given[1], given[2], output))

    with _hooks([mixer.register_forward_hook(record) for mixer in mixers_of(teacher)]):
        teacher.model(**inputs, use_cache=False)
    return signals


@contextmanager
def teacher_forced(
    student: TransMambaForCausalLM, signals: Sequence[MixerSignal], watch: Callable[[int, MixerSignal], None]
) -> Iterator[None]:
    """Within, every mixer of the student reads what the teacher's read, and the layers after it the teacher's output.

    watch(layer, signal) is called with what the student's own mixer read and wrote. So the layers learn side by side,
    none through another, while the student's forward runs as a whole.
    """

    def replace_input(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, given: (signals[layer].hidden, *given[1:])

    def replace_output(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def replace(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            watch(layer, MixerSignal(given[0], given[1], given[2], output))
            return signals[layer].output

        return replace

    handles: list[RemovableHandle] = []
    for layer, mixer in enumerate(mixers_of(student)):
        handles.append(mixer.register_forward_pre_hook(replace_input(layer)))
        handles.append(mixer.register_forward_hook(replace_output(layer)))
    with _hooks(handles):
        yield


@contextmanager
def _hooks(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
