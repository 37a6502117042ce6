"""Activations computed again in backward: the same bits, less memory, and nobody else's choice overridden."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tests.helpers import DEVICE
from tests.models.language_models import VARIANTS, tiny_config, tiny_model, tokens
from tests.ops.kernels import needs_triton
from transmamba import TransMambaConfig, TransMambaForCausalLM
from transmamba.ops.backends import prefer
from transmamba.ops.recomputation import _Recipe

Found = tuple[Tensor, dict[str, Tensor | None]]
PACKED = [0, 5, 12, 36]  # documents shorter and longer than the tiny model's TransPoint

# transformers renames gradient checkpointing, and says so; the old names serve all its versions that we support.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # the mode norms'
]


@pytest.fixture(autouse=True)
def same_bits_every_time() -> Iterator[None]:
    """On a GPU, the gradients of embeddings and of attention are sums in no fixed order unless asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(DEVICE.type == "cuda", warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def step(model: TransMambaForCausalLM, *, autocast: bool = False, **inputs: Any) -> Found:
    """The loss and every gradient."""
    inputs = inputs or {"input_ids": tokens(2, 18)}
    model.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = model(labels=inputs["input_ids"], **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_bits(found: Found, expected: Found) -> None:
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (other is None) == (gradient is None), name
        assert gradient is None or other is None or torch.equal(other, gradient), name


def pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[TransMambaForCausalLM, TransMambaForCausalLM]:
    """One model in training, without and with the switch."""
    plain = tiny_model(dtype, **changes).train()
    saving = copy.deepcopy(plain)
    saving.config.recompute_activations = True
    assert not plain.config.recompute_activations
    return plain, saving


def kept_bytes(model: TransMambaForCausalLM, *, autocast: bool = False, **inputs: Any) -> int:
    """What forward leaves allocated, by the allocator's own account; a graph that is kept keeps all of it."""
    inputs = inputs or {"input_ids": tokens(2, 96)}
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        model(**inputs)  # tables that are made once
        with torch.no_grad():
            model(tokens(1, 1))  # Triton's interpreter holds what its last kernel read, autocast holds casts of weights
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            logits = model(**inputs).logits
            with torch.no_grad():
                model(tokens(1, 1))
    events = seen.profiler.kineto_results.events()
    assert logits.requires_grad
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_has_the_same_bits(variant: str, autocast: bool) -> None:
    plain, saving = pair(**VARIANTS[variant])
    for inputs in ({}, {"input_ids": tokens(1, 36), "cu_seqlens": PACKED}):
        assert_same_bits(step(saving, autocast=autocast, **inputs), step(plain, autocast=autocast, **inputs))


@pytest.mark.parametrize("trans_point", [0, 1, 7, 17, 18, 40, None])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"mlp_gated": False}, {"hidden_act": "gelu"}], ids=str)
def test_wherever_a_layer_switches(trans_point: int | None, changes: dict[str, Any]) -> None:
    plain, saving = pair(trans_points=[trans_point] * 2, num_hidden_layers=2, **changes)
    assert_same_bits(step(saving), step(plain))


@needs_triton
@pytest.mark.parametrize("trans_point", [0, 7, None])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_kernels_give_the_same_bits(trans_point: int | None, packed: bool) -> None:
    plain, saving = pair(trans_points=[trans_point], num_hidden_layers=1)
    inputs = {"input_ids": tokens(1, 20), "cu_seqlens": [0, 5, 20]} if packed else {"input_ids": tokens(1, 9)}
    with prefer("triton", interpreted=True):
        for autocast in (False, True):
            assert_same_bits(step(saving, autocast=autocast, **inputs), step(plain, autocast=autocast, **inputs))


def layers_of_400m(schedule: str, form: str, *, recompute: bool, tokens_in_a_row: int) -> TransMambaForCausalLM:
    """The proportions of the 400M configuration in small, where one token's part counts."""
    config = TransMambaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=tokens_in_a_row,
        trans_points=schedule,
        mixer_form=form,
        use_cache=False,
        recompute_activations=recompute,
    )
    torch.manual_seed(0)
    return TransMambaForCausalLM(config).to(DEVICE).train()


@needs_triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU's allocations; benchmarks/models counts a GPU's")
@pytest.mark.parametrize(
    ("schedule", "form", "spared"),
    [
        # Units per layer: two normed inputs, the MLP's product, and for a scan q, k, v, y, z and the gate's product.
        ("mamba2", "shared", 2 + 256 / 96 + 6),
        ("transformer", "standard", 2 + 256 / 96),
        # q and k rotated, and v; but the tables of the rotation in fp32 are kept now, once for all layers.
        ("transformer", "shared", 2 + 256 / 96 + 3 - 4 / 3),
    ],
)
def test_as_much_memory_is_spared_as_is_said(schedule: str, form: str, spared: float) -> None:
    length = 256
    kept = []
    with prefer("triton", interpreted=True):
        for recompute in (False, True):
            model = layers_of_400m(schedule, form, recompute=recompute, tokens_in_a_row=length)
            inputs = {"input_ids": torch.randint(64, (1, length), device=DEVICE)}
            kept.append(kept_bytes(model, autocast=True, **inputs))
    units = (kept[0] - kept[1]) / (length * 96 * 2)  # not of weights, which autocast had cast before
    assert spared - 0.05 < units < spared + 0.5  # decays, states and other small things come on top


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_gradient_checkpointing_goes_before_it(use_reentrant: bool, autocast: bool) -> None:
    plain, saving = pair()
    for model in (plain, saving):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_bits(step(saving, autocast=autocast), step(plain, autocast=autocast))
    if not use_reentrant:
        assert kept_bytes(saving) == kept_bytes(plain)


def test_checkpointing_by_others_still_drops_a_layer() -> None:
    """Who wraps layers in torch's checkpoint sets hooks around ours: what we keep, they keep or drop."""
    plain, saving = pair()
    expected, unwrapped = step(plain), kept_bytes(saving)
    for layer in saving.model.layers:
        layer.forward = checkpointed(layer.forward)
    assert_same_bits(step(saving), expected)
    assert kept_bytes(saving) < unwrapped / 2


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False)

    return run


def test_hooks_around_a_model_see_all_that_is_kept() -> None:
    plain, saving = pair()
    expected = step(plain)
    count = []

    def to_another_place(x: Tensor) -> Tensor:
        count.append(x.numel())
        return x.clone()

    saving.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(to_another_place, lambda x: x):
        loss = saving(tokens(2, 18), labels=tokens(2, 18)).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in saving.named_parameters()}
    assert_same_bits((loss.detach(), gradients), expected)
    assert len(count) > 100


def test_backward_may_run_twice() -> None:
    plain, saving = pair()
    for model in (plain, saving):
        loss = model(tokens(2, 18), labels=tokens(2, 18)).loss
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_second_derivatives() -> None:
    found = []
    for model in pair(torch.float64):
        embeddings = model.model.embed_tokens(tokens(2, 18)).detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the only attention of torch's that can be differentiated twice
            loss = model(inputs_embeds=embeddings, labels=tokens(2, 18)).loss
        (slope,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        found.append(
            torch.autograd.grad(slope.square().sum(), list(model.model.layers.parameters()), allow_unused=True)
        )
    assert any(x is not None and x.any() for x in found[0])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_second_derivatives_by_differences() -> None:
    _, model = pair(torch.float64, num_hidden_layers=2, trans_points=[0, 3])
    embeddings = model.model.embed_tokens(tokens(1, 5)).detach().requires_grad_()

    def head(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(inputs_embeds=x).logits[..., :3].tanh()

    assert torch.autograd.gradcheck(head, embeddings, fast_mode=True)
    assert torch.autograd.gradgradcheck(head, embeddings, fast_mode=True)


def test_a_weight_that_changes_before_backward_is_an_error() -> None:
    _, model = pair()
    loss = model(tokens(2, 18), labels=tokens(2, 18)).loss
    with torch.no_grad():
        model.model.layers[0].mixer.conv1d.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_leaves_no_memory_behind() -> None:
    _, model = pair()
    loss = model(tokens(2, 18), labels=tokens(2, 18)).loss
    seen = []
    hook = model.model.layers[1].mixer.register_forward_hook(lambda module, inputs, y: seen.append(weakref.ref(y)))
    gc.disable()
    try:
        loss = model(tokens(2, 18), labels=tokens(2, 18)).loss
        loss.backward()
        del loss
        assert seen[0]() is None  # no cycle holds the graph
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("evaluating", [True, False], ids=["evaluation", "no gradients"])
def test_only_training_is_touched(evaluating: bool) -> None:
    plain, saving = pair()
    ids = tokens(2, 18)
    if evaluating:
        plain.eval()
        saving.eval()
        assert kept_bytes(saving) == kept_bytes(plain)
    with torch.no_grad():
        assert torch.equal(saving(ids).logits, plain(ids).logits)


def pass_on(*_: Any) -> None:
    """A hook that changes nothing."""


CHANGES: dict[str, Callable[[TransMambaForCausalLM], Any]] = {
    "convolution": lambda model: model.model.layers[1].mixer.conv1d.register_forward_hook(pass_on),
    "projections": lambda model: [
        module.register_forward_pre_hook(pass_on) for module in model.modules() if type(module) is nn.Linear
    ],
    "norms": lambda model: [
        module.register_forward_hook(pass_on) for module in model.modules() if type(module) is nn.RMSNorm
    ],
    "weights of another kind": lambda model: [
        nn.utils.parametrizations.orthogonal(layer.mixer.z_proj) for layer in model.model.layers
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_modules_that_are_more_than_their_weights_are_called(
    change: Callable[[TransMambaForCausalLM], Any], autocast: bool
) -> None:
    plain, saving = pair()
    for model in (plain, saving):
        torch.manual_seed(3)
        change(model)
    saving.load_state_dict(plain.state_dict())
    assert_same_bits(step(saving, autocast=autocast), step(plain, autocast=autocast))


@needs_triton
@pytest.mark.parametrize("kernels", [True, False])
def test_everything_is_computed_again_once(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also k and v, which the scan, the Memory Converter and attention all read."""
    calls: Counter[int] = Counter()
    recipes = []  # held, so that ids are not given twice
    run = _Recipe.run

    def counted(recipe: _Recipe) -> None:
        recipes.append(recipe)
        calls[id(recipe)] += 1
        run(recipe)

    monkeypatch.setattr(_Recipe, "run", counted)
    _, model = pair(trans_points=[7], num_hidden_layers=1)
    with prefer("triton" if kernels else "torch", interpreted=kernels):
        step(model)
    names = Counter(getattr(recipe.function, "__name__", type(recipe.function).__name__) for recipe in recipes)
    assert names["causal_conv1d"] == 3
    assert names["gated_rms_norm"] == 2
    assert names["run_scan" if kernels else "ssd_scan_torch"] == 1
    assert set(calls.values()) == {1}, names


def test_hooks_of_projections_run_once_a_step() -> None:
    _, model = pair()
    calls: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    step(model)
    assert len(calls) == len(set(calls))


def test_compiled_models_choose_by_themselves() -> None:
    torch.compiler.reset()
    plain, saving = pair(trans_points=[None] * 3)
    ids = tokens(2, 18)
    compiled = [torch.compile(model, backend="aot_eager") for model in (plain, saving)]
    losses = [model(ids, labels=ids).loss for model in compiled]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)
    torch.compiler.reset()


def test_who_disables_hooks_is_left_alone() -> None:
    plain, saving = pair()
    expected = step(plain)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same_bits(step(saving), expected)


def test_transforms_of_torch_func() -> None:
    slopes = []
    for model in pair(trans_points=[0, 0, 0]):
        embeddings = model.model.embed_tokens(tokens(2, 9)).detach()
        slopes.append(torch.func.grad(lambda x, model=model: model(inputs_embeds=x).logits.square().mean())(embeddings))
    assert slopes[0].any()
    assert torch.equal(*slopes)


def test_the_switch_is_saved_and_absent_in_old_files(tmp_path: Any) -> None:
    tiny_config(recompute_activations=True).save_pretrained(tmp_path)
    assert TransMambaConfig.from_pretrained(tmp_path).recompute_activations
    old = tiny_config().to_dict()
    old.pop("recompute_activations")
    assert not TransMambaConfig.from_dict(old).recompute_activations
