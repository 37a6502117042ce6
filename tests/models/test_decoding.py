"""Recorded decode steps write what the growing cache writes, token for token, wherever rows cross their TransPoints.

Everything but the recording itself runs here: the stand-in for CUDA graphs records nothing and runs the step. Tests
marked `gpu` record.
"""

import copy
import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import TRANS_POINT, VARIANTS, documents, shared_model, tiny_model, tokens
from tests.models.test_executions import padded
from tests.ops.kernels import needs_triton
from transmamba import TransMambaForCausalLM
from transmamba.models.transmamba import decoding
from transmamba.models.transmamba.decoding import Decoder, DecodeSession, run_eagerly
from transmamba.modules import LayerMode, StaticCache, layer_mode
from transmamba.ops.backends import prefer
from transmamba.ops.chain import in_a_chain

PAD, NEW = 0, 12
BOUND = 1e-6  # logits are handed out in fp32, of fp64 models
MODES = {"a": LayerMode.ATTENTION, "m": LayerMode.MIXED, "s": LayerMode.SSM}


def write(model: TransMambaForCausalLM, decoder: Decoder, ids: Tensor, **given: Any) -> Any:
    model.decoder = decoder
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "output_logits": True}
    return model.generate(ids, **options | {"return_dict_in_generate": True} | given)


def assert_same(model: TransMambaForCausalLM, ids: Tensor, decoder: Decoder | None = None, **given: Any) -> Decoder:
    """Write with recorded steps and with the growing cache, and compare; return the decoder that recorded."""
    decoder = decoder or Decoder(run_eagerly)
    grown = write(model, Decoder(enabled=False), ids, **given)
    recorded = write(model, decoder, ids, **given)
    assert torch.equal(recorded.sequences, grown.sequences)
    for found, exact in zip(recorded.logits, grown.logits, strict=True):
        assert relative_rms_error(found, exact) < BOUND
    assert decoder.sessions
    return decoder


def phases(decoder: Decoder) -> list[str]:
    """The modes of the layers in every phase that was run, as letters."""
    letters = {mode: letter for letter, mode in MODES.items()}
    return ["".join(letters[m] for m in x.layer_modes(phase)) for x in decoder.sessions.values() for phase in x.seen]


@pytest.mark.parametrize("prompt_length", [1, TRANS_POINT - 2, TRANS_POINT - 1, TRANS_POINT, TRANS_POINT + 1, 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_place_of_the_switch(variant: str, prompt_length: int) -> None:
    assert_same(shared_model(variant, torch.float64), tokens(3, prompt_length))


@pytest.mark.parametrize(
    ("schedule", "prompt_length", "expected"),
    [
        ([5, 7, 9], 4, "aaa saa ssa sss"),
        ([5, 7, 9], 5, "saa ssa sss"),
        ([5, 7, 9], 6, "saa ssa sss"),
        ([5, 7, 9], 9, "sss"),
        ([5, 5, 5], 4, "aaa sss"),
        ([0, 0, 0], 4, "sss"),
        ([0, None, None], 4, "saa"),
        ([None, None, None], 4, "aaa"),
        ([1, 2, 3], 1, "saa ssa sss"),
        ([200, 16, 17], 4, "aaa asa"),
    ],
    ids=str,
)
def test_the_phases_are_those_of_the_schedule(schedule: list[int | None], prompt_length: int, expected: str) -> None:
    model = tiny_model(torch.float64, trans_points=schedule).requires_grad_(False)
    given = {"max_new_tokens": 14} if 16 in schedule else {}
    assert set(phases(assert_same(model, tokens(2, prompt_length), **given))) == set(expected.split())


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qk_norm": True, "ssm_rope": True},
        {"attention_bias": True, "mlp_bias": True, "gate_bias": True},
        {"norm_type": "layer", "mlp_gated": False, "position_embedding": "learned"},
        {"hidden_act": "gelu"},
        {"rope_layers": [True, False, True]},
        {"mode_norm": True, "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(4, 4), (9, 5, 2)], ids=str)
def test_other_forms_of_the_layer(changes: dict[str, Any], lengths: tuple[int, ...]) -> None:
    model = tiny_model(torch.float64, **VARIANTS["every layer switches"] | changes).requires_grad_(False)
    ids, mask = padded(documents(*lengths), "left")
    assert_same(model, ids, attention_mask=mask)


@pytest.mark.parametrize("lengths", [(9, 5, 2), (7, 8, 6), (1, 12, 7), (6, 6, 6)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_at_different_positions(variant: str, lengths: tuple[int, ...]) -> None:
    ids, mask = padded(documents(*lengths), "left")
    decoder = assert_same(shared_model(variant, torch.float64), ids, attention_mask=mask)
    if variant == "every layer switches" and lengths == (9, 5, 2):
        assert any("m" in modes for modes in phases(decoder))


def test_a_batch_that_is_no_size_of_a_graph_is_filled_up() -> None:
    ids, mask = padded(documents(3, 8, 5, 7, 6), "left")
    decoder = assert_same(shared_model("every layer switches", torch.float64), ids, attention_mask=mask)
    (session,) = decoder.sessions.values()
    assert session.static.rows == 8


def test_sampling_draws_the_same_tokens() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    drawn = []
    for decoder in (Decoder(enabled=False), Decoder(run_eagerly)):
        torch.manual_seed(3)
        drawn.append(write(model, decoder, ids, do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*drawn)


def test_keys_are_read_up_to_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALLEST_CAPACITY", 8)
    model = tiny_model(torch.float64, trans_points=[None, 20, 0]).requires_grad_(False)
    decoder = assert_same(model, tokens(2, 3), max_new_tokens=40)
    (session,) = decoder.sessions.values()
    assert sorted({phase.places for phase in session.seen}) == [8, 16, 32, 64]


@pytest.mark.parametrize("schedule", [[0, 7, None], [None, None, None], [9, 7, 11]], ids=str)
def test_a_cache_goes_on_after_recorded_steps(schedule: list[int | None]) -> None:
    model = tiny_model(torch.float64, trans_points=schedule).requires_grad_(False)
    ids = tokens(2, 5)
    whole = write(model, Decoder(enabled=False), ids, max_new_tokens=18).sequences
    first = write(model, Decoder(run_eagerly), ids, max_new_tokens=6)
    cache = first.past_key_values
    twin = copy.deepcopy(cache)  # of a cache that lives at fixed addresses
    rest = whole[:, cache.get_seq_length() :]
    logits = model(rest, past_key_values=cache).logits  # several tokens at once
    assert relative_rms_error(logits, model(whole, use_cache=False).logits[:, -rest.shape[1] :]) < BOUND
    model.decoder = Decoder(run_eagerly)
    again = model.generate(first.sequences, max_new_tokens=12, do_sample=False, pad_token_id=PAD, past_key_values=twin)
    assert torch.equal(again, whole)


def test_caches_take_turns_at_one_address() -> None:
    model = shared_model("every layer switches", torch.float64)
    decoder = Decoder(run_eagerly)
    prompts = [tokens(2, 4, seed=seed) for seed in (1, 2)]
    wholes = [write(model, Decoder(enabled=False), ids, max_new_tokens=14).sequences for ids in prompts]
    firsts = [write(model, decoder, ids, max_new_tokens=3) for ids in prompts]
    assert len(decoder.sessions) == 1
    for first, whole in zip(firsts, wholes, strict=True):
        cache = first.past_key_values
        for column in range(cache.get_seq_length(), whole.shape[1]):
            logits = model(whole[:, column : column + 1], past_key_values=cache).logits
        exact = model(whole, use_cache=False).logits[:, -1:]
        assert relative_rms_error(logits, exact) < BOUND


@pytest.mark.parametrize("change", ["rows", "crop", "bytes", "reset"])
def test_what_needs_storage_of_its_own_finds_it(change: str) -> None:
    model = tiny_model(torch.float64, trans_points=[None, 30, None]).requires_grad_(False)
    ids = tokens(3, 5)
    caches = [
        write(model, decoder, ids, max_new_tokens=8).past_key_values
        for decoder in (Decoder(enabled=False), Decoder(run_eagerly))
    ]
    new = tokens(3, 2, seed=5)
    results = []
    for cache in caches:
        if change == "rows":
            cache.select_rows([2, 0, 0])
        elif change == "crop":
            cache.crop(-4)
        elif change == "bytes":
            assert cache.memory_bytes() > 0
        else:
            cache.reset()
        results.append(model(new, past_key_values=cache).logits)
    assert relative_rms_error(*results) < BOUND


def test_a_row_longer_than_planned_goes_on_growing() -> None:
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    cache = write(model, Decoder(run_eagerly), ids, max_new_tokens=4).past_key_values
    assert cache.planned_length == 8
    new = tokens(2, 5, seed=4)
    found = [model(new[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
    whole = write(model, Decoder(enabled=False), ids, max_new_tokens=4).sequences[:, :-1]
    exact = model(torch.cat([whole, new], dim=1), use_cache=False).logits[:, -5:]
    assert relative_rms_error(torch.cat(found, dim=1), exact) < BOUND


def test_layers_that_every_row_has_left_store_no_keys() -> None:
    model = tiny_model(torch.float64, trans_points=[5, 9, None]).requires_grad_(False)
    for prompt_length, stored in ((5, [5, 9, 256]), (6, [0, 9, 256]), (9, [0, 9, 256]), (10, [0, 0, 256])):
        decoder = assert_same(model, tokens(2, prompt_length))
        (session,) = decoder.sessions.values()
        assert [0 if x.keys is None else x.keys.shape[1] for x in session.static.layers] == stored
    ids, mask = padded(documents(12, 5), "left")
    decoder = assert_same(model, ids, attention_mask=mask)
    (before,) = decoder.sessions.values()
    assert_same(model, tokens(2, 11), decoder)  # storage of more serves as well
    assert list(decoder.sessions.values()) == [before]


def test_inference_mode_and_none_may_alternate() -> None:
    model, ids = tiny_model(torch.float64).requires_grad_(False), tokens(2, 5)
    decoder = Decoder(run_eagerly)
    wanted = write(model, Decoder(enabled=False), ids).sequences
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(write(model, decoder, ids).sequences, wanted)


def test_weights_that_moved_are_recorded_anew() -> None:
    model, ids = tiny_model(torch.float64).requires_grad_(False), tokens(2, 5)
    decoder = assert_same(model, ids)
    (before,) = decoder.sessions.values()
    assert_same(model, ids, decoder)
    assert list(decoder.sessions.values()) == [before]
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach(), requires_grad=False)
    assert_same(model, ids, decoder)
    assert before not in decoder.sessions.values()
    model.set_trans_points([9, None, 0])
    assert_same(model, ids, decoder)


@pytest.mark.parametrize(("rows", "expected"), [(1, True), (2, False)])
def test_one_row_is_a_chain_of_kernels(monkeypatch: pytest.MonkeyPatch, rows: int, expected: bool) -> None:
    """From its first layer to the logits, and nothing else is."""
    seen = []
    for name in ("mixer_step", "products", "hand_over"):
        function = getattr(decoding, name)

        def spy(*args: Any, name: str = name, function: Any = function) -> Any:
            seen.append((name, in_a_chain()))
            return function(*args)

        monkeypatch.setattr(decoding, name, spy)
    assert_same(tiny_model(torch.float64).requires_grad_(False), tokens(rows, TRANS_POINT - 2))
    assert set(seen) == {("mixer_step", expected), ("products", expected), ("hand_over", False)}


def test_warming_up_records_every_phase_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALLEST_CAPACITY", 8)
    model = tiny_model(torch.float64, trans_points=[5, 20, None]).requires_grad_(False)
    recorded = []

    def record(run: Any) -> Any:
        recorded.append(run)
        return run

    decoder = Decoder(record)
    session = decoder.session(model.model, model.lm_head, model.model._mixers(), 2, 40)
    decoder.keep(session)
    assert session.warm_up(40) == len(session.steps) == len(recorded)
    assert_same(model, tokens(2, 3), decoder, max_new_tokens=37)
    assert list(decoder.sessions.values()) == [session]
    assert len(session.steps) == len(recorded)  # nothing new was met


@pytest.mark.parametrize(
    ("given", "reason"), [({"num_beams": 3}, "beam search moves rows after every token")], ids=["beams"]
)
def test_what_cannot_be_recorded_says_why_once(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], reason: str
) -> None:
    decoding.announce.cache_clear()
    model, ids = shared_model("default", torch.float64), tokens(2, 5)
    with caplog.at_level(logging.WARNING):
        found = [write(model, Decoder(run_eagerly), ids, output_logits=False, **given).sequences for _ in range(2)]
    assert [m for m in caplog.messages if "graphs" in m] == [
        f"decoding runs without CUDA graphs, which is slower: {reason}"
    ]
    assert torch.equal(found[0], write(model, Decoder(enabled=False), ids, output_logits=False, **given).sequences)


def test_hooks_adapters_and_moving_frequencies_are_obstacles() -> None:
    def reason(model: TransMambaForCausalLM, batch: int = 1, beams: int = 1) -> str:
        return decoding.obstacle(model, model.model, batch=batch, beams=beams)

    model = tiny_model()
    assert reason(model) == ""
    assert "graphs are made for up to 256" in reason(model, batch=257)
    handle = model.model.layers[1].register_forward_hook(lambda *args: None)
    assert "model.layers.1 has forward hooks" in reason(model)
    handle.remove()

    class Adapter(nn.Linear):
        pass

    model.model.layers[0].mixer.q_proj = Adapter(32, 32, bias=False)
    assert "q_proj is a Adapter; merge adapters" in reason(model)
    assert "training mode" in reason(tiny_model().train())
    moving = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert "'dynamic' changes its frequencies" in reason(tiny_model(**moving))


def test_a_mode_is_read_off_the_positions() -> None:
    assert layer_mode(None, [0, 5]) is LayerMode.ATTENTION
    assert layer_mode(0, [0]) is LayerMode.SSM
    assert [layer_mode(3, pair) for pair in ([1, 2], [2, 3], [3, 9])] == [*LayerMode]


def test_batches_and_lengths_are_rounded_up_a_little() -> None:
    assert [decoding.rounded_batch(n) for n in (1, 2, 3, 9, 16, 17, 33, 256)] == [1, 2, 4, 16, 16, 32, 48, 256]
    for length in (1, 255, 256, 257, 1025, 32_768, 100_000):
        assert length <= decoding.rounded_length(length) <= max(256, length * 5 / 4)
    assert decoding.rounded_length(32_768) == 32_768


@pytest.mark.parametrize("fault", ["prefix dropped", "rows swapped", "ring off by one"])
def test_faults_of_a_step_are_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model, ids = shared_model("every layer switches", torch.float64), tokens(2, 4)
    if fault == "prefix dropped":
        monkeypatch.setattr(DecodeSession, "hand_over", lambda self: None)
    elif fault == "rows swapped":
        run = DecodeSession._run

        def swapped(self: DecodeSession, phase: Any) -> None:
            run(self, phase)
            for layer in self.static.layers:
                if layer.state is not None:
                    layer.state.copy_(layer.state.flip(0))

        monkeypatch.setattr(DecodeSession, "_run", swapped)
    else:
        load = StaticCache.load

        def shifted(self: StaticCache, cache: Any) -> None:
            load(self, cache)
            for layer in self.layers:
                layer.conv.copy_(layer.conv.roll(1, 1))

        monkeypatch.setattr(StaticCache, "load", shifted)
    grown = write(model, Decoder(enabled=False), ids)
    wrong = write(model, Decoder(run_eagerly), ids)
    errors = [relative_rms_error(a, b) for a, b in zip(wrong.logits, grown.logits, strict=True)]
    assert max(errors) > 1e3 * BOUND


@needs_triton
@pytest.mark.parametrize("variant", ["every layer switches", "one key head"])
def test_with_kernels_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """In Triton's interpreter on a CPU; on a card they are compiled."""
    model = tiny_model(torch.float32, **VARIANTS[variant]).requires_grad_(False)
    ids, mask = padded(documents(6, 4, 8), "left")
    grown = write(model, Decoder(enabled=False), ids, attention_mask=mask, max_new_tokens=5)
    for op in ("attention_step", "conv_ssd_step", "ssd_step", "step_linear"):
        monkeypatch.setattr(import_module(f"transmamba.ops.{op}"), "resolve_backend", lambda *args, **rest: "triton")
    recorded = write(model, Decoder(run_eagerly), ids, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(recorded.sequences, grown.sequences)
    for found, exact in zip(recorded.logits, grown.logits, strict=True):
        assert relative_rms_error(found, exact) < 1e-4


@needs_triton
def test_a_step_of_states_is_five_kernels_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what stands around the layers; an op of torch between two of ours would keep them from overlapping."""
    for op in ("conv_ssd_step", "step_linear"):
        monkeypatch.setattr(import_module(f"transmamba.ops.{op}"), "resolve_backend", lambda *args, **rest: "triton")
    model = tiny_model(torch.float32, **VARIANTS["every layer switches"]).requires_grad_(False)
    mixers = model.model._mixers()
    points = [mixer.trans_point for mixer in mixers]
    static = StaticCache(
        [mixer.config for mixer in mixers], points, rows=1, capacity=96, dtype=torch.float32, device=DEVICE, shortest=50
    )
    static.place([50])
    session = DecodeSession(model.model, model.lm_head, static, run_eagerly)
    session.step(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    with Kernels() as kernels:
        session._compute(session.phase())
    layer = ["step_linear", "conv_ssd_step", "step_linear", "step_linear", "step_linear"]
    assert kernels.names == ["embedding", *layer * len(mixers), "step_linear", "copy_", "add_"]


class Kernels(TorchDispatchMode):
    """Names of the ops that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches_nothing = func.is_view or func._schema.name in ("aten::empty", "aten::split", "aten::new_empty")
        if not launches_nothing:
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **kwargs or {})


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Plain PyTorch, and our kernels."""
    with prefer("triton" if request.param else "torch"):
        yield request.param


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(4, 4), (9, 5, 2), (6, 7, 8, 1, 12)], ids=str)
@pytest.mark.parametrize("variant", ["default", "every layer switches", "standard form", "one key head"])
def test_graphs_compute_what_the_full_forward_does(
    kernels: bool, variant: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The whole sequence in one forward, of tokens that graphs have written; rounding may choose other tokens."""
    model = tiny_model(dtype, **VARIANTS[variant]).requires_grad_(False)
    exact = copy.deepcopy(model).double()
    ids, mask = padded(documents(*lengths), "left")
    assert isinstance(model.decoder, Decoder)
    model.decoder = decoder = Decoder()
    for _ in range(2):  # the second time, everything is replayed
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found = torch.stack(out.logits, dim=1)
        mask_all = torch.cat([mask, torch.ones_like(out.sequences[:, ids.shape[1] :])], dim=1)
        wanted = exact(out.sequences, attention_mask=mask_all, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
        # A CPU errs by 8e-7 and 2e-2 at most; a card's attention may take tf32 products for fp32.
        assert relative_rms_error(found, wanted) < (1e-3 if dtype == torch.float32 else 0.05)
    (session,) = decoder.sessions.values()
    assert session.steps


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 16, 256])
def test_replayed_steps_are_those_that_run_eagerly(kernels: bool, batch: int) -> None:
    model, ids = tiny_model(torch.float32, **VARIANTS["every layer switches"]).requires_grad_(False), tokens(batch, 4)
    assert DEVICE.type == "cuda"
    eager = write(model, Decoder(run_eagerly), ids, max_new_tokens=24)
    graphs = write(model, Decoder(), ids, max_new_tokens=24)
    assert torch.equal(graphs.sequences, eager.sequences)
    for found, wanted in zip(graphs.logits, eager.logits, strict=True):
        assert relative_rms_error(found, wanted) < 1e-5
