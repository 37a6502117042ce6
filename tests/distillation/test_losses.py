"""The chunked KL and cross-entropy: values, gradients, masks, padded vocabularies, stored teachers, memory."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tests.helpers import relative_rms_error
from transmamba.distillation import DenseTarget, GivenTarget, TopKTarget, logit_loss, losses
from transmamba.errors import InputError

ROWS, WIDTH, VOCAB = 7, 5, 11
LABELS = torch.tensor([1, 2, -100, 4, 5, 10, 0])


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def student() -> tuple[Tensor, Tensor]:
    return draw(ROWS, WIDTH, seed=1), draw(VOCAB, WIDTH, seed=2)


def teacher(padding: int = 0) -> DenseTarget:
    hidden, head = draw(ROWS, 6, seed=3).detach(), draw(VOCAB, 6, seed=4).detach()
    return DenseTarget(hidden, torch.cat([head, torch.full((padding, 6), 9.0).double()]))


def plain(hidden: Tensor, head: Tensor, logits: Tensor, temperature: float, kl: float, ce: float) -> Tensor:
    """The same loss in plain PyTorch, all logits at once."""
    counts = LABELS != -100
    ours = (hidden @ head.T)[counts]
    log_q, log_p = log_softmax(ours / temperature, -1), log_softmax(logits[counts] / temperature, -1)
    divergence = temperature**2 * kl_div(log_q, log_p, log_target=True, reduction="sum")
    return kl * divergence + ce * cross_entropy(ours, LABELS[counts], reduction="sum")


@pytest.mark.parametrize("logits_at_once", [1, 22, 1000])
@pytest.mark.parametrize(
    ("temperature", "kl", "ce"), [(1.0, 1.0, 0.0), (1.0, 0.7, 0.3), (2.0, 0.7, 0.3), (0.5, 0.0, 1.0)]
)
def test_loss_and_gradients_are_those_of_plain_pytorch(
    temperature: float, kl: float, ce: float, logits_at_once: int
) -> None:
    hidden, head = student()
    options = {"temperature": temperature, "kl_weight": kl, "ce_weight": ce, "logits_at_once": logits_at_once}
    loss = logit_loss(hidden, head, LABELS, teacher(), **options)[0]
    target = teacher()
    exact = plain(hidden, head, target.hidden @ target.head.T, temperature, kl, ce)
    assert relative_rms_error(loss, exact) < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(2.5 * loss, (hidden, head)), torch.autograd.grad(2.5 * exact, (hidden, head)), strict=True
    ):
        assert relative_rms_error(ours, theirs) < 1e-12


def test_a_forgotten_temperature_squared_would_be_seen() -> None:
    hidden, head = student()
    loss = logit_loss(hidden, head, LABELS, teacher(), temperature=2.0)[0]
    target = teacher()
    wrong = plain(hidden, head, target.hidden @ target.head.T, 2.0, 0.25, 0.0)
    assert relative_rms_error(loss, wrong) > 1


def test_gradcheck_of_a_stored_teacher() -> None:
    hidden, head = student()
    ids, log_probs = stored(3)
    assert torch.autograd.gradcheck(
        lambda h, w: logit_loss(h, w, LABELS, TopKTarget(ids, log_probs, 1.0), ce_weight=0.3, logits_at_once=22)[0],
        (hidden, head),
    )


def stored(k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    target = teacher()
    top = log_softmax(target.hidden @ target.head.T / temperature, -1).topk(k)
    return top.indices.int(), top.values


def test_a_stored_teacher_bounds_the_divergence_and_reaches_it_with_all_tokens() -> None:
    hidden, head = (x.detach() for x in student())
    exact = logit_loss(hidden, head, LABELS, teacher())[1]
    found = [logit_loss(hidden, head, LABELS, TopKTarget(*stored(k), 1.0))[1] for k in (1, 3, 8, VOCAB - 1)]
    assert all(a < b for a, b in pairwise(found))
    assert found[-2] < exact
    assert relative_rms_error(found[-1], exact) < 1e-9


def test_a_stored_teacher_has_one_temperature() -> None:
    hidden, head = student()
    with pytest.raises(InputError, match=r"temperature=2 differs from 1, .* store them anew"):
        logit_loss(hidden, head, LABELS, TopKTarget(*stored(3), 1.0), temperature=2.0)


def test_rows_without_a_label_change_nothing() -> None:
    hidden, head = student()
    loss = logit_loss(hidden, head, LABELS, teacher(), ce_weight=1.0)[0]
    loss.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[2], torch.zeros(WIDTH).double())
    with torch.no_grad():
        moved = hidden + torch.eye(ROWS)[:, 2:3].double()
    assert torch.equal(logit_loss(moved, head, LABELS, teacher(), ce_weight=1.0)[0], loss)


def test_the_teachers_padding_is_left_out_and_the_students_gets_no_probability() -> None:
    hidden, head = (x.detach() for x in student())
    assert torch.equal(
        logit_loss(hidden, head, LABELS, teacher(padding=5))[1], logit_loss(hidden, head, LABELS, teacher())[1]
    )
    wide = torch.cat([head, torch.zeros(2, WIDTH).double()])
    kl = logit_loss(hidden, wide, LABELS, teacher())[1]
    target = teacher()
    log_q, counts = log_softmax(hidden @ wide.T, -1)[:, :VOCAB], LABELS != -100
    log_p = log_softmax(target.hidden @ target.head.T, -1)
    assert relative_rms_error(kl, (log_p.exp() * (log_p - log_q))[counts].sum()) < 1e-12


def test_given_logits_are_those_of_the_head() -> None:
    hidden, head = student()
    target = teacher()
    given = GivenTarget(target.logits(slice(None)))
    assert torch.equal(logit_loss(hidden, head, LABELS, given)[0], logit_loss(hidden, head, LABELS, target)[0])


def test_a_teacher_that_is_the_student_has_no_divergence() -> None:
    hidden, head = student()
    total, kl, _ = logit_loss(hidden, head, LABELS, DenseTarget(hidden.detach(), head.detach()))
    assert abs(float(kl)) < 1e-14
    assert all(float(x.abs().max()) < 1e-15 for x in torch.autograd.grad(total, (hidden, head)))


def test_no_more_logits_exist_than_were_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def linear(*args: Any) -> Tensor:
        out = torch.nn.functional.linear(*args)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(losses, "linear", linear)
    hidden, head = student()
    logit_loss(hidden, head, LABELS, teacher(), logits_at_once=3 * VOCAB)[0].backward()
    assert max(sizes) == 3 * VOCAB
    assert sum(sizes) == 2 * ROWS * VOCAB


def test_under_autocast_products_are_16_bit_and_sums_are_not() -> None:
    hidden, head = (x.detach().float().requires_grad_() for x in student())
    target = teacher()
    low = DenseTarget(target.hidden.bfloat16(), target.head.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, kl, _ = logit_loss(hidden, head, LABELS, low, ce_weight=1.0)
    assert loss.dtype == kl.dtype == torch.float32
    exact = plain(hidden.double(), head.double(), target.hidden @ target.head.T, 1.0, 1.0, 1.0)
    # Logits of size about 2 are off by 2^-8 of that each; a mean over 6 rows of such errors, against a loss of 5 a row.
    assert relative_rms_error(loss, exact) < 2**-7
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 0.0}, "temperature=0.0 must be above 0"), ({"labels": LABELS[:3]}, "labels 3 and the teacher 7")],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    hidden, head = student()
    arguments = {"labels": LABELS, "target": teacher()} | changes
    with pytest.raises(InputError, match=message):
        logit_loss(hidden, head, **arguments)
