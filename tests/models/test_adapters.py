"""PEFT: LoRA on each projection and on the convolution changes the output, trains, and merges."""

import pytest
import torch

from tests.helpers import relative_rms_error
from tests.models.language_models import tiny_model, tokens

peft = pytest.importorskip("peft")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "z_proj", "dt_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(target: str, **given: object) -> "peft.PeftModel":
    # init_lora_weights=False draws both factors, so that the adapter does something at once.
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM", **given)
    return peft.get_peft_model(tiny_model(torch.float64), config).eval()


@pytest.mark.parametrize("target", PROJECTIONS)
def test_lora_changes_the_output_in_every_execution_and_merges(target: str) -> None:
    ids = tokens(2, 12)
    model = adapted(target, r=4)
    plain, changed = tiny_model(torch.float64)(ids).logits, model(ids, use_cache=False).logits
    assert relative_rms_error(changed, plain) > 1e-3
    cache = model.make_cache()
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
    assert relative_rms_error(torch.cat(pieces, dim=1), changed) < 1e-10
    merged = model.merge_and_unload()
    assert relative_rms_error(merged(ids).logits, changed) < 1e-10


@pytest.mark.parametrize("target", PROJECTIONS)
def test_lora_trains_its_factors_only(target: str) -> None:
    ids = tokens(2, 12)
    model = adapted(target, r=4)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(f"{target}.lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
def test_lora_on_the_convolution_changes_the_output() -> None:
    ids = tokens(2, 12)
    model = adapted(
        "conv1d", r=64
    )  # PEFT wants a multiple of the groups, which are the channels; it does not merge these
    changed = model(ids, use_cache=False).logits
    assert relative_rms_error(changed, tiny_model(torch.float64)(ids).logits) > 1e-3
    cache = model.make_cache()
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
    assert relative_rms_error(torch.cat(pieces, dim=1), changed) < 1e-10


def test_the_convolution_may_be_trained_beside_the_adapters() -> None:
    ids = tokens(2, 12)
    model = adapted("q_proj", r=4, modules_to_save=["conv1d"])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("conv1d.modules_to_save" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_an_adapted_model_generates_what_it_computes() -> None:
    model, ids = adapted("v_proj", r=4), tokens(1, 5)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, 5:], model(out, use_cache=False).logits.argmax(-1)[:, 4:-1])
