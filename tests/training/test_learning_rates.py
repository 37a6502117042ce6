"""Learning rates by depth, and what the optimizer makes of them."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tests.models.vision_models import tiny_vision_model
from tests.recipes.adaptations import write_teacher
from transmamba.errors import RecipeError
from transmamba.training import TransMambaTrainer, layer_rates


@pytest.mark.parametrize("family", ["plain_mamba", "vim", "video_mamba", "vmamba"])
def test_rates_fall_from_the_head_to_the_embeddings(family: str) -> None:
    names = [name for name, _ in tiny_vision_model(family).named_parameters()]
    rates = layer_rates(names, 0.5)
    assert list(rates) == names
    depths = sorted(set(rates.values()), reverse=True)
    assert depths == [0.5**number for number in range(len(depths))]  # no depth is left out
    assert rates["classifier.weight"] == 1
    embeddings = {rate for name, rate in rates.items() if "patch_embed" in name or "pos_embed" in name}
    assert embeddings == {depths[-1]}
    if family != "vmamba":
        last = max(int(name.split("layers.")[1].split(".")[0]) for name in names if "backbone.layers." in name)
        assert rates[f"backbone.layers.{last}.mixer.out_proj.weight"] == 0.5
        assert rates["backbone.layers.0.mixer.out_proj.weight"] == 0.5 ** (last + 1)
        assert rates["backbone.norm.weight"] == 1
    else:
        blocks = [name for name in names if ".blocks." in name]
        assert rates[blocks[0]] < rates[blocks[-1]] == 0.5


def test_a_teacher_has_rates_too(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(write_teacher(tmp_path))
    rates = layer_rates([name for name, _ in model.named_parameters()], 0.5)
    assert sorted(set(rates.values())) == [0.125, 0.25, 0.5, 1]
    assert {name.split(".")[-2] for name, rate in rates.items() if rate == 1} == {"layernorm", "classifier"}


def test_no_decay_and_no_layers() -> None:
    assert layer_rates(["a.layers.0.w", "head.w"], 1.0) == {"a.layers.0.w": 1, "head.w": 1}
    assert layer_rates(["w", "b"], 0.5) == {"w": 1, "b": 1}
    assert layer_rates([], 0.5) == {}


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(RecipeError, match=r"layer_decay=.* must be above 0 and at most 1"):
        layer_rates(["w"], decay)


def test_a_parameter_moves_by_its_rate(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in the direction of the gradient, whatever that is."""
    model = tiny_vision_model("vim")
    names = [name for name, _ in model.named_parameters()]
    rates = layer_rates(names, 0.5) | {"classifier.bias": 3.0}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        weight_decay=0.0,
        adam_epsilon=1e-30,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    side = model.config.image_size
    items = [{"pixel_values": torch.randn(3, side, side), "labels": torch.tensor(n % 3)} for n in range(4)]

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return model(batch["pixel_values"], labels=batch["labels"]).loss, {}

    trainer = TransMambaTrainer(model, arguments, train_dataset=items, loss_fn=loss_fn, rates=rates)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3  # what is logged is the whole rate
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()
        # fp32: the step is exact to 2^-23 of itself, and adding it to a weight below 4 rounds to 2^-22.
        assert moved.max().item() == pytest.approx(1e-3 * rates[name], rel=1e-4, abs=3e-7), name
