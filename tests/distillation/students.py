"""A tiny source, its lossless student and a batch of packed windows."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conversion.checkpoints import tiny_source, token_ids
from transmamba.conversion import convert
from transmamba.models import TransMambaForCausalLM

SEQ_LEN = 24


def pair(name: str = "Llama", schedule: Any = (0, 5, None)) -> tuple[PreTrainedModel, TransMambaForCausalLM]:
    """A source and its student, whose state space says something."""
    source = tiny_source(name)
    student, _ = convert(source, schedule=list(schedule), initialisation="local")
    return source, student


def packed_batch(*, boundaries: bool = True, rows: int = 2) -> dict[str, Tensor]:
    """Two windows; with boundaries, the first holds documents of 13 and 11 tokens."""
    ids = token_ids(rows, SEQ_LEN)
    positions = torch.arange(SEQ_LEN).expand(rows, SEQ_LEN).clone()
    if boundaries:
        positions[0, 13:] = torch.arange(SEQ_LEN - 13)
    labels = torch.where(positions > 0, ids, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}
