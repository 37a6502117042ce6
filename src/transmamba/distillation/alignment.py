"""How far a layer of the student is from the same layer of its teacher, token by token, on one and the same input.

`output_errors` compares what the mixers write, `matrix_errors` the matrices with which they mix tokens (the first stage
of MOHAWK, arXiv 2408.10189, section 4.1, for a layer that is attention before its TransPoint).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transmamba.distillation.signals import MixerSignal
from transmamba.modules import RotaryTables, TransMambaMixer
from transmamba.ops import apply_rotary

LayerErrors = Callable[[TransMambaMixer, MixerSignal, TransMambaMixer, MixerSignal], Tensor]


def output_errors(student: TransMambaMixer, ours: MixerSignal, teacher: TransMambaMixer, theirs: MixerSignal) -> Tensor:
    """Return |student - teacher|^2 over the mean |teacher|^2 of every token, (batch, seq_len) or (1, tokens), fp32."""
    exact = theirs.output.float()
    error = (ours.output.float() - exact).square().sum(-1)
    return error / exact.square().sum(-1).mean().clamp(min=torch.finfo(torch.float32).tiny)


def matrix_errors(student: TransMambaMixer, ours: MixerSignal, teacher: TransMambaMixer, theirs: MixerSignal) -> Tensor:
    """Return the squared distance between the rows of the state space's matrix and of the teacher's attention matrix.

    (batch, seq_len) or (1, tokens), fp32, the mean over heads. The matrices of one document exist at a time, and are
    made again in the backward pass: heads x length^2 numbers each. With S the running sum of dt A, the state space
    has exp(S_i - S_j) dt_j (q_i . k_j) at i, j <= i, and D more at i = j; softmax has its weights.
    """
    layout = ours.layout
    q, k, _ = student.project(ours.hidden, layout)
    dt, A = student.step_sizes(ours.hidden)
    with torch.no_grad():
        exact_q, exact_k, _ = teacher.project(theirs.hidden, theirs.layout)
        exact_q, exact_k = _rotated(exact_q, exact_k, theirs.rotary if teacher.config.rotary else None)
    q, k = _rotated(q, k, ours.rotary if student.config.rotary and student.config.ssm_rope else None)
    borders = layout.borders or tuple(range(0, layout.batch * layout.seq_len + 1, layout.seq_len))
    flat = [x.flatten(0, 1) for x in (q, k, dt, exact_q, exact_k)]
    errors = [
        checkpoint(_document_errors, *(x[start:end] for x in flat), A, student.D, use_reentrant=False)
        for start, end in pairwise(borders)
        if end > start
    ]
    return torch.cat(errors).view(ours.hidden.shape[:2])


def suffix_mean(
    errors: Sequence[Tensor], signals: Sequence[MixerSignal], trans_points: Sequence[int | None], counts: Tensor
) -> Tensor:
    """Return the sum over tokens of the mean over layers, of the tokens from each layer's TransPoint on.

    counts: which tokens count, bool, in the layout's form. Layers that do not switch here have no part in it.
    """
    total = counts.new_zeros((), dtype=torch.float32)
    for error, signal, point in zip(errors, signals, trans_points, strict=True):
        if point is not None and point < signal.layout.longest:
            total = total + torch.sum(error * (counts & (signal.layout.positions() >= point)))
    return total / len(errors)


def _rotated(q: Tensor, k: Tensor, rotary: RotaryTables | None) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return q, k
    return apply_rotary(q, rotary.cos, rotary.sin), apply_rotary(k, rotary.cos, rotary.sin)


def _document_errors(
    q: Tensor, k: Tensor, dt: Tensor, exact_q: Tensor, exact_k: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """Of one document; q, k (length, heads, head_dim), dt (length, heads), A (heads,), D (heads,) -> (length,)."""
    length, heads = q.shape[:2]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        scores = _scores(exact_q.float(), exact_k.float()) / exact_q.shape[-1] ** 0.5
        attention = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    with torch.autocast(q.device.type, enabled=False):
        total = torch.cumsum(dt * A, dim=0).T  # (heads, length)
        decay = torch.exp((total[:, :, None] - total[:, None, :]).masked_fill(~causal, float("-inf")))
        mixing = _scores(q.float(), k.float()) * (decay * dt.T[:, None, :]).repeat_interleave(heads // dt.shape[1], 0)
        mixing = mixing + torch.diag_embed(D.float()[:, None].expand(heads, length))
        return (mixing - attention).square().sum(-1).mean(0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("ihd,jhd->hij", q, k)
