"""Which channels and neurons of a wide teacher a narrow student keeps: a score for each, and the choice.

Letters: k one index of a named dimension, such as a channel of the residual stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmamba.errors import InputError

from .teachers import RESIDUAL, SubcloningTeacher, open_teacher, run_on

Scores = Mapping[str, Tensor]  # by the name of the dimension; none at all = evenly spaced
SMALLEST = 1e-12  # of a norm that something is divided by

RANKINGS: dict[str, str] = {
    "uniform": "evenly spaced",
    "magnitude": "the summed L2 norm of all rows and columns of k",
    "activation": "the mean absolute activation of k on calibration inputs",
    "stability": "minus the summed relative change of all rows and columns of k in fine-tuning",
}


def rank(
    teacher: SubcloningTeacher,
    ranking: str,
    *,
    pretrained: PreTrainedModel | str | None = None,
    calibration: Tensor | None = None,
) -> Scores:
    """A score for every index of every named dimension, fp64; larger is kept.

    Raises:
        InputError: the ranking is unknown, or lacks what it needs.
    """
    if ranking not in RANKINGS:
        raise InputError(f"ranking={ranking!r} is unknown; choose one of {', '.join(RANKINGS)}.")
    if ranking == "uniform":
        return {}
    if ranking == "magnitude":
        return _sums(teacher, lambda name, value: value)
    if ranking == "stability":
        if pretrained is None:
            raise InputError(
                "ranking='stability' compares the teacher with the model that it was fine-tuned from; give that as "
                "pretrained, or choose 'magnitude'."
            )
        return _stability(teacher, open_teacher(pretrained))
    if calibration is None or not len(calibration):
        raise InputError(
            "ranking='activation' runs the teacher on calibration inputs; give some as calibration, or choose "
            "'magnitude'."
        )
    return _activation(teacher, calibration)


def choose(scores: Tensor | None, size: int, wanted: int, available: Sequence[int] | None = None) -> tuple[int, ...]:
    """`wanted` of the available indices below size, rising: those of the largest scores, or evenly spaced.

    Of equal scores the lower index is taken.
    """
    left = list(range(size)) if available is None else sorted(available)
    assert wanted <= len(left), f"{wanted} of {len(left)}"
    if scores is None:
        return tuple(left[(2 * i + 1) * len(left) // (2 * wanted)] for i in range(wanted))
    order = torch.argsort(scores[torch.tensor(left, dtype=torch.long)], descending=True, stable=True)
    return tuple(sorted(left[place] for place in order[:wanted].tolist()))


def _sums(teacher: SubcloningTeacher, change: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Over all tensors that have k, the sum of the L2 norm of what `change` makes of the tensor, at k."""
    scores: dict[str, Tensor] = {}
    for name, tensor in teacher.tensors.items():
        changed = change(name, tensor.value.cpu().double())  # not every device has fp64
        if changed is None:
            continue
        for dim, axis in enumerate(tensor.axes):
            if axis is not None:
                norm = _norms(changed, dim)
                scores[axis] = scores.get(axis, torch.zeros_like(norm)) + norm
    return scores


def _stability(teacher: SubcloningTeacher, pretrained: SubcloningTeacher) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    compared = False
    for name, tensor in teacher.tensors.items():
        before = pretrained.tensors.get(name)
        if before is None or before.value.shape != tensor.value.shape:
            continue  # a head of other classes has no change to measure
        compared = True
        old, new = before.value.cpu().double(), tensor.value.cpu().double()
        for dim, axis in enumerate(tensor.axes):
            if axis is not None:
                change = _norms(new - old, dim) / _norms(old, dim).clamp(min=SMALLEST)
                scores[axis] = scores.get(axis, torch.zeros_like(change)) - change
    sizes, others = teacher.sizes, pretrained.sizes
    if not compared or sizes[RESIDUAL] != others.get(RESIDUAL):
        raise InputError(
            f"pretrained has a width of {others.get(RESIDUAL)} and the teacher {sizes[RESIDUAL]}; give the model that "
            "the teacher was fine-tuned from."
        )
    return scores


def _norms(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.abs()


def _activation(teacher: SubcloningTeacher, calibration: Tensor) -> dict[str, Tensor]:
    """Mean |activation|: of the residual stream where norms read it, of other dimensions where they are read."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(axis: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().flatten(0, -2).abs().double().cpu()
            sums[axis] = sums.get(axis, torch.zeros(())) + values.sum(0)
            counts[axis] = counts.get(axis, 0) + len(values)

        return add

    with _hooks(teacher, watch):
        run_on(teacher.model, calibration)
    means = {axis: total / counts[axis] for axis, total in sums.items()}
    # Queries and keys are read by no linear layer; where they are chosen by themselves, their weights tell.
    return _sums(teacher, lambda name, value: value) | means


@contextmanager
def _hooks(
    teacher: SubcloningTeacher, watch: Callable[[str], Callable[[nn.Module, tuple[Tensor, ...]], None]]
) -> Iterator[None]:
    modules = dict(teacher.model.named_modules())
    handles = []
    for name, tensor in teacher.tensors.items():
        if not name.endswith(".weight"):
            continue
        module = modules.get(tensor.source.removesuffix(".weight"))
        reads_residual = "norm" in name.rpartition(".")[0].rpartition(".")[2] and tensor.axes == (RESIDUAL,)
        axis = RESIDUAL if reads_residual else tensor.axes[-1] if tensor.axes[0] == RESIDUAL else None
        if module is not None and axis is not None and (reads_residual or axis != RESIDUAL):
            handles.append(module.register_forward_pre_hook(watch(axis)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
