"""The teacher of the last stage: any causal language model; only its distribution of the next token is read."""

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmamba.distillation.losses import DenseTarget, GivenTarget, LogitTarget
from transmamba.errors import InputError

PROBE = 16  # tokens on which it is checked that logits are head(hidden)


class Teacher(Protocol):
    """What a stage asks of a teacher."""

    def target(self, batch: dict[str, Tensor], counts: Tensor) -> LogitTarget:
        """What the teacher says at the places of the batch where counts, (batch, seq_len) bool, is true, in order."""


class OnlineTeacher:
    """A causal language model that runs beside the student, frozen.

    Where its logits are its head's product with its last hidden states, and nothing more, they are made a few rows at
    a time; a model that scales or caps them has to make all of a batch at once. vocab_size: how many leading entries
    stand for tokens, where the head is padded; None = all.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size or model.config.get_text_config().vocab_size
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.head = self._plain_head()

    @torch.no_grad()
    def target(self, batch: dict[str, Tensor], counts: Tensor) -> DenseTarget | GivenTarget:
        """What the model says at the places of the batch where counts is true."""
        inputs = {"input_ids": batch["input_ids"]}
        if self.takes_positions:
            inputs["position_ids"] = batch["position_ids"]
        elif bool((batch["position_ids"][:, 1:] == 0).any()):
            raise InputError(
                f"{type(self.model).__name__} takes no position_ids, so it cannot tell the documents of a window "
                "apart; set document_boundaries=false."
            )
        if self.head is None:
            return GivenTarget(self.model(**inputs, use_cache=False).logits[..., : self.vocab_size][counts])
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[counts]
        weight = self.head.weight[: self.vocab_size]
        bias = None if self.head.bias is None else self.head.bias[: self.vocab_size]
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        return DenseTarget(hidden.to(weight.dtype), weight, bias)

    @torch.no_grad()
    def _plain_head(self) -> nn.Linear | None:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or self.model.base_model is self.model:
            return None
        tokens = torch.arange(PROBE, device=self.model.device)[None] % self.model.config.get_text_config().vocab_size
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return head if torch.equal(head(hidden), logits) else None
