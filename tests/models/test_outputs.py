"""What a forward pass takes and returns: Hugging Face's contract of a causal language model, and what is refused."""

import copy
import logging
import shutil

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import VARIANTS, VOCAB_SIZE, shared_model, tiny_model, tokens
from transmamba import TransMambaForCausalLM
from transmamba.errors import InputError, ScheduleError

FP32 = 1e-5
Model = TransMambaForCausalLM

# transformers renames gradient checkpointing, and says so; the old names serve all its versions that we support.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def model() -> Model:
    return tiny_model()


def test_tuples_hold_what_the_outputs_hold(model: Model) -> None:
    ids = tokens(2, 9)
    for given in ({}, {"labels": ids}, {"output_hidden_states": True, "use_cache": False}):
        named = model(ids, **given)
        plain = model(ids, **given, return_dict=False)
        assert type(plain) is tuple
        assert len(plain) == len(named.to_tuple())
        for a, b in zip(plain, named.to_tuple(), strict=True):
            if isinstance(a, Tensor):
                assert torch.equal(a, b)
            elif isinstance(a, tuple):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], named.logits)
    assert torch.equal(model.model(ids)[0], model.model(ids, return_dict=True).last_hidden_state)


def test_hidden_states_are_those_between_the_layers(model: Model) -> None:
    ids = tokens(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (2, 9, 32) for x in out.hidden_states)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(out.hidden_states)


def test_hidden_states_of_padding_are_zero(model: Model) -> None:
    mask = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    mask[0, :3] = 0
    out = model(tokens(2, 9), attention_mask=mask, output_hidden_states=True)
    assert all(x.shape == (2, 9, 32) for x in out.hidden_states)
    assert not any(x[0, :3].any() for x in out.hidden_states)


def test_backbone_gives_no_logits_and_the_head_adds_them(model: Model) -> None:
    ids = tokens(2, 9)
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_its_batch(variant: str) -> None:
    model, ids = shared_model(variant, torch.float32), tokens(3, 12)
    together = model(ids).logits
    for row in range(3):
        assert relative_rms_error(together[row], model(ids[row : row + 1]).logits[0]) < FP32


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_does_not_depend_on_later_ones(variant: str) -> None:
    model, ids = shared_model(variant, torch.float32), tokens(1, 12)
    other = ids.clone()
    other[0, 8] = ids[0, 8] % (VOCAB_SIZE - 1) + 1
    before, after = model(ids).logits, model(other).logits
    assert relative_rms_error(after[:, :8], before[:, :8]) < 1e-6
    assert all(relative_rms_error(after[:, t], before[:, t]) > 1e-3 for t in range(8, 12))


def test_embeddings_may_be_given_instead_of_ids(model: Model) -> None:
    ids = tokens(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(InputError, match="one of the two"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(InputError, match="one of the two"):
        model()


def test_labels_are_shifted_and_minus_100_is_ignored(model: Model) -> None:
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, 8] = -100
    out = model(ids, labels=labels)
    logits, targets = out.logits[:, :-1].reshape(-1, VOCAB_SIZE), labels[:, 1:].reshape(-1)
    counted = targets != -100
    exact = -logits[counted].log_softmax(-1).gather(1, targets[counted][:, None]).mean()
    assert out.loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert model(ids).loss is None


def test_loss_is_divided_by_the_tokens_of_the_whole_step(model: Model) -> None:
    ids = tokens(2, 9)
    mean, summed = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=32).loss
    assert summed.item() == pytest.approx(mean.item() * 16 / 32, rel=1e-5)


def test_logits_to_keep_keeps_those(model: Model) -> None:
    ids = tokens(2, 9)
    full = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=0).logits, full)
    for given, kept in ((1, [8]), (3, [6, 7, 8]), (torch.tensor([2, 8, 0], device=DEVICE), [2, 8, 0])):
        logits = model(ids, logits_to_keep=given).logits
        assert logits.shape == (2, len(kept), VOCAB_SIZE)
        assert relative_rms_error(logits, full[:, kept]) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCAB_SIZE + 7, VOCAB_SIZE - 9])
def test_embeddings_are_resized(tied: bool, size: int) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied), tokens(1, 9, seed=2) % (VOCAB_SIZE - 9)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    after = model(ids, labels=ids).logits
    assert after.shape[-1] == size
    kept = min(size, VOCAB_SIZE)
    assert relative_rms_error(after[..., :kept], before[..., :kept]) < 1e-6
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_embeddings_that_are_added_get_initial_values() -> None:
    model = tiny_model(initializer_range=0.05)
    model.resize_token_embeddings(VOCAB_SIZE + 100, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        assert 0.045 < weight[VOCAB_SIZE:].std().item() < 0.055


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    plain, ids = tiny_model(), tokens(2, 12)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    losses = []
    for model in (plain, saving):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
    assert saving.is_gradient_checkpointing
    assert torch.equal(*losses)
    recomputed = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert recomputed[name].grad is None, name
        else:
            assert relative_rms_error(recomputed[name].grad, parameter.grad) < 1e-6, name


def test_gradient_checkpointing_saves_activations() -> None:
    """The layers' inner tensors are what it drops: fewer tensors are kept for the backward pass."""
    kept = []
    for saving in (False, True):
        model = tiny_model().train()
        if saving:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            model(tokens(2, 40), labels=tokens(2, 40))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_runs_and_stays_near(variant: str, dtype: torch.dtype) -> None:
    model, exact, ids = shared_model(variant, dtype), shared_model(variant, torch.float32), tokens(2, 12)
    logits = model(ids).logits
    assert logits.dtype == dtype
    assert relative_rms_error(logits, exact(ids).logits) < 2**-4


def test_autocast_runs_and_trains(model: Model) -> None:
    ids = tokens(2, 12)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=2**-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_autocast_casts_what_projections_share_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits to the last bit, nearly the same gradients, and one copy of each input to keep."""
    ids = tokens(2, 12)

    def train() -> tuple[Tensor, list[Tensor], int]:
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autocast(DEVICE.type, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(ids, labels=ids, use_cache=False)
        weights = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(out.loss, weights, allow_unused=True)
        return out.logits, [x for x in found if x is not None], sum(kept.values())

    logits, gradients, kept = train()
    for name in ("mixer", "mlp"):
        monkeypatch.setattr(f"transmamba.modules.{name}.cast_anew", lambda x: x)
    wide_logits, wide_gradients, wide_kept = train()
    assert torch.equal(logits, wide_logits)
    assert kept < wide_kept
    # A sum of up to five gradients, each of which 16 bits have rounded already, is rounded up to four times more.
    assert max(relative_rms_error(a, b) for a, b in zip(gradients, wide_gradients, strict=True)) < 2**-6


def test_forward_compiles_as_one_graph_and_equals_eager() -> None:
    model, ids = tiny_model().requires_grad_(False), tokens(2, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_rms_error(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-6
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("cc") is None, reason="inductor needs a C compiler")
def test_forward_and_backward_compile_with_inductor() -> None:
    model, ids = tiny_model(num_hidden_layers=1, trans_points=[7]), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        out = run(ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradients.append((out.logits, *(p.grad.clone() for p in model.parameters())))
    assert max(relative_rms_error(a, b) for a, b in zip(*gradients, strict=True)) < FP32
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_nothing_in_gives_nothing_out(model: Model, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    assert model(ids, use_cache=False).logits.shape == (*shape, VOCAB_SIZE)
    assert model(ids, use_cache=True).logits.shape == (*shape, VOCAB_SIZE)


@pytest.mark.parametrize("past", [0, 5, 9])
def test_an_empty_call_leaves_the_cache_as_it_is(past: int) -> None:
    model, ids = tiny_model(torch.float64).requires_grad_(False), tokens(2, 14)
    cache = model.make_cache()
    for start, end in ((0, past), (past, past), (past, 10), (10, 14)):
        logits = model(ids[:, start:end], past_key_values=cache).logits
    assert relative_rms_error(logits, model(ids, use_cache=False).logits[:, 10:]) < 1e-10


def test_a_row_of_padding_only_is_left_out(model: Model) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
    mask[1] = 0
    out = model.model(ids, attention_mask=mask).last_hidden_state
    assert relative_rms_error(out[0], model.model(ids[:1]).last_hidden_state[0]) < FP32
    assert not out[1].any()


def test_use_cache_says_whether_there_is_one(model: Model) -> None:
    ids = tokens(1, 9)
    assert model(ids).past_key_values.get_seq_length() == 9
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


def test_packed_rows_have_no_cache(model: Model) -> None:
    ids, positions = tokens(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    assert model(ids, position_ids=positions).past_key_values is None
    for given in ({"use_cache": True}, {"past_key_values": model.make_cache()}):
        with pytest.raises(InputError, match="a cache holds one document a row, and these rows are packed"):
            model(ids, position_ids=positions, **given)
        with pytest.raises(InputError, match="cache"):
            model(ids, cu_seqlens=[0, 4, 9], **given)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "name", ["layers.1.mixer.q_proj.weight", "layers.0.mixer.D", "norm.weight", "embed_tokens.weight"]
)
def test_nan_in_the_weights_is_reported(model: Model, name: str, use_cache: bool) -> None:
    with torch.no_grad():
        model.model.get_parameter(name).view(-1)[0] = torch.nan
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(InputError, match=r"last_hidden_state holds NaN at \d+ of 288 places"):
        model.cpu()(ids, use_cache=use_cache)


def test_nan_in_the_embeddings_is_reported_with_its_row(model: Model) -> None:
    embeds = torch.randn(2, 9, 32)
    embeds[1, 4, 3] = torch.nan
    with pytest.raises(InputError, match=r"holds NaN at \d+ of 576 places, the first at \(1, "):
        model.cpu()(inputs_embeds=embeds)


def test_attention_weights_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="attention weights are never formed here"):
        model(tokens(1, 5), output_attentions=True)


def test_a_schedule_that_does_not_fit_changes_nothing(model: Model) -> None:
    for schedule, error in (([0, 1], ScheduleError), ([0, -1, 2], ScheduleError), ("v10", ScheduleError)):
        with pytest.raises(error):
            model.set_trans_points(schedule)
    standard = tiny_model(mixer_form="standard", trans_points=[0, None, 0])
    with pytest.raises(InputError, match="mixer_form='standard' has one mode per layer"):
        standard.set_trans_points("mamba2")
    assert standard.set_trans_points([0, None, 0]) == [0, None, 0]
    assert model.config.trans_points == [0, 7, None]
    assert [layer.mixer.trans_point for layer in model.model.layers] == [0, 7, None]


def test_running_an_untrained_ssm_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(trans_points=[0, 16, 20], max_position_embeddings=16).requires_grad_(False)
    ids = tokens(1, 24)
    with caplog.at_level(logging.WARNING, logger="transmamba"):
        model(ids[:, :16])
        cache = model.make_cache()
        model(ids[:, :16], past_key_values=cache)
        assert not caplog.records
        for step in range(16, 24):
            model(ids[:, step : step + 1], past_key_values=cache)
        model(ids)
    (record,) = caplog.records
    assert "layers [1] switch to their SSM beyond the trained length of 16" in record.getMessage()
    assert "stays_attention_from(16)" in record.getMessage()


def test_layers_that_stay_attention_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(trans_points=[0, 7, 16], max_position_embeddings=16).requires_grad_(False)
    model.set_trans_points(model.config.schedule.stays_attention_from(16))
    with caplog.at_level(logging.WARNING, logger="transmamba"):
        model(tokens(1, 24))
    assert not caplog.records
