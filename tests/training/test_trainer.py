"""The Trainer: losses, accumulation, exact resumption, and checkpoints under a kill and a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.helpers import ROOT, relative_rms_error
from tests.training.toy import toy_run
from transmamba.data import load_documents, load_tokenizer, pack_documents
from transmamba.errors import CheckpointError, RecipeError
from transmamba.models import TransMambaForCausalLM, vision_model
from transmamba.recipes import TrainedModel, train_language_model
from transmamba.training import TransMambaTrainer, causal_lm_loss, last_complete_checkpoint
from transmamba.training.trainer import decayed_parameter_names


def weights_and_losses(trained: TrainedModel) -> tuple[dict[str, Tensor], list[tuple[int, int, float]]]:
    rows = [(row.step, row.tokens, row.loss) for row in trained.history.training]
    return load_file(trained.model_folder / "model.safetensors"), rows


def assert_identical(one: TrainedModel, other: TrainedModel) -> None:
    (weights, losses), (other_weights, other_losses) = weights_and_losses(one), weights_and_losses(other)
    assert losses == other_losses
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert one.evaluation == other.evaluation


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == step:
            raise Crash
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_20_steps_are_10_and_a_crash_and_10_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    settings = {"save_every": 10, "eval_every": 10, "gradient_accumulation": accumulation}
    whole = train_language_model(toy_run(tmp_path, output=str(tmp_path / "whole"), **settings), device="cpu")
    run = toy_run(tmp_path, **settings)
    with monkeypatch.context() as patch:
        crash_at(patch, 13)
        with pytest.raises(Crash):
            train_language_model(run, device="cpu")
    assert [row.step for row in whole.history.training] == list(range(1, 21))
    assert len((Path(run.output) / "history.jsonl").read_text().splitlines()) == 13 + 1
    torch.manual_seed(123)  # what the process did in between does not matter
    assert_identical(train_language_model(run, resume=True, device="cpu"), whole)


def test_resuming_crosses_the_border_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{number} prefix and state " * 12}) + "\n" for number in range(6)))
    settings = {"max_steps": 14, "save_every": 4}  # fewer than 20 windows, hence several epochs of 4 or 5 steps
    whole = train_language_model(toy_run(tmp_path, output=str(tmp_path / "whole"), **settings), device="cpu")
    run = toy_run(tmp_path, **settings)
    with monkeypatch.context() as patch:
        crash_at(patch, 9)
        with pytest.raises(Crash):
            train_language_model(run, device="cpu")
    assert_identical(train_language_model(run, resume=True, device="cpu"), whole)


def test_activations_may_be_computed_again_from_a_checkpoint_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 8, "save_every": 4}
    whole = train_language_model(toy_run(tmp_path, output=str(tmp_path / "whole"), **settings), device="cpu")
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            train_language_model(toy_run(tmp_path, **settings), device="cpu")
    run = toy_run(tmp_path, recompute_activations=True, **settings)
    resumed = train_language_model(run, resume=True, device="cpu")
    assert resumed.model.config.recompute_activations
    assert_identical(resumed, whole)


def test_rows_fall_on_every_checkpoint_and_on_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_steps": 11, "save_every": 3, "log_every": 5}
    whole = train_language_model(toy_run(tmp_path, output=str(tmp_path / "whole"), **settings), device="cpu")
    assert [row.step for row in whole.history.training] == [1, 3, 5, 6, 9, 10, 11]
    run = toy_run(tmp_path, **settings)
    with monkeypatch.context() as patch:
        crash_at(patch, 8)
        with pytest.raises(Crash):
            train_language_model(run, device="cpu")
    assert_identical(train_language_model(run, resume=True, device="cpu"), whole)


def test_resuming_what_is_finished_changes_nothing(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=3)
    first = train_language_model(run, device="cpu")
    before = (Path(run.output) / "history.jsonl").read_text()
    assert_identical(train_language_model(run, resume=True, device="cpu"), first)
    assert (Path(run.output) / "history.jsonl").read_text() == before


PROGRAM = """
import os, resource, signal, sys
from pathlib import Path
from transformers import Trainer
from tests.training.toy import toy_run
from transmamba.errors import CheckpointError
from transmamba.recipes import train_language_model

original = Trainer._save_optimizer_and_scheduler

def save(self, output_dir):
    if self.state.global_step == 8:
        {fault}
    original(self, output_dir)

Trainer._save_optimizer_and_scheduler = save
try:
    train_language_model(toy_run(Path(sys.argv[1]), max_steps=10, save_every=4), device="cpu")
except CheckpointError as error:
    print(error)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"


def run_program(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM.format(fault=fault), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
def test_a_kill_while_a_checkpoint_is_written_costs_only_that_checkpoint(tmp_path: Path) -> None:
    toy_run(tmp_path)
    assert run_program(tmp_path, KILL).returncode == -signal.SIGKILL
    folder = tmp_path / "run"
    assert (folder / "checkpoint-8" / "model.safetensors").is_file()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"
    settings = {"max_steps": 10, "save_every": 4}
    resumed = train_language_model(toy_run(tmp_path, **settings), resume=True, device="cpu")
    whole = train_language_model(toy_run(tmp_path, output=str(tmp_path / "whole"), **settings), device="cpu")
    assert_identical(resumed, whole)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
def test_a_file_that_cannot_grow_is_one_clear_error(tmp_path: Path) -> None:
    toy_run(tmp_path)
    done = run_program(tmp_path, FULL)  # what the system then refuses, torch wraps in an error of its own
    folder = tmp_path / "run"
    assert done.returncode == 0, done.stderr
    assert f"{folder / 'checkpoint-8'} could not be written" in done.stdout
    assert f"{folder / 'checkpoint-4'} is whole; resume from it" in done.stdout
    assert not (folder / "checkpoint-8").exists()


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("_save_optimizer_and_scheduler", NO_SPACE),
        ("_save_rng_state", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ("save_model", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    run = toy_run(tmp_path, max_steps=3, save_every=1, keep_checkpoints=1)
    original = getattr(Trainer, method)

    def save(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise error

    monkeypatch.setattr(Trainer, method, save)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*checkpoint-1 is whole"):
        train_language_model(run, device="cpu")
    folder = Path(run.output)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-1"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_only_the_last_checkpoints_stay_and_hold_no_pickled_objects(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=5, save_every=1, keep_checkpoints=2)
    train_language_model(run, device="cpu")
    checkpoints = sorted(Path(run.output).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-4", "checkpoint-5"]
    for path in checkpoints:
        assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".pt", ".pth"}
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(path / name, weights_only=True)


def make_trainer(folder: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> TransMambaTrainer:
    run = toy_run(folder)
    documents = load_documents(run.text)
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    model = TransMambaForCausalLM(run.model_config(tokenizer)).to(dtype)
    arguments = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "save_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    ours = {name: settings.pop(name) for name in list(settings) if name not in arguments}
    return TransMambaTrainer(
        model,
        TrainingArguments(**arguments | settings),
        train_dataset=pack_documents(documents.train, tokenizer, run.seq_len),
        **ours,
    )


class GradientOfFirstStep(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 0:
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            self.value = torch.cat([grad.flatten() for grad in grads]).clone()


def gradient(folder: Path, batch_size: int, accumulation: int, **settings: Any) -> Tensor:
    callback = GradientOfFirstStep()
    trainer = make_trainer(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        callbacks=[callback],
        **settings,
    )
    trainer.train()
    return callback.value


def summed_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
    return losses / batch["num_items_in_batch"], {}


def mean_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The fault that hides in accumulation: a mean of means, though micro-batches differ in predicted tokens."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    return cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]) / 4, {}


def test_accumulating_gives_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    double = {"dtype": torch.float64}
    large = gradient(tmp_path, 8, 1, loss_fn=summed_loss, **double)
    assert large.dtype == torch.float64
    # Sums of at most 2^10 terms in another order: 2^10 roundings of 2^-53, and 2^6 to spare for cancellation.
    assert relative_rms_error(gradient(tmp_path, 2, 4, loss_fn=summed_loss, **double), large) < 2**-37
    assert relative_rms_error(gradient(tmp_path, 2, 4, loss_fn=mean_loss, **double), large) > 1e-3


def test_the_default_loss_accumulates_as_well(tmp_path: Path) -> None:
    # As above, with the roundings of fp32, 2^-24; these are random, so their sum grows as the root: 2^5 of them.
    assert relative_rms_error(gradient(tmp_path, 2, 4), gradient(tmp_path, 8, 1)) < 2**-17


def test_the_default_loss_is_that_of_the_predicted_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    items = [trainer.train_dataset[index] for index in range(2)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    count = (batch["labels"][:, 1:] != -100).sum()
    loss, metrics = causal_lm_loss(trainer.model, {**batch, "num_items_in_batch": count})
    expected, _ = summed_loss(trainer.model, {**batch, "num_items_in_batch": count})
    torch.testing.assert_close(loss, expected, rtol=2**-20, atol=0)
    assert metrics == {}


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = causal_lm_loss(model, batch)
        return loss * (float("nan") if trainer.state.global_step == 2 else 1.0), metrics

    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", loss_fn=loss_fn)
    with pytest.raises(RecipeError, match=r"not finite at step 3\. Try a learning_rate below 0\.001.*checkpoint-2\."):
        trainer.train()
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_a_model_that_diverges_names_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, learning_rate=1e30)
    with pytest.raises(RecipeError, match=r"[Ss]tep 2.*learning_rate below 1e\+30"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps")

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("inf")

    trainer.add_callback(Poison())
    with pytest.raises(RecipeError, match="After step 1, 1 parameters are not finite"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_metrics_of_the_loss_are_logged_as_means(tmp_path: Path) -> None:
    values = iter([1.0, 3.0, 5.0, 9.0])

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return causal_lm_loss(model, batch)[0], {"distance": next(values)}

    trainer = make_trainer(
        tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, loss_fn=loss_fn
    )
    trainer.train()
    assert [logs["distance"] for logs in trainer.state.log_history if "distance" in logs] == [2.0, 7.0]


def test_weight_decay_acts_on_matrices_only(tmp_path: Path) -> None:
    model = make_trainer(tmp_path).model
    decayed = set(decayed_parameter_names(model))
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert {name.rpartition("mixer.")[2] for name in kept if ".mixer." in name} == {
        "A_log",
        "D",
        "conv1d.bias",
        "dt_bias",
    }
    assert all("norm" in name for name in kept if ".mixer." not in name)
    assert {"model.embed_tokens.weight", "model.layers.0.mixer.conv1d.weight"} <= decayed
    trainer = make_trainer(tmp_path, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(groups[1]["params"]) == len(kept)


def test_parameters_of_a_mode_that_never_runs_stay_as_they_were(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    never = trainer.model.model.layers[2].mixer
    before = {name: parameter.detach().clone() for name, parameter in never.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in never.named_parameters() if not torch.equal(parameter, before[name])}
    ssm = {"A_log", "D", "dt_bias", "dt_proj.weight", "z_proj.weight"}
    assert changed == set(before) - ssm


def test_evaluation_is_asked_for_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no evaluate_fn"):
        make_trainer(tmp_path).evaluate()


def test_decay_spares_what_is_no_matrix_in_models_of_images() -> None:
    """A_log has a row a channel in Mamba-1, and positions and class tokens three dimensions."""
    sizes = {"image_size": 16, "patch_size": 8, "num_labels": 3}
    for name, fields in (
        ("vim_tiny", {"hidden_size": 16, "num_hidden_layers": 1}),
        ("plain_mamba_tiny", {"hidden_size": 16, "num_hidden_layers": 1}),
        ("vmamba_tiny", {"depths": [1], "hidden_sizes": [16], "patch_size": 4}),
    ):
        model = vision_model(name, **(sizes | fields))
        left = {parameter for parameter, _ in model.named_parameters()} - set(decayed_parameter_names(model))
        endings = {parameter.rpartition(".")[2] for parameter in left}
        assert {"A_log", "A_b_log", "A_logs"} & endings
        assert endings <= {
            *("A_log", "A_b_log", "A_logs", "D", "D_b", "Ds", "dt_projs_bias"),
            *("bias", "weight", "pos_embed", "cls_token"),
        }
        assert not [
            p for p in left if p.endswith(("in_proj.weight", "x_proj.weight", "x_proj_weight", "classifier.weight"))
        ]
