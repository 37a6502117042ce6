"""The loss of sentence encoders: directions in their order, padding left out, embeddings and their similarities."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from tests.conversion.text_teachers import VOCAB, bert_teacher
from transmamba.conversion import subclone
from transmamba.distillation import (
    SentenceAdaptionObjective,
    SentenceLoss,
    SentenceProjections,
    TextSignals,
    TextTeacher,
    attached,
    direction_cosine,
)
from transmamba.distillation.sentence_adaption import directions_loss, embedding_loss, similarity_loss, states_loss
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config, BiMamba2Model
from transmamba.modules import DirectionOutput

PLAIN = SentenceLoss(layer_weights="uniform")


def student(**changes: Any) -> BiMamba2Model:
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCAB),
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_heads": 3,
        "num_positions": 40,
    }
    return subclone(bert_teacher(), BiMamba2Config(**(sizes | changes)))[0].train()


def batch(rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 4:] = 0
    return {
        "input_ids": torch.randint(5, len(VOCAB), (rows, length)) * mask,
        "attention_mask": mask,
        "labels": torch.zeros(rows, dtype=torch.long),
    }


class _Identity(nn.Module):
    def forward(self, _: int, direction: DirectionOutput) -> torch.Tensor:
        return direction.features


def scans(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[DirectionOutput, DirectionOutput]:
    """Features that are the given tokens, in both orders."""
    places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    lengths = mask.sum(1, keepdim=True)
    backward = torch.where(places < lengths, lengths - 1 - places, -1)
    forward = torch.where(places < lengths, places, -1)
    turned = tokens.gather(1, backward.clamp(min=0)[..., None].expand_as(tokens))
    length = (tokens.shape[1],)
    return (
        DirectionOutput(name="forward", features=tokens, patches=forward, grid=length),
        DirectionOutput(name="backward", features=turned, patches=backward, grid=length),
    )


def test_a_teacher_as_its_own_student_has_no_loss() -> None:
    given = batch()
    teacher = TextTeacher(bert_teacher())
    theirs = teacher(given["input_ids"], given["attention_mask"])
    layers = [scans(tokens, given["attention_mask"]) for tokens in theirs.tokens]
    loss, cosines, weights = directions_loss(layers, theirs, _Identity(), SentenceLoss())  # type: ignore[arg-type]
    assert loss.abs() < 1e-6
    assert (cosines - 1).abs().max() < 1e-6
    assert (weights - 1).abs().max() < 1e-6
    loss, _, _ = states_loss(theirs.tokens, theirs, given["attention_mask"], nn.Identity(), SentenceLoss())
    assert loss.abs() < 1e-6
    # The backward scan read as if it were the forward one is another thing.
    wrong = [
        (one[0], DirectionOutput(name="b", features=one[1].features, patches=one[0].patches, grid=one[0].grid))
        for one in layers
    ]
    assert directions_loss(wrong, theirs, _Identity(), PLAIN)[0] > 0.02  # type: ignore[arg-type]


def test_padding_does_not_count() -> None:
    given = batch()
    theirs = TextTeacher(bert_teacher())(given["input_ids"], given["attention_mask"])
    other = TextSignals(
        embedding=theirs.embedding,
        tokens=tuple(torch.where(given["attention_mask"][..., None] == 1, x, 99.0) for x in theirs.tokens),
        attention=theirs.attention,
    )
    layers = [scans(torch.randn_like(tokens), given["attention_mask"]) for tokens in theirs.tokens]
    a, b = (directions_loss(layers, one, _Identity(), PLAIN)[0] for one in (theirs, other))  # type: ignore[arg-type]
    assert a == b
    states = [one[0].features for one in layers]
    a, b = (states_loss(states, one, given["attention_mask"], nn.Identity(), PLAIN)[0] for one in (theirs, other))
    assert a == b
    everything = torch.ones_like(given["attention_mask"])
    assert states_loss(states, other, everything, nn.Identity(), PLAIN)[0] != a


def test_a_masked_cosine_is_that_of_the_tokens_alone() -> None:
    ours, theirs = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    inside = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]).bool()
    found = direction_cosine(ours, theirs, inside)
    assert abs(found - direction_cosine(ours[:, :3], theirs[:, :3])) < 1e-15


def test_the_teacher_says_what_it_computes() -> None:
    given, model = batch(), bert_teacher()
    theirs = TextTeacher(model)(given["input_ids"], given["attention_mask"])
    out = model(given["input_ids"], given["attention_mask"]).last_hidden_state[1, :4].mean(0)
    assert torch.allclose(theirs.embedding[1], out / out.norm(), atol=1e-6)
    block = model.encoder.layer[1].attention.output
    x = theirs.tokens[0]
    assert theirs.attention[1].shape == x.shape
    attended = block.LayerNorm(block.dense(theirs.attention[1]) + x)
    assert torch.allclose(
        attended, model.encoder.layer[1].attention(x, _additive(given["attention_mask"]))[0], atol=1e-5
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def _additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask == 1, 0.0, -1e9)[:, None, None, :]


def test_embedding_losses() -> None:
    a, b = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    cosine, mse = embedding_loss(a, b, "cosine"), embedding_loss(a, b, "mse")
    assert abs(mse - 2 * cosine) < 1e-12  # |x - y|^2 = 2 - 2 cos of unit vectors
    assert embedding_loss(a, 3 * a, "cosine").abs() < 1e-12
    with pytest.raises(InputError, match=r"set loss\.beta=0 and loss\.similarity=1"):
        embedding_loss(a, b[:, :4], "cosine")


def test_similarity_loss_is_a_divergence_between_texts() -> None:
    theirs = normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    assert similarity_loss(2 * theirs, theirs, 0.1).abs() < 1e-12
    ours = torch.randn(4, 3, dtype=torch.float64)  # of another width
    unit = normalize(ours, dim=-1)
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        p, q = (torch.softmax(torch.stack([x[i] @ x[j] for j in others]) / 0.1, 0) for x in (theirs, unit))
        expected += float((p * (p / q).log()).sum()) / 4
    assert math.isclose(float(similarity_loss(ours, theirs, 0.1)), expected, rel_tol=1e-9)
    assert similarity_loss(ours[:1], theirs[:1], 0.1) == 0


@pytest.mark.parametrize(
    "settings",
    [
        SentenceLoss(),
        SentenceLoss(alpha=0.0, similarity=0.5),
        SentenceLoss(states=0.0, direction_target="attention", target="final", layer_weights="softmax"),
        SentenceLoss(beta=0.0, embedding="mse", layer_weights="linear"),
    ],
    ids=["default", "states", "directions", "no embedding"],
)
def test_the_parts_add_up_and_the_student_learns(settings: SentenceLoss) -> None:
    model, teacher, given = student(), TextTeacher(bert_teacher()), batch()
    projections = SentenceProjections(model.config, 24)
    objective = SentenceAdaptionObjective(teacher, projections, settings)
    with attached(model, projections):
        loss, metrics = objective(model, given)
        parts = {
            "direction_loss": settings.alpha,
            "state_loss": settings.states,
            "embedding_loss": settings.beta,
            "similarity_loss": settings.similarity,
        }
        total = sum(weight * float(metrics[name]) for name, weight in parts.items() if weight)
        assert math.isclose(loss.item(), total, rel_tol=1e-5)
        assert set(parts) & set(metrics) == {name for name, weight in parts.items() if weight}
        assert {"cosine_1", "weight_1"} <= set(metrics)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(12):
            optimizer.zero_grad()
            objective(model, given)[0].backward()
            optimizer.step()
        assert objective(model, given)[0].item() < 0.8 * loss.item()
    assert not any("projection" in name or "training_parts" in name for name in model.state_dict())


def test_parts_of_a_step_are_weighed_by_their_texts() -> None:
    model, teacher, given = student(), TextTeacher(bert_teacher()), batch()
    objective = SentenceAdaptionObjective(teacher, SentenceProjections(model.config, 24), SentenceLoss(alpha=0.0))
    whole = objective(model, given)[0]
    third = objective(model, given | {"num_items_in_batch": torch.tensor(9)})[0]  # type: ignore[arg-type]
    assert torch.allclose(3 * third, whole)


def test_a_narrow_student_is_projected() -> None:
    model = student(hidden_size=16, num_heads=2, head_dim=8)
    projections = SentenceProjections(model.config, 24)
    settings = SentenceLoss(beta=0.0, similarity=1.0)
    loss, _ = SentenceAdaptionObjective(TextTeacher(bert_teacher()), projections, settings)(model, batch())
    loss.backward()
    assert all(parameter.grad is not None for parameter in projections.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": "l1"}, "embedding='l1' is unknown"),
        ({"direction_target": "keys"}, "direction_target='keys' is unknown"),
        ({"alpha": -1.0}, "alpha=-1.0 must be at least 0"),
        ({"similarity_temperature": 0.0}, "similarity_temperature=0.0 must be above 0"),
        ({"alpha": 0.0, "states": 0.0, "beta": 0.0}, "are all 0, so there is nothing to learn"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SentenceLoss(**changes)


def test_a_teacher_of_another_kind_or_a_text_too_long_is_refused() -> None:
    with pytest.raises(InputError, match="give a BERT of transformers"):
        TextTeacher(student())
    with pytest.raises(InputError, match="reads at most 40 tokens and these rows have 41"):
        TextTeacher(bert_teacher())(torch.zeros(1, 41, dtype=torch.long), torch.ones(1, 41))
