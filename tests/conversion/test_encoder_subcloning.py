"""Subcloning of sentence encoders: Map B out of a BERT, and heads fitted to its attention."""

import re
from typing import Any

import pytest
import torch

from tests.conversion.text_teachers import SIZES, VOCAB, bert_teacher
from tests.helpers import relative_rms_error
from transmamba.conversion import SubclonedPart, plan_subcloning, subclone
from transmamba.conversion.subcloning.encoder_blocks import TAUS, encoder_start
from transmamba.errors import CheckpointError, InputError
from transmamba.models import BiMamba2Config, BiMamba2Model

EQUAL: dict[str, Any] = {
    "vocab_size": len(VOCAB),
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "head_dim": 8,
    "num_positions": 40,
}
NARROW: dict[str, Any] = EQUAL | {"hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "num_hidden_layers": 1}


def config(given: dict[str, Any] = EQUAL, **changes: Any) -> BiMamba2Config:
    return BiMamba2Config(**(given | changes))


@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
@pytest.mark.parametrize("ranking", ["uniform", "magnitude"])
def test_equal_size_is_the_teacher_bit_for_bit(direction_weights: str, ranking: str) -> None:
    teacher = bert_teacher()
    student, plan = subclone(teacher, config(direction_weights=direction_weights), ranking=ranking)
    theirs, ours = teacher.state_dict(), student.state_dict()
    assert not plan.index_sets
    for row in plan.subcloned:
        assert row.kind == "copied"
        assert torch.equal(ours[row.target], theirs[row.source]), row.target
    assert {one.source for one in plan.ignored} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert {row.source for row in plan.subcloned} == {name for name in theirs if not name.startswith("pooler")}
    query = "encoder.layer.1.attention.self.query.weight"
    targets = [row.target for row in plan.subcloned if row.source == query]
    expected = ["layers.1.mixer.q_proj.weight"]
    assert targets == expected + (["layers.1.mixer.q_proj_b.weight"] if direction_weights == "separate" else [])


def test_every_parameter_has_one_row() -> None:
    """check_cover does it for the elements; here the names."""
    plan = plan_subcloning(bert_teacher(), config(NARROW, direction_weights="separate"), ranking="magnitude")
    names = [name for name, _ in BiMamba2Model(config(NARROW, direction_weights="separate")).named_parameters()]
    assert [row.target for row in plan] == names
    assert "layers.0.mixer.q_proj.weight" in str(plan)


def test_a_narrow_student_takes_rows_columns_and_whole_heads() -> None:
    teacher = bert_teacher()
    student, plan = subclone(teacher, config(NARROW), ranking="magnitude", depth_map=[1])
    R, V = plan.index_sets["residual"], plan.index_sets["block 0 values"]
    assert len(R) == 16
    assert plan.index_sets["block 0 keys"] == V
    assert [channel % 8 for channel in V] == [*range(8)] * 2
    theirs = teacher.state_dict()
    value = theirs["encoder.layer.1.attention.self.value.weight"][list(V)][:, list(R)] * (24 / 16) ** 0.5
    assert torch.equal(student.layers[0].mixer.v_proj.weight, value)
    out = theirs["encoder.layer.1.attention.output.dense.weight"][list(R)][:, list(V)] * (24 / 16) ** 0.5
    assert torch.equal(student.layers[0].mixer.o_proj.weight, out)
    words = theirs["embeddings.word_embeddings.weight"][:, list(R)]
    assert torch.equal(student.embeddings.word_embeddings.weight, words)


def test_positions_are_the_first_or_their_mean() -> None:
    teacher = bert_teacher()
    table = teacher.embeddings.position_embeddings.weight
    few, _ = subclone(teacher, config(num_positions=5))
    assert torch.equal(few.embeddings.position_embeddings.weight, table[:5])
    one, plan = subclone(teacher, config(num_positions=1))
    assert torch.equal(one.embeddings.position_embeddings.weight, table.mean(0, keepdim=True))
    row = next(row for row in plan.subcloned if "position" in row.target)
    assert isinstance(row, SubclonedPart)
    assert (row.kind, row.transform) == ("subcloned", "mean")
    assert "position_embeddings.weight, mean" in str(plan)


def calibration(rows: int = 24, length: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, len(VOCAB), (rows, length), generator=generator)


def shares(notes: tuple[str, ...]) -> list[float]:
    (note,) = [note for note in notes if "fitted" in note]
    return [float(number) for number in re.findall(r"-?\d+\.\d\d", note)]


def test_fitted_heads_are_near_attention_and_the_share_is_true() -> None:
    """The share that the note names is the one that the student's own mixer has, reading what the teacher reads."""
    teacher, ids = bert_teacher(std=0.15), calibration()
    seen: list[torch.Tensor] = []
    teacher.encoder.layer[0].attention.output.dense.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    states = teacher(ids, output_hidden_states=True).hidden_states
    found = {}
    for name, tokens in (("fitted", ids), ("not", None)):
        student, plan = subclone(teacher, config(), calibration=tokens)
        mixer = student.layers[0].mixer
        mixer.o_proj = torch.nn.Identity()
        with torch.no_grad():
            out = mixer(states[0])[0]
        found[name] = 1 - relative_rms_error(out, seen[0]) ** 2
        if tokens is not None:
            assert abs(found[name] - shares(plan.notes)[0]) < 0.006  # printed with two digits
    assert found["fitted"] > 0.7
    assert found["fitted"] > found["not"] + 0.05


def test_without_the_mean_term_heads_explain_less() -> None:
    teacher, ids = bert_teacher(std=0.15), calibration()
    with_mean, without = (
        shares(subclone(teacher, config(mean_term=mean), calibration=ids)[1].notes) for mean in (True, False)
    )
    assert all(a > b for a, b in zip(with_mean, without, strict=True))


def test_a_narrow_student_is_fitted_too() -> None:
    student, plan = subclone(bert_teacher(std=0.15), config(NARROW), ranking="activation", calibration=calibration())
    assert len(shares(plan.notes)) == 1
    mixer = student.layers[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias.double())
    taus = 1 / (step * mixer.A_log.double().exp())
    assert all(min(abs(tau - known) for known in TAUS) < 1e-3 * tau for tau in taus.tolist())
    assert torch.equal(mixer.D, mixer.D_b)


def test_fresh_parameters_begin_as_the_table_says() -> None:
    student, plan = subclone(bert_teacher(), config())
    parameters = dict(student.named_parameters())
    for row in plan.fresh:
        start = encoder_start(row.target, row.shape)
        if start is not None:
            assert (row.initial_value, True) == (start[0], torch.equal(parameters[row.target], start[1])), row.target
    taps = student.layers[0].mixer.conv1d
    assert torch.equal(taps.weight[:, 0], torch.tensor([0.0, 0, 0, 1]).expand(72, 4))
    assert not taps.bias.any()
    drawn, _ = subclone(bert_teacher(), config(), convolution="drawn")
    assert not torch.equal(drawn.layers[0].mixer.conv1d.weight, taps.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 70}, "the student's vocab_size is 70; it must be the teacher's 59"),
        ({"head_dim": 4}, "the student's head_dim is 4; it must be the teacher's 8"),
        ({"num_heads": 4}, "the student's num_heads is 4; it must be at most the teacher's 3"),
        ({"hidden_size": 32}, "the student is wider than its teacher"),
        ({"num_positions": 41}, "the student's num_positions is 41; it must be at most the teacher's 40"),
        ({"num_hidden_layers": 3}, "the student has 3 blocks, which is no multiple of the teacher's 2"),
        ({"hidden_act": "silu"}, "the student's hidden_act is 'silu'; it must be the teacher's 'gelu'"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    assert SIZES["num_attention_heads"] == 3
    with pytest.raises(InputError, match=re.escape(message)):
        plan_subcloning(bert_teacher(), config(**changes))


def test_other_mistakes_are_one_line() -> None:
    with pytest.raises(InputError, match="convolution='new' is unknown"):
        plan_subcloning(bert_teacher(), config(), convolution="new")
    with pytest.raises(InputError, match="give token ids"):
        subclone(bert_teacher(), config(), calibration=torch.zeros(2, 8))
    with pytest.raises(InputError, match="of at most 40 tokens"):
        subclone(bert_teacher(), config(), calibration=calibration(2, 41))
    with pytest.raises((InputError, CheckpointError), match="bimamba2"):
        plan_subcloning(BiMamba2Model(config()), config())
