"""A student computes what its source computes while every TransPoint is None, and every number has one origin."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu, softplus
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conversion.checkpoints import SOURCES, save_source, tiny_source, token_ids
from tests.helpers import data_folder, relative_rms_error
from transmamba import TransMambaForCausalLM, convert
from transmamba.conversion import (
    INITIALISATIONS,
    LARGEST_DIFFERENCE,
    CopiedParameter,
    FreshParameter,
    plan_conversion,
    relative_logit_difference,
)
from transmamba.errors import CheckpointError, InputError, ScheduleError

POINTS = [0, 7, 13]


@pytest.mark.parametrize("name", SOURCES)
def test_logits_and_greedy_text_are_the_sources(name: str) -> None:
    source = tiny_source(name)
    student, _ = convert(source)
    ids = token_ids(2, 40)  # the dynamic rope's 24 positions are exceeded
    assert student.config.trans_points == [None] * 3
    assert relative_logit_difference(source, student, ids) < LARGEST_DIFFERENCE
    written = [
        m.generate(ids[:1, :5], max_new_tokens=12, do_sample=False, eos_token_id=None) for m in (source, student)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", ["Llama 3.1", "Qwen2", "Qwen3 with biases", "SmolLM3", "GPT-2"])
def test_a_folder_gives_what_the_model_in_memory_gives(name: str, tmp_path: Path) -> None:
    source = tiny_source(name)
    save_source(source, tmp_path / "whole")
    source.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected, _ = convert(source)
    for folder in ("whole", "sharded"):
        student, _ = convert(tmp_path / folder)
        assert student.config.to_diff_dict() == expected.config.to_diff_dict()
        for (key, found), (other, exact) in zip(student.named_parameters(), expected.named_parameters(), strict=True):
            assert key == other
            assert torch.equal(found, exact), key


@pytest.mark.parametrize("name", SOURCES)
def test_a_student_is_the_same_after_a_round_trip(name: str, tmp_path: Path) -> None:
    student, _ = convert(tiny_source(name), schedule=POINTS, ssm_rope=False)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, TransMambaForCausalLM)
    assert again.config.trans_points == POINTS
    ids = token_ids(1, 20)
    assert torch.equal(again(ids, use_cache=False).logits, student(ids, use_cache=False).logits)


@pytest.mark.parametrize("ssm_rope", [True, False], ids=["rope in both modes", "rope in softmax"])
@pytest.mark.parametrize("name", ["Llama with biases", "Qwen2", "Qwen3", "SmolLM3", "GPT-2"])
@torch.no_grad()
def test_executions_agree_after_conversion(name: str, ssm_rope: bool) -> None:
    student, _ = convert(tiny_source(name), schedule=POINTS, ssm_rope=ssm_rope, dtype=torch.float64)
    ids = token_ids(1, 24)
    whole = student(ids, use_cache=False).logits
    for sizes in ([24], [1] * 24, [6, 2, 9, 7]):
        cache = student.make_cache()
        pieces = [student(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        assert relative_rms_error(torch.cat(pieces, dim=1), whole) < 1e-10
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(27) >= 3).long()[None]
    assert relative_rms_error(student(padded, attention_mask=mask, use_cache=False).logits[:, 3:], whole) < 1e-10
    two = torch.cat([ids, ids], dim=1)
    packed = student(two, position_ids=torch.arange(24).repeat(2)[None], use_cache=False).logits
    assert relative_rms_error(packed[:, 24:], whole) < 1e-10
    assert student.generate(ids[:, :5], max_new_tokens=12, do_sample=False, eos_token_id=None).shape == (1, 17)


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_is_used_once_and_every_parameter_has_one_origin(name: str) -> None:
    source = tiny_source(name)
    student, plan = convert(source)
    shapes = {key: tuple(x.shape) for key, x in student.named_parameters()}
    assert {row.target: row.shape for row in plan} == shapes
    assert len(plan) == len(shapes)
    used = dict.fromkeys(source.state_dict(), 0)
    for row in plan.copied:
        used[row.source] += math.prod(row.shape)
    for tensor in plan.ignored:
        assert used[tensor.source] == 0
        used[tensor.source] = math.prod(tensor.shape)
    assert used == {key: x.numel() for key, x in source.state_dict().items()}
    ssm = ("dt_proj.weight", "dt_bias", "A_log", "mixer.D", "z_proj.weight", "z_proj.bias")
    assert {row.target for row in plan.fresh} == {key for key in shapes if key.endswith(ssm)}
    assert len(plan.fresh) == 3 * len(ssm)


def test_rows_say_what_was_done() -> None:
    plan = plan_conversion(tiny_source("GPT-2"), schedule="v9", seq_len=64)
    rows = {row.target: row for row in plan}
    k = rows["model.layers.1.mixer.k_proj.weight"]
    assert isinstance(k, CopiedParameter)
    assert (k.kind, k.shape, k.origin) == (
        "sliced",
        (32, 32),
        "transformer.h.1.attn.c_attn.weight[:, 32:64], transposed",
    )
    assert rows["model.norm.bias"].kind == "copied"
    fresh = rows["model.layers.0.mixer.z_proj.bias"]
    assert isinstance(fresh, FreshParameter)
    assert (fresh.kind, fresh.initial_value) == ("fresh", "1.2785 (gate 1)")
    assert [(x.source, x.reason) for x in plan.ignored] == [("lm_head.weight", "tied to the embedding")]
    assert plan.trans_points == (0, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama with biases", "Qwen3"])
def test_a_fault_in_any_copied_parameter_is_seen(name: str) -> None:
    source, ids = tiny_source(name), token_ids(2, 16)
    student, plan = convert(source)
    parameters = dict(student.named_parameters())
    for row in plan.copied:
        parameter = parameters[row.target]
        before = parameter.clone()
        parameter.add_(0.01 * torch.randn_like(parameter))
        assert relative_logit_difference(source, student, ids) > LARGEST_DIFFERENCE, row.target
        parameter.copy_(before)
    assert relative_logit_difference(source, student, ids) < LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Qwen3", "rms_norm_eps", 1e-2),
        ("Llama 3.1", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("SmolLM3", "rope_layers", [True, True, True]),
        ("GPT-2", "hidden_act", "gelu"),
    ],
)
def test_a_fault_in_the_configuration_is_seen(name: str, field: str, value: object) -> None:
    source, ids = tiny_source(name), token_ids(2, 16)
    student, _ = convert(source)
    config = copy.deepcopy(student.config)
    setattr(config, field, value)
    wrong = TransMambaForCausalLM(config).eval()
    wrong.load_state_dict(student.state_dict())
    assert relative_logit_difference(source, wrong, ids) > LARGEST_DIFFERENCE


def test_nothing_of_the_source_is_shared_or_changed() -> None:
    source = tiny_source("Llama")
    before = {key: x.clone() for key, x in source.state_dict().items()}
    student, _ = convert(source, calibration=token_ids(1, 16))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(x, before[key]) for key, x in source.state_dict().items())


def test_the_head_is_tied_only_where_it_was() -> None:
    for name, tied in (("Llama", True), ("Llama with a head of its own", False)):
        student, _ = convert(tiny_source(name))
        assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
        assert student.config.tie_word_embeddings is tied


def test_dtype_is_the_sources_unless_another_is_asked_for(tmp_path: Path) -> None:
    source = tiny_source("Qwen3").to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        student, _ = convert(given)
        assert {x.dtype for x in student.parameters()} == {torch.bfloat16}
        assert student.config.dtype == torch.bfloat16
    student, _ = convert(tmp_path, dtype=torch.float32)
    assert {x.dtype for x in student.parameters()} == {torch.float32}


def test_a_schedule_is_scaled_and_never_switches_beyond_the_length() -> None:
    source = tiny_source("Llama", num_hidden_layers=9)
    named, _ = convert(source, schedule="v9", seq_len=64)
    assert named.config.trans_points == [0, 1, 2, 4, 8, 16, 32, None, 0]
    assert named.config.max_position_embeddings == 128
    listed, _ = convert(source, schedule=[0, 3, 128, 127, 500, None, 1, 2, 3])
    assert listed.config.trans_points == [0, 3, None, 127, None, None, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": 32}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    ],
)
def test_a_sliding_window_is_refused_where_it_binds_and_left_out_where_it_does_not(
    name: str, changes: dict[str, object]
) -> None:
    source = tiny_source(name, **changes)
    with pytest.raises(CheckpointError, match=r"attends to the last 32 tokens only.*seq_len .* of at most 32"):
        convert(source)
    with pytest.raises(CheckpointError, match="at most 32"):
        convert(source, seq_len=33)
    student, plan = convert(source, seq_len=32)
    assert student.config.max_position_embeddings == 32
    assert "never binds within 32 tokens" in plan.notes[0]
    assert relative_logit_difference(source, student, token_ids(2, 32)) < LARGEST_DIFFERENCE
    assert relative_logit_difference(source, student, token_ids(2, 40)) > LARGEST_DIFFERENCE  # the note is true


def test_learned_positions_end_where_the_table_ends() -> None:
    student, _ = convert(tiny_source("GPT-2"))
    student(token_ids(1, 128), use_cache=False)
    with pytest.raises(InputError, match="129 tokens and this model learned 128 positions"):
        student(token_ids(1, 129), use_cache=False)


def test_a_checkpoint_without_the_backbones_prefix_is_read(tmp_path: Path) -> None:
    source = tiny_source("GPT-2")
    source.transformer.save_pretrained(tmp_path)  # as the first GPT-2 checkpoints were
    student, plan = convert(tmp_path)
    assert plan.copied[0].source == "wte.weight"
    assert relative_logit_difference(source, student, token_ids(1, 20)) < LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        ({}, {"schedule": [0, 1]}, ScheduleError, "2 entries and the model 3 layers"),
        ({}, {"schedule": "v10"}, ScheduleError, "v10"),
        ({}, {"seq_len": 129}, InputError, "seq_len=129 is longer than the source's 128 positions"),
        ({}, {"seq_len": 0}, InputError, "seq_len=0 must be at least 1"),
        (
            {},
            {"initialisation": "zeros"},
            InputError,
            "'zeros' is unknown; choose one of mamba2, averages, local, calibrated",
        ),
        ({}, {"initialisation": "calibrated"}, InputError, "give token ids as calibration, or choose 'local'"),
        ({}, {"calibration": torch.zeros(3)}, InputError, r"calibration has shape \(3,\)"),
        ({}, {"calibration": torch.full((1, 4), 300)}, InputError, "token id 300; the model knows 0 to 256"),
        ({}, {"calibration": torch.ones(1, 129).long()}, InputError, "windows of 129 tokens"),
    ],
)
def test_a_mistake_is_named(
    changes: dict[str, object], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert(tiny_source("Llama", **changes), **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)],
)
def test_what_gpt2_has_and_we_have_not_is_refused(name: str, value: bool) -> None:
    with pytest.raises(CheckpointError, match=f"{name}={value} has no counterpart here"):
        convert(tiny_source("GPT-2", **{name: value}))


def test_other_models_are_refused_with_the_known_families() -> None:
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt_neox", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(CheckpointError, match="'gpt_neox', which cannot be converted; known are gpt2, llama, mistral"):
        convert(other)
    with pytest.raises(InputError, match="LlamaModel is no causal language model"):
        convert(tiny_source("Llama").model)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_an_initialisation_is_what_its_table_says(name: str) -> None:
    text = token_ids(2, 32) if INITIALISATIONS[name].needs_text else None
    student, plan = convert(tiny_source("Qwen3"), initialisation=name, calibration=text)
    mixer = student.model.layers[1].mixer
    dt, A = mixer.step_sizes(torch.randn(5, 32))
    assert plan.initialisation == name
    if name == "mamba2":
        assert (mixer.D == 1).all()
        assert 1 <= -A.min() <= 16
        return
    assert torch.equal(dt[0], dt[4])  # of every token
    assert torch.allclose(silu(mixer.z_proj(torch.randn(5, 32))), torch.tensor(1.0), atol=1e-5)
    tau, gain = (-1 / (dt[0] * A)), -1 / A
    if name == "averages":
        assert torch.allclose(tau, torch.tensor([1.0, 128 ** (1 / 3), 128 ** (2 / 3), 128.0]), rtol=1e-4)
        assert torch.allclose(gain, torch.tensor(16**-0.5), rtol=1e-4)
        assert (mixer.D == 0).all()
    elif name == "local":
        assert torch.allclose(tau, torch.tensor([2.0, 2 * 16 ** (1 / 3), 2 * 16 ** (2 / 3), 32.0]), rtol=1e-4)
        assert torch.allclose(gain, torch.tensor(1 / 16), rtol=1e-4)
    else:
        assert all(abs(math.log2(x) - round(math.log2(x))) < 1e-3 for x in tau.tolist())
        assert len(set(mixer.D.tolist())) == 4


@torch.no_grad()
def test_calibration_finds_the_state_space_that_the_attention_is() -> None:
    """Attention that reads only its own token is v: D = 1 and next to no weight on the past."""
    source = tiny_source("Qwen3", num_hidden_layers=1)
    for norm in (source.model.layers[0].self_attn.q_norm, source.model.layers[0].self_attn.k_norm):
        norm.weight.fill_(0.0)
    student, _ = convert(source, calibration=torch.full((2, 1), 7))
    mixer = student.model.layers[0].mixer
    assert torch.allclose(mixer.D, torch.ones(4), atol=1e-3)


@torch.no_grad()
def test_calibration_is_the_least_squares_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving D or the weight of a head either way leaves more of the attention unexplained."""
    student, _ = convert(tiny_source("Llama", num_hidden_layers=1), calibration=token_ids(3, 32))
    mixer, ids = student.model.layers[0].mixer, token_ids(3, 32)

    def unexplained() -> torch.Tensor:
        seen = []
        handle = mixer.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for schedule in ("transformer", "mamba2"):
            student.set_trans_points(schedule)
            student.model(ids, use_cache=False)
        handle.remove()
        return (seen[0] - seen[1]).unflatten(-1, (4, 8)).square().sum((0, 1, 3))

    best = unexplained()
    for change in (0.9, 1.1):
        D = mixer.D.clone()
        mixer.D.mul_(change)
        assert (unexplained() > best).all()
        mixer.D.copy_(D)
        dt_bias, A_log = mixer.dt_bias.clone(), mixer.A_log.clone()
        dt = softplus(dt_bias) * change
        mixer.dt_bias.copy_(dt.expm1().log())
        mixer.A_log.sub_(math.log(change))  # the decay stays
        moved, at_the_bound = unexplained(), A_log > 6.9
        assert (moved[~at_the_bound] > best[~at_the_bound]).all()
        assert (~at_the_bound).any()
        mixer.dt_bias.copy_(dt_bias)
        mixer.A_log.copy_(A_log)


@pytest.mark.data
@torch.no_grad()
def test_the_real_teacher_is_converted_without_loss() -> None:
    folder = data_folder() / "teachers" / "llama_wiki_31m"
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student, plan = convert(folder, schedule="v9", seq_len=512, dtype=torch.float32)
    ids = torch.randint(16384, (1, 96), generator=torch.Generator().manual_seed(0))
    assert relative_logit_difference(teacher, student, ids) < LARGEST_DIFFERENCE
    assert student.config.trans_points == [0, 8, 16, 32, 64, 128, 256, None]
    assert {row.kind for row in plan} == {"copied", "fresh"}
    student.set_trans_points("transformer")
    written = [m.generate(ids[:, :8], max_new_tokens=16, do_sample=False) for m in (teacher, student)]
    assert torch.equal(*written)
