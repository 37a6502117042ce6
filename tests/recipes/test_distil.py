"""Whole distillations: stages, exact resumption after a kill, LoRA, stored teachers, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from tests.conversion.checkpoints import save_source, tiny_source
from tests.helpers import ROOT
from tests.recipes.distillations import SEQ_LEN, toy_distillation
from transmamba.data import TextSource
from transmamba.distillation import TransPointCurriculum
from transmamba.errors import InputError, RecipeError
from transmamba.inference import load_checkpoint
from transmamba.modules import SSM_PARAMETERS
from transmamba.recipes import (
    DISTILLATIONS,
    AlignmentStage,
    DistilledModel,
    LogitStage,
    RecordingRun,
    distil,
    find_distillation,
    record_teacher,
)
from transmamba.recipes.fit import fit

ONE_STAGE: dict[str, Any] = {"matrices": AlignmentStage(), "mixers": AlignmentStage()}
STEPS = {"matrices": 4, "mixers": 6, "logits": 10}


def weights(done: DistilledModel) -> dict[str, Tensor]:
    return load_file(done.model_folder / "model.safetensors")


def losses(done: DistilledModel) -> dict[str, list[tuple[int, int, float, Any]]]:
    return {
        name: [(row.step, row.tokens, row.loss, row.metrics) for row in history.training]
        for name, history in done.histories.items()
    }


def assert_identical(one: DistilledModel, other: DistilledModel) -> None:
    assert losses(one) == losses(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.evaluation == other.evaluation


def test_every_stage_learns_and_the_folder_holds_the_student(tmp_path: Path) -> None:
    stages = {
        "matrices": AlignmentStage(share=0.2, trainable="mixers"),
        "mixers": AlignmentStage(share=0.3),
        "logits": LogitStage(),  # without a descent, which begins where there is nothing to learn
    }
    done = distil(toy_distillation(tmp_path, max_tokens=60 * 4 * SEQ_LEN, **stages), device="cpu")
    for history in done.histories.values():
        rows = history.training
        third = len(rows) // 3
        assert sum(row.loss for row in rows[-third:]) < sum(row.loss for row in rows[:third])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "1-matrices",
        "2-mixers",
        "3-logits",
        "evaluation.json",
        "model",
        "run.json",
    ]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stages"] == {"matrices": 12, "mixers": 18, "logits": 30}
    model, tokenizer = load_checkpoint(tmp_path / "run")
    assert model.config.trans_points == [0, 8, None]
    assert len(tokenizer) == 257
    assert set(done.histories["logits"].training[0].metrics) == {"kl", "ce"}


PROGRAM = """
import os, signal, sys
from pathlib import Path
from tests.recipes.distillations import toy_distillation
from transformers import Trainer
from transmamba.recipes import distil

folder, stage, step, where = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
original = getattr(Trainer, where)

def kill(self, *args, **kwargs):
    if stage in self.args.output_dir and self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(Trainer, where, kill)
distil(toy_distillation(folder), device="cpu")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("stage", "step", "where"),
    [
        ("1-matrices", 1, "training_step"),  # before the first checkpoint
        ("2-mixers", 4, "training_step"),  # between checkpoints, behind a finished stage
        ("2-mixers", 6, "_save_optimizer_and_scheduler"),  # while a stage's last checkpoint is written
        ("3-logits", 5, "training_step"),  # at the end of the descent
    ],
)
def test_a_kill_costs_only_what_came_after_the_last_checkpoint(
    tmp_path: Path, stage: str, step: int, where: str
) -> None:
    run = toy_distillation(tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), stage, str(step), where]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torch.manual_seed(123)  # what the process did in between does not matter
    resumed = distil(run, resume=True, device="cpu")
    whole = distil(replace(run, output=str(tmp_path / "whole")), device="cpu")
    assert {name: history.training[-1].step for name, history in whole.histories.items()} == STEPS
    assert_identical(resumed, whole)


def test_every_stage_computes_in_bf16_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[torch.dtype]] = {}
    stage = ""
    linear = torch.nn.functional.linear

    def watched_linear(x: Tensor, *args: Any) -> Tensor:
        y = linear(x, *args)
        if stage and y.requires_grad:
            seen.setdefault(stage, set()).add(y.dtype)
        return y

    def watched_fit(*args: Any, description: str, **kwargs: Any) -> Any:
        nonlocal stage
        stage = description
        try:
            return fit(*args, description=description, **kwargs)
        finally:
            stage = ""

    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    monkeypatch.setattr(sys.modules["transmamba.recipes.distil"], "fit", watched_fit)
    distil(toy_distillation(tmp_path, dtype="bfloat16"), device="cpu")
    assert seen == {f"Stage {name}": {torch.bfloat16} for name in ("1-matrices", "2-mixers", "3-logits")}


def test_resuming_what_is_finished_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_distillation(tmp_path)
    first = distil(run, device="cpu")
    monkeypatch.setattr(Trainer, "training_step", None)
    assert_identical(distil(run, resume=True, device="cpu"), first)


def test_aligning_the_state_space_leaves_attention_as_it_was(tmp_path: Path) -> None:
    run = toy_distillation(tmp_path, matrices=AlignmentStage(), mixers=AlignmentStage(share=0.9), max_tokens=1300)
    before = load_file(tmp_path / "student" / "model.safetensors")
    distil(run, device="cpu")
    after = load_file(Path(run.output) / "1-mixers" / "checkpoint-9" / "model.safetensors")
    changed = {name.rpartition(".mixer.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(SSM_PARAMETERS) - {"ssm_norm.weight"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers 5.23 so
@pytest.mark.parametrize("trainable", ["mixers", "all"])
def test_low_rank_updates_are_merged_and_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    logits = LogitStage(lora_rank=2, trainable=trainable, learning_rate=3e-3)
    run = toy_distillation(tmp_path, **ONE_STAGE, logits=logits, max_tokens=8 * 4 * SEQ_LEN)
    whole = distil(replace(run, output=str(tmp_path / "whole")), device="cpu")
    original = Trainer.training_step

    def crash(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", crash)
        with pytest.raises(KeyboardInterrupt):
            distil(run, device="cpu")
    assert_identical(distil(run, resume=True, device="cpu"), whole)
    before, after = load_file(tmp_path / "student" / "model.safetensors"), weights(whole)
    assert before.keys() == after.keys()
    for name, old in before.items():
        difference = after[name].float() - old.float()
        if name.endswith("q_proj.weight"):
            assert int(torch.linalg.matrix_rank(difference, rtol=1e-4)) == 2
        if name.endswith("up_proj.weight"):
            assert bool(difference.any()) == (trainable == "all")
        if "norm" in name or "embed" in name:
            assert not difference.any()


def test_a_stored_teacher_takes_the_place_of_the_teacher(tmp_path: Path) -> None:
    run = toy_distillation(tmp_path)
    stored = RecordingRun(
        teacher=run.teacher, text=run.text, output=str(tmp_path / "stored"), seq_len=SEQ_LEN, k=250, batch_size=4
    )
    record_teacher(stored, device="cpu")
    online = distil(replace(run, output=str(tmp_path / "online")), device="cpu")
    offline = distil(replace(run, teacher=str(tmp_path / "stored")), device="cpu")
    for ours, theirs in zip(
        offline.histories["logits"].training, online.histories["logits"].training, strict=True
    ):  # 250 of 257 tokens, in float16
        assert abs(ours.metrics["kl"] - theirs.metrics["kl"]) < 0.02 * theirs.metrics["kl"] + 1e-3
    with pytest.raises(InputError, match="was stored for other tokens than this run's"):
        distil(replace(run, teacher=str(tmp_path / "stored"), document_boundaries=False, output=""), device="cpu")
    with pytest.raises(RecipeError, match=r"stored at temperature 1 .* set logits.temperature=1"):
        distil(
            replace(run, teacher=str(tmp_path / "stored"), logits=LogitStage(temperature=2.0), output=""), device="cpu"
        )


def test_the_schedule_may_differ_from_the_students(tmp_path: Path) -> None:
    done = distil(toy_distillation(tmp_path, **ONE_STAGE, schedule="4,none,16", max_tokens=600), device="cpu")
    assert done.model.config.trans_points == [4, None, 16]
    assert load_checkpoint(tmp_path / "run")[0].config.trans_points == [4, None, 16]


@pytest.mark.parametrize("name", sorted(DISTILLATIONS))
def test_every_recipe_runs_at_toy_size(tmp_path: Path, name: str) -> None:
    toy, recipe = toy_distillation(tmp_path), find_distillation(name)()
    same = ("teacher", "student", "text", "seq_len", "batch_size", "output")
    run = replace(recipe, max_tokens=40 * 4 * SEQ_LEN, **{field: getattr(toy, field) for field in same})
    done = distil(run, device="cpu")
    assert sum(history.training[-1].tokens for history in done.histories.values()) <= run.max_tokens
    assert done.evaluation is not None


def test_a_student_that_is_no_longer_its_teacher_cannot_be_aligned(tmp_path: Path) -> None:
    run = toy_distillation(tmp_path)
    other = save_source(
        tiny_source("Llama", eos_token_id=256, rope_parameters={"rope_type": "default", "rope_theta": 9.0}),
        tmp_path / "other",
    )
    with pytest.raises(RecipeError, match=r"differs from its teacher by .* nats a token.*mixers.share=0"):
        distil(replace(run, teacher=str(other)), device="cpu")
    distil(replace(run, teacher=str(other), **ONE_STAGE, max_tokens=300, output=str(tmp_path / "fine")), device="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": ""}, RecipeError, "teacher is not given; name its folder with --teacher"),
        ({"schedule": "transformer"}, RecipeError, "switches no layer within 32 tokens.*--schedule"),
        ({"schedule": (64, None, 40)}, RecipeError, "switches no layer within 32 tokens"),
        ({"seq_len": 512}, InputError, "seq_len=512 is longer than the 128 positions"),
        ({"batch_size": 4000}, RecipeError, "batch_size=4000 windows of 32 tokens are more than"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = toy_distillation(tmp_path, **changes)
    with pytest.raises(error, match=message):
        distil(run, device="cpu")
    assert not Path(run.output).exists()


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run = toy_distillation(tmp_path, **ONE_STAGE, max_tokens=300)
    distil(run, device="cpu")
    with pytest.raises(RecipeError, match=r"holds another run: seed was 0 and is 1"):
        distil(replace(run, seed=1), resume=True, device="cpu")
    with pytest.raises(RecipeError, match="is not an empty folder; pass --resume"):
        distil(run, device="cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlignmentStage(share=1.0), "share=1.0 must be at least 0 and below 1"),
        (lambda: AlignmentStage(trainable="all"), "trainable='all' is unknown here; choose one of ssm, mixers"),
        (lambda: LogitStage(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: LogitStage(kl_weight=0.0), "kl_weight=0.0 and ce_weight=0.0"),
        (lambda: LogitStage(lora_rank=0), "lora_rank=0 must be at least 1"),
        (lambda: LogitStage(learning_rate=-1.0), "learning_rate=-1.0 must be above 0"),
        (
            lambda: replace(find_distillation("mohawk")(), mixers=AlignmentStage(share=0.98)),
            "their sum must be below 1",
        ),
        (lambda: replace(find_distillation("mohawk")(), max_tokens=0), "max_tokens=0 must be at least 1"),
        (lambda: replace(find_distillation("mohawk")(), seq_len=1), "seq_len=1 must be at least 2"),
        (lambda: replace(find_distillation("mohawk")(), warmup_share=1.0), "warmup_share=1.0"),
    ],
)
def test_fields_are_checked(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_curriculum_and_a_source_survive_json(tmp_path: Path) -> None:
    run = find_distillation("descend")()
    run = replace(run, schedule=(0, 4, None), text=TextSource(source="a", validation_share=0.0))
    assert type(run).from_json(run.to_json()) == run
    assert run.logits.trans_point_schedule == TransPointCurriculum(descent=0.1, freedom=0.3)
