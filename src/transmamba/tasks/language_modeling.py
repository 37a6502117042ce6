"""Language modelling: how well a model predicts the next token, per token, per byte and by position.

Position is that of the token read last, counted within its document: a layer with TransPoint P is in attention for the
positions below P and in its SSM from P on.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.progress import progress_bar

__all__ = ["Evaluation", "PositionLoss", "Windows", "evaluate_language_model"]

IGNORE_INDEX = -100  # a label that is not predicted; Hugging Face's convention
LOGITS_AT_ONCE = 1 << 24  # elements: 64 MiB in fp32


class Windows(Protocol):
    """Windows of tokens, such as a PackedDataset; an item has input_ids, labels and position_ids, each (seq_len,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]: ...

    def num_bytes(self, index: int | None = None) -> int:
        """Bytes of text in the predicted tokens of a window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLoss:
    """The mean loss, in nats per token, of `num_tokens` predictions made at positions start <= position < end."""

    start: int
    end: int
    loss: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a model scores on a set of windows.

    loss: nats per predicted token. bits_per_byte: total loss over the bytes of text predicted, which compares models
    with different tokenizers; NaN where no text was predicted. loss_by_position: in bins that double, empty ones left
    out. loss_at_position: (position, nats per token, predicted tokens), for every position where there are any.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    loss_by_position: tuple[PositionLoss, ...]
    loss_at_position: tuple[tuple[int, float, int], ...]


@torch.no_grad()
def evaluate_language_model(
    model: PreTrainedModel,
    dataset: Windows,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Score a causal language model of any kind on packed windows, in the model's own dtype.

    batch_size: windows at a time; the results do not depend on it beyond rounding. max_tokens: read no more windows
    than hold so many tokens (at least one), evenly spread over the data set. device: where the model is moved to;
    None leaves it where it is.

    Raises:
        InputError: nothing to predict, a number out of range, or a model that cannot tell packed documents apart.
    """
    indices = chosen_windows(dataset, batch_size, max_tokens)
    if device is not None:
        model.to(device)
    seq_len = dataset[indices[0]]["input_ids"].shape[0]
    sums = torch.zeros(seq_len, dtype=torch.float64)
    counts = torch.zeros(seq_len, dtype=torch.int64)
    num_bytes = 0
    was_training = model.training
    model.eval()
    try:
        with progress_bar("Evaluating", len(indices)) as advance:
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                positions, losses = _token_losses(model, stack_windows(dataset, chosen))
                sums.index_add_(0, positions, losses.double())
                counts += torch.bincount(positions, minlength=seq_len)
                num_bytes += sum(dataset.num_bytes(index) for index in chosen)
                advance(len(chosen))
    finally:
        model.train(was_training)
    return evaluation_of(sums, counts, num_bytes)


def evaluation_of(sums: Tensor, counts: Tensor, num_bytes: int) -> Evaluation:
    """The evaluation of summed losses and predicted tokens by position, both (seq_len,)."""
    num_tokens = int(counts.sum())
    if not num_tokens:
        raise InputError(
            "there is nothing to predict: every label is -100. Give windows with documents of two tokens or more."
        )
    total = float(sums.sum())
    bins = []
    for start, end in doubling_bins(len(counts)):
        count = int(counts[start:end].sum())
        if count:
            loss = float(sums[start:end].sum()) / count
            bins.append(PositionLoss(start=start, end=end, loss=loss, num_tokens=count))
    seen = counts.nonzero().flatten().tolist()
    return Evaluation(
        loss=total / num_tokens,
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else math.nan,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        loss_by_position=tuple(bins),
        loss_at_position=tuple((at, float(sums[at]) / int(counts[at]), int(counts[at])) for at in seen),
    )


def chosen_windows(dataset: Windows, batch_size: int, max_tokens: int | None) -> list[int]:
    """Indices of the windows to read: all, or evenly spread ones that hold max_tokens; checks both numbers."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens} must be at least 1; leave it out to read everything.")
    total = len(dataset)
    if not total:
        raise InputError("the data set has no windows; give more text or a shorter seq_len.")
    wanted = total if max_tokens is None else max(1, max_tokens // dataset[0]["input_ids"].shape[0])
    wanted = min(wanted, total)
    return [number * total // wanted for number in range(wanted)]


def stack_windows(dataset: Windows, indices: Sequence[int]) -> dict[str, Tensor]:
    """A batch of windows: each tensor of their items, (windows, seq_len)."""
    windows = [dataset[index] for index in indices]
    return {name: torch.stack([window[name] for window in windows]) for name in windows[0]}


@dataclass(frozen=True, slots=True)
class PredictedTokens:
    """The predicted tokens of a batch, as a model is about to score them; all tensors have `tokens` rows.

    positions, windows: of the token read last, within its document, and in the batch; on the CPU. targets: the token
    predicted. logits_of makes logits (rows, vocab_size), fp32 or fp64, of some of the rows.
    """

    positions: Tensor
    windows: Tensor
    targets: Tensor
    rows: Tensor
    logits_of: Callable[[Tensor], Tensor]


def predicted_tokens(model: PreTrainedModel, batch: dict[str, Tensor]) -> PredictedTokens:
    """Run a model on a batch of windows, up to its head."""
    labels = batch["labels"][:, 1:]
    predicted = labels != IGNORE_INDEX
    inputs = {"input_ids": batch["input_ids"].to(model.device)}
    if _accepts_positions(model):
        inputs["position_ids"] = batch["position_ids"].to(model.device)
    elif (batch["position_ids"][:, 1:] == 0).any():
        raise InputError(
            f"{type(model).__name__} takes no position_ids, so it cannot tell the documents of a window apart; pack "
            "with boundaries=False."
        )
    rows, head = _rows_and_head(model, inputs, predicted.to(model.device))
    return PredictedTokens(
        positions=batch["position_ids"][:, :-1][predicted],
        windows=predicted.nonzero()[:, 0],
        targets=labels[predicted].to(model.device),
        rows=rows,
        logits_of=lambda some: _at_least_fp32(head(some)),
    )


def _token_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The position and the loss of every predicted token of a batch, both (tokens,), on the CPU."""
    tokens = predicted_tokens(model, batch)
    step = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    losses = [
        cross_entropy(
            tokens.logits_of(tokens.rows[start : start + step]),
            tokens.targets[start : start + step],
            reduction="none",
        )
        for start in range(0, len(tokens.targets), step)
    ]
    return tokens.positions, torch.cat([*losses, tokens.targets.new_zeros(0, dtype=torch.float32)]).cpu()


def _rows_and_head(
    model: PreTrainedModel, inputs: dict[str, Tensor], predicted: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows, one for each predicted token, and what makes logits of them.

    Of our own model, rows are hidden states, so that the logits of a whole batch never exist. Others may scale or cap
    their logits, which only their forward knows.
    """
    if isinstance(model, TransMambaForCausalLM):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return hidden[:, :-1][predicted], model.lm_head
    logits = model(**inputs, use_cache=False).logits
    return logits[:, :-1][predicted], lambda rows: rows


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _accepts_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def doubling_bins(seq_len: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8) and so on, the last one cut at `seq_len`."""
    start, end = 0, 1
    while start < seq_len:
        yield start, min(end, seq_len)
        start, end = end, 2 * end
