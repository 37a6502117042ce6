"""What a BERT-type sentence encoder says about texts: its embedding, and the tokens in and after every block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, PreTrainedModel

from transmamba.errors import InputError


@dataclass(frozen=True)
class TextSignals:
    """One forward pass of a teacher.

    embedding (batch, hidden_size): the mean token, of length 1, fp32. tokens: after each block, and attention: what
    each block's attention gives before its output projection, (batch, seq_len, hidden_size).
    """

    embedding: Tensor
    tokens: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]


class TextTeacher:
    """A BERT that runs beside the student, frozen.

    Raises:
        InputError: it is of another family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model.config, BertConfig):
            raise InputError(f"{type(model).__name__} is no teacher of sentence encoders; give a BERT of transformers.")
        self.model = model.eval().requires_grad_(False)
        backbone: Any = model.base_model
        self.blocks: list[Any] = list(backbone.encoder.layer)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def longest(self) -> int:
        """The tokens of the longest text it reads."""
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> TextSignals:
        """Run on input_ids and attention_mask, both (batch, seq_len)."""
        if input_ids.shape[1] > self.longest:
            raise InputError(
                f"the teacher reads at most {self.longest} tokens and these rows have {input_ids.shape[1]}; set "
                f"seq_len to {self.longest} or less."
            )
        attention: list[Tensor] = []
        with self._watched(attention):
            out: Any = self.model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
            )
        weights = attention_mask[..., None].float()
        last = out.hidden_states[-1].float()
        mean = (last * weights).sum(1) / weights.sum(1).clamp(min=1)
        return TextSignals(
            embedding=normalize(mean, dim=-1), tokens=tuple(out.hidden_states[1:]), attention=tuple(attention)
        )

    @contextmanager
    def _watched(self, seen: list[Tensor]) -> Iterator[None]:
        handles = [block.attention.output.dense.register_forward_pre_hook(_keep(seen)) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _keep(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    return hook
