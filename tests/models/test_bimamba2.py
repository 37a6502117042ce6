"""The bidirectional Mamba-2 encoder: rows stand for themselves, any length runs, and it saves and loads."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import worst_error
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.models import BiMamba2Config, BiMamba2Model
from transmamba.models.initial_values import find_initial_value
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "num_positions": 4,
}


def encoder(**changes: Any) -> BiMamba2Model:
    torch.manual_seed(0)
    model = BiMamba2Model(BiMamba2Config(**(SMALL | changes))).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
def test_a_padded_row_is_the_row_alone(direction_weights: str) -> None:
    """Wherever the padding stands: behind, before, or between the tokens."""
    model = encoder(direction_weights=direction_weights)
    ids = torch.randint(0, 50, (4, 11))
    mask = torch.ones(4, 11, dtype=torch.long)
    mask[1, 4:], mask[2, :6], mask[3, [0, 3, 4, 9]] = 0, 0, 0
    types = torch.randint(0, 2, (4, 11))
    out = model(ids, mask, types, output_hidden_states=True, output_directions=True)
    for row in range(4):
        kept = mask[row] == 1
        alone = model(ids[row, kept][None], None, types[row, kept][None], output_directions=True)
        assert relative_rms_error(out.last_hidden_state[row, kept], alone.last_hidden_state[0]) < 1e-13
        assert relative_rms_error(out.pooler_output[row], alone.pooler_output[0]) < 1e-13
        assert torch.equal(out.hidden_states[-1][row], out.last_hidden_state[row])
        assert not out.last_hidden_state[row, ~kept].any()
        for ours, theirs in zip(out.directions[1], alone.directions[1], strict=True):
            assert relative_rms_error(ours.in_raster_order()[row, kept], theirs.in_raster_order()[0]) < 1e-13
    assert relative_rms_error(model(ids).last_hidden_state[3], out.last_hidden_state[3]) > 0.1


def test_directions_are_read_in_their_order() -> None:
    model = encoder()
    mask = torch.tensor([[1, 1, 1, 0]])
    ((forward, backward), _) = model(torch.tensor([[5, 6, 7, 0]]), mask, output_directions=True).directions
    assert forward.patches.tolist() == [[0, 1, 2, TOKEN_WITHOUT_PATCH]]
    assert backward.patches.tolist() == [[2, 1, 0, TOKEN_WITHOUT_PATCH]]
    changed = model(torch.tensor([[5, 6, 8, 0]]), mask, output_directions=True).directions[0]
    assert torch.equal(changed[0].features[:, :2], forward.features[:, :2])  # the past does not know the last token
    assert not torch.equal(changed[1].features[:, 0], backward.features[:, 0])


def test_any_length_runs_and_the_embedding_is_the_mean() -> None:
    model = encoder()
    ids = torch.randint(0, 50, (1, 700))  # 4 learned positions
    out = model(ids)
    mean = out.last_hidden_state.mean(1)
    assert relative_rms_error(out.pooler_output, mean / mean.norm(dim=-1, keepdim=True)) < 1e-13
    plain = encoder(normalize=False)(ids)
    assert relative_rms_error(plain.pooler_output, mean) < 1e-13
    swapped = ids.clone()
    swapped[0, 500], swapped[0, 600] = ids[0, 600], ids[0, 500]
    assert relative_rms_error(model(swapped).last_hidden_state, out.last_hidden_state) > 1e-3  # order still counts


def test_a_row_without_tokens_is_zero() -> None:
    out = encoder()(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert not out.pooler_output[1].any()
    assert bool(torch.isfinite(out.last_hidden_state).all())


def test_embeddings_may_be_given() -> None:
    model = encoder()
    ids = torch.randint(0, 50, (2, 5))
    found = model(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    assert torch.equal(found, model(ids).last_hidden_state)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = encoder().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        runs: list[int] = []
        model.layers[0].mixer.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(torch.arange(12).view(2, 6), output_directions=True).pooler_output[:, 0].sum().backward()
        assert len(runs) == 1 + checkpointing  # once more in the backward pass
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)  # type: ignore[arg-type]
    assert any(a is not None for a in gradients[0])


def of_every_layer(model: BiMamba2Model, **autocast: Any) -> list[torch.Tensor]:
    """Outputs and gradients on a padded batch."""
    mask = torch.ones(3, 9, dtype=torch.long, device=model.device)
    mask[1, 3:] = 0
    with torch.autocast(model.device.type, dtype=torch.bfloat16, **autocast):
        ids = torch.arange(27, device=model.device).view(3, 9)
        out = model(ids, mask, output_hidden_states=True)
    slopes = torch.autograd.grad(out.pooler_output[:, 0].sum(), list(model.parameters()), allow_unused=True)
    return [*out.hidden_states, out.pooler_output, *(one for one in slopes if one is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["as it is", "autocast"])
def test_norms_that_are_called_give_the_same(dtype: torch.dtype, autocast: bool) -> None:
    """With a hook on it a norm is a module again, which reads a sum."""
    model = encoder().to(dtype)
    found = of_every_layer(model, enabled=autocast)
    called: list[torch.nn.Module] = []
    for layer in model.layers:
        for norm in (layer.mixer_norm, layer.mlp_norm):
            norm.register_forward_hook(lambda module, *_: called.append(module))
    modules = of_every_layer(model, enabled=autocast)
    assert len(called) == 4
    assert [one.dtype for one in found] == [one.dtype for one in modules]
    assert all(torch.equal(new, old) for new, old in zip(found, modules, strict=True))


@needs_triton
def test_the_kernel_that_adds_and_normalises_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder().to(DEVICE, torch.float32)
    before, exact = of_every_layer(model, enabled=False), of_every_layer(encoder().to(DEVICE), enabled=False)
    op, kernels = (import_module(f"transmamba.ops.residual_norm{name}") for name in ("", ".triton"))
    ran: list[int] = []
    run = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *given: ran.append(1) or run(*given))
    monkeypatch.setattr(op, "resolve_backend", lambda *_, **__: "triton")
    found = of_every_layer(model, enabled=False)
    assert len(ran) == 4
    assert worst_error(found, exact) < 4 * worst_error(before, exact) < 1e-3  # as near, chance aside


def test_it_saves_and_loads(tmp_path: Path) -> None:
    model = encoder(direction_weights="separate", mixer_norm=True).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, BiMamba2Model)
    assert AutoConfig.from_pretrained(tmp_path).direction_weights == "separate"
    ids = torch.randint(0, 50, (2, 5))
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


def test_initial_values_are_those_of_the_table() -> None:
    config = BiMamba2Config(**(SMALL | {"hidden_size": 48, "direction_weights": "separate", "mixer_norm": True}))
    torch.manual_seed(0)
    model = BiMamba2Model(config)
    table = BiMamba2Model.initial_values(config)
    for name, parameter in model.named_parameters():
        row = find_initial_value(table, name)
        if row.distribution == "constant":
            assert bool((parameter == row.a).all()), name
        elif row.distribution == "normal":
            assert abs(parameter.std().item() / row.a - 1) < 0.3, name  # 144 numbers or more: 5 sigma
        elif row.distribution == "log_uniform_A":
            assert 0 <= parameter.min() <= parameter.max() <= torch.tensor(16.0).log(), name
    dt = torch.nn.functional.softplus(model.layers[0].mixer.dt_bias_b)
    assert 0.0009 < dt.min() <= dt.max() < 0.11
    assert bool((model.layers[1].mixer.D_b == 1).all())


def test_bf16_is_near() -> None:
    model = encoder().to(DEVICE)
    ids = torch.randint(0, 50, (2, 30), device=DEVICE)
    found = model.to(torch.bfloat16)(ids).pooler_output
    exact = model.double()(ids).pooler_output  # of the weights that bf16 has left
    assert found.dtype == torch.bfloat16
    assert relative_rms_error(found, exact) < 2**-4  # 2 layers of about 8 roundings of 2^-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction_weights": "both"}, "direction_weights='both' is unknown"),
        ({"num_heads": 5}, "num_heads=5 must divide hidden_size=24"),
        ({"conv_kernel": -1}, "conv_kernel=-1 must be at least 0"),
        ({"num_positions": 0}, "num_positions=0 must be at least 1"),
        ({"hidden_act": "wave"}, "hidden_act='wave' is unknown"),
        ({"dt_min": 0.0}, "must be 0 < dt_min <= dt_max"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BiMamba2Config(**(SMALL | changes))


def test_bad_inputs_are_refused() -> None:
    model = encoder()
    with pytest.raises(InputError, match="give input_ids or inputs_embeds, one of the two"):
        model()
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 4\); give \(2, 5\)"):
        model(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
def test_a_gpu_gives_the_same_embeddings_and_gradients(direction_weights: str) -> None:
    """By the Triton scan, whose state has head_dim + 1 channels here: 33, a size that is padded inside."""
    sizes = {"hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "num_positions": 40}
    exact = encoder(**sizes, direction_weights=direction_weights).train()
    ids = torch.randint(0, 50, (3, 300))
    mask = (torch.arange(300) < torch.tensor([[300], [17], [129]])).long()
    weights = torch.randn(3, 64, dtype=torch.float64)
    (exact(ids, mask).pooler_output * weights).sum().backward()
    with torch.no_grad():
        wanted = exact(ids, mask).pooler_output
    ours = encoder(**sizes, direction_weights=direction_weights).train().float().to("cuda")
    out = ours(ids.cuda(), mask.cuda()).pooler_output
    (out * weights.float().cuda()).sum().backward()
    assert relative_rms_error(out, wanted) < 1e-4  # fp32 sums over 300 tokens in two layers
    for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert a.grad is not None, name
        assert relative_rms_error(a.grad, b.grad) < 1e-3, name  # of sums of both signs
