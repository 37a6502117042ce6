"""Scores of classifiers by hand, and an alignment that turning and scaling do not change."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from transmamba.errors import InputError
from transmamba.tasks import evaluate_classifier, linear_cka


class Echo(nn.Module):
    """A model whose logits are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.modes.append(self.training)
        return SimpleNamespace(logits=pixel_values + self.weight)


def test_scores_are_counted_over_batches() -> None:
    logits = torch.randn(23, 7)
    labels = torch.randint(7, (23,))
    batches = [{"pixel_values": logits[rows], "labels": labels[rows]} for rows in (slice(0, 10), slice(10, 23))]
    score = evaluate_classifier(Echo(), batches)
    order = [sorted(range(7), key=lambda c, row=row: -row[c]) for row in logits.tolist()]
    assert score.num_images == 23
    assert score.top_1 == sum(o[0] == y for o, y in zip(order, labels.tolist(), strict=True)) / 23
    assert score.top_5 == sum(y in o[:5] for o, y in zip(order, labels.tolist(), strict=True)) / 23
    assert score.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    for true in range(7):
        taken = [o[0] for o, y in zip(order, labels.tolist(), strict=True) if y == true]
        assert list(score.confusion[true]) == [taken.count(c) for c in range(7)]


def test_equal_logits_are_no_luck() -> None:
    score = evaluate_classifier(Echo(), [{"pixel_values": torch.zeros(6, 6), "labels": torch.arange(6)}])
    assert score.top_1 == pytest.approx(1 / 6)
    assert score.top_5 == pytest.approx(5 / 6)


def test_fewer_than_five_classes_are_all_guessed() -> None:
    score = evaluate_classifier(Echo(), [{"pixel_values": torch.randn(9, 3), "labels": torch.arange(9) % 3}])
    assert score.top_5 == 1


def test_the_model_is_in_evaluation_mode_meanwhile() -> None:
    model = Echo().train()
    evaluate_classifier(model, [{"pixel_values": torch.zeros(1, 2), "labels": torch.tensor([0])}])
    assert model.modes == [False]
    assert model.training


def test_no_image_is_no_score() -> None:
    with pytest.raises(InputError, match="no image to score"):
        evaluate_classifier(Echo(), [])


def test_alignment_does_not_change_with_turning_scaling_and_shifting() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert linear_cka(x, 3 * x @ turned + 5) == pytest.approx(1, abs=1e-12)
    y = x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert 0.2 < linear_cka(x, y) < 0.95
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)
    assert linear_cka(torch.randn(2000, 4), torch.randn(2000, 4)) < 0.02


def test_alignment_is_the_papers_formula() -> None:
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(wanted.item(), rel=1e-12)
    assert linear_cka(x, torch.ones(20, 2)) == 0
    with pytest.raises(InputError, match="features are of 20 and 19 images"):
        linear_cka(x, y[:19])
