"""Continue a prompt token by token, knowing at which positions layers switch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a model wrote: pieces of text with the position of their first token, beginning where the prompt ends."""

    prompt: str
    prompt_tokens: int
    pieces: tuple[tuple[int, str], ...]
    cache_bytes: int  # at the end

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def end(self) -> int:
        """Position behind the last piece's first token."""
        return (self.pieces[-1][0] if self.pieces else self.prompt_tokens - 1) + 1


def continue_prompt(
    model: TransMambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = 0,
    stop_at_end: bool = True,
    on_piece: Callable[[int, str], None] | None = None,
) -> Continuation:
    """Write on after `prompt`; every finished piece of text goes to on_piece(position, text) as it is written.

    temperature 0 takes the likeliest token; top_p samples among the likeliest that hold this share. stop_at_end: stop
    where the model ends its document. An empty prompt starts a new document. seed None leaves the generator as it is.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if temperature < 0:
        raise InputError(f"temperature={temperature} must be at least 0; 0 takes the likeliest token.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} must be above 0 and at most 1; 1 samples among all tokens.")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.tensor([[tokenizer.eos_token_id]])
    if seed is not None:
        torch.manual_seed(seed)
    pieces = _Pieces(tokenizer, ids.shape[1], on_piece)
    sampling = (
        {"do_sample": False}
        if temperature == 0
        else {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    )
    was_training = model.training
    model.eval()
    try:
        outputs = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id if stop_at_end else [],
            pad_token_id=tokenizer.pad_token_id,
            streamer=pieces,
            return_dict_in_generate=True,
            **sampling,
        )
    finally:
        model.train(was_training)
    return Continuation(
        prompt=prompt,
        prompt_tokens=ids.shape[1],
        pieces=tuple(pieces.finished),
        cache_bytes=outputs.past_key_values.memory_bytes(),
    )


class _Pieces(BaseStreamer):
    """Turns tokens into text as soon as they make whole characters."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, position: int, on_piece: Callable[[int, str], None] | None
    ) -> None:
        self.tokenizer = tokenizer
        self.on_piece = on_piece
        self.finished: list[tuple[int, str]] = []
        self.position = position
        self.pending: list[int] = []
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        if not self.seen_prompt:  # transformers hands over the prompt first
            self.seen_prompt = True
            return
        self.pending += value.flatten().tolist()
        text = self._decode()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._finish(text)

    def end(self) -> None:
        if self.pending:
            self._finish(self._decode())

    def _decode(self) -> str:
        return self.tokenizer.decode(self.pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _finish(self, text: str) -> None:
        if text:
            self.finished.append((self.position, text))
            if self.on_piece is not None:
                self.on_piece(self.position, text)
        self.position += len(self.pending)
        self.pending = []
