"""Runs: what they refuse, what they write, and every recipe at toy size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.conversion.checkpoints import tiny_source, tiny_tokenizer
from tests.training.toy import toy_run, write_corpus
from transmamba._version import __version__
from transmamba.conversion import convert
from transmamba.data import TextSource, load_documents, load_tokenizer, pack_documents
from transmamba.errors import CheckpointError, CorpusError, InputError, RecipeError, ScheduleError, TransMambaError
from transmamba.recipes import (
    RECIPES,
    LanguageModelRun,
    ModelSettings,
    count_parameters,
    find_recipe,
    train_language_model,
    validation_source,
)
from transmamba.schedule import TransPointSchedule
from transmamba.training.trainer import causal_lm_loss, stack


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_named_for_its_function_and_says_its_command(name: str) -> None:
    run = RECIPES[name]()
    assert run.name == name
    assert run.output == f"runs/{name}"
    assert f"`transmamba train {name}" in RECIPES[name].__doc__


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step_at_toy_size(name: str, tmp_path: Path) -> None:
    run = RECIPES[name]()
    small = replace(
        run,
        model=replace(run.model, hidden_size=16, intermediate_size=24, num_attention_heads=2),
        text=TextSource(source=str(write_corpus(tmp_path))),
        tokenizer="train:300",
        seq_len=128,
        batch_size=2 * run.gradient_accumulation,
        max_tokens=None,
        max_steps=1,
        dtype="float32",
        output=str(tmp_path / "run"),
    )
    trained = train_language_model(small, device="cpu")
    assert [row.step for row in trained.history.training] == [1]
    assert trained.model.config.trans_points == run.asked_schedule.named(
        run.schedule, run.model.num_hidden_layers, 128
    ).stays_attention_from(128)


def test_the_baselines_are_of_one_size_with_v9() -> None:
    tokenizer = load_tokenizer("bytes")
    sizes = {
        name: count_parameters(RECIPES[name]().model_config(tokenizer))
        for name in RECIPES
        if name.startswith("python_docs")
    }
    settings = RECIPES["python_docs_v9"]().model
    step = 3 * settings.hidden_size * settings.num_hidden_layers
    assert len(sizes) == 5
    assert all(abs(size - sizes["python_docs_v9"]) <= step / 2 for size in sizes.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_comes_back_from_json(name: str) -> None:
    run = RECIPES[name]()
    assert LanguageModelRun.from_json(json.loads(json.dumps(run.to_json()))) == run
    listed = replace(run, schedule=[0] * run.model.num_hidden_layers, adam_betas=(0.8, 0.9))
    assert LanguageModelRun.from_json(json.loads(json.dumps(listed.to_json()))) == listed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, RecipeError, "batch_size=0 must be at least 1"),
        ({"keep_checkpoints": 0}, RecipeError, "keep_checkpoints=0 must be at least 1"),
        ({"save_every": 0}, RecipeError, "save_every=0 must be at least 1"),
        ({"seq_len": 1}, RecipeError, "seq_len=1 must be at least 2"),
        ({"gradient_accumulation": 3}, RecipeError, "gradient_accumulation=3 must divide batch_size=4"),
        (
            {"max_tokens": 5},
            RecipeError,
            "exactly one of max_steps, max_tokens and epochs; here max_steps=20 and max_tok",
        ),
        ({"max_steps": None}, RecipeError, "here none is given"),
        ({"max_steps": None, "epochs": 0.0}, RecipeError, r"epochs=0\.0 must be above 0"),
        ({"learning_rate": 0.0}, RecipeError, r"learning_rate=0\.0 must be above 0"),
        ({"learning_rate": float("nan")}, RecipeError, "learning_rate=nan must be above 0"),
        ({"min_learning_rate_ratio": 1.5}, RecipeError, r"min_learning_rate_ratio=1\.5 must be between 0 and 1"),
        ({"weight_decay": -0.1}, RecipeError, r"weight_decay=-0\.1 must be at least 0"),
        ({"adam_betas": (0.9, 1.0)}, RecipeError, r"adam_betas=\(0\.9, 1\.0\) must be two numbers"),
        ({"max_gradient_norm": 0.0}, RecipeError, r"max_gradient_norm=0\.0 must be above 0"),
        ({"dtype": "float16"}, RecipeError, "dtype='float16' is unknown; choose one of auto, float32, bfloat16"),
        ({"schedule": "v10"}, ScheduleError, "no schedule named 'v10'"),
        ({"schedule": (0, 1)}, ScheduleError, "2"),
        ({"schedule": (0, -1, None)}, ScheduleError, "Layer 1 has TransPoint -1"),
    ],
    ids=str,
)
def test_a_run_that_cannot_be_is_refused_when_it_is_made(
    tmp_path: Path, changes: dict[str, object], error: type[TransMambaError], message: str
) -> None:
    with pytest.raises(error, match=message):
        toy_run(tmp_path, **changes)


def test_matching_the_shared_size_is_for_the_standard_form() -> None:
    with pytest.raises(RecipeError, match="match_shared_size=True is for mixer_form="):
        ModelSettings(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, match_shared_size=True
        )


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = ModelSettings(architecture="llama", num_key_value_heads=1, rope_theta=100.0, **SIZES)


def test_a_llama_is_trained_scored_and_saved_as_transformers_has_it(tmp_path: Path) -> None:
    run = toy_run(tmp_path, model=LLAMA, schedule="transformer")
    trained = train_language_model(run, device="cpu")
    assert trained.num_parameters == trained.model.num_parameters()
    assert trained.evaluation.loss < trained.history.training[0].loss - 0.5
    model = AutoModelForCausalLM.from_pretrained(trained.model_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.num_key_value_heads, model.config.max_position_embeddings) == (1, 32)
    assert model.config.rope_parameters["rope_theta"] == 100.0
    assert model.config.use_cache
    ids = torch.randint(257, (2, 20))
    assert torch.equal(model(ids).logits, trained.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(trained.model_folder).get_vocab() == trained.tokenizer.get_vocab()


def test_a_llama_tells_documents_apart_as_our_transformer_does(tmp_path: Path) -> None:
    """Its training loss on packed windows is that of what it converts to, which the matrix of executions covers."""
    teacher = tiny_source("Llama")
    student, _ = convert(teacher, initialisation="local")
    windows = pack_documents(load_documents(toy_run(tmp_path).text).train, tiny_tokenizer(), 128)
    batch = stack([windows[number] for number in range(8)])
    assert (batch["position_ids"][:, 1:] == 0).any()
    losses = [causal_lm_loss(model, batch)[0].item() for model in (teacher, student)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32, sums in another order
    del batch["position_ids"]
    assert abs(causal_lm_loss(teacher, batch)[0].item() / losses[0] - 1) > 1e-3


def test_a_llama_resumes_to_the_same_weights(tmp_path: Path) -> None:
    run = toy_run(tmp_path, model=LLAMA, schedule="transformer", max_steps=4, save_every=2)
    whole = train_language_model(run, device="cpu")
    shutil.rmtree(whole.folder / "checkpoint-4")
    shutil.rmtree(whole.model_folder)
    resumed = train_language_model(run, resume=True, device="cpu")
    assert [row.loss for row in resumed.history.training] == [row.loss for row in whole.history.training]
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name
    done = train_language_model(run, resume=True, device="cpu")
    assert isinstance(done.model, LlamaForCausalLM)
    assert done.evaluation == resumed.evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt"}, "architecture='gpt' is unknown; choose one of transmamba, llama"),
        ({"architecture": "llama", "conv_kernel": 0}, 'conv_kernel=0 is nothing that architecture="llama" has'),
        ({"architecture": "llama", "mixer_form": "standard"}, "mixer_form='standard' is nothing"),
        ({"architecture": "llama", "num_state_heads": 4}, "num_state_heads=4 is nothing"),
    ],
    ids=str,
)
def test_what_a_llama_does_not_have_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ModelSettings(**SIZES | changes)


def test_a_llama_computes_no_activations_again(tmp_path: Path) -> None:
    run = toy_run(tmp_path)
    with pytest.raises(RecipeError, match='recompute_activations=True is nothing that architecture="llama" has'):
        replace(run, recompute_activations=True, model=replace(run.model, architecture="llama"), schedule="transformer")


def test_a_llama_cannot_switch(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="schedule='0,8,none' switches layers within 32 tokens, which a Llama cannot"):
        toy_run(tmp_path, model=LLAMA)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": TextSource(source="absent.txt")}, CorpusError, "absent.txt"),
        ({"seq_len": 10**6}, CorpusError, "too few for one window of seq_len=1000000"),
        ({"batch_size": 1000}, RecipeError, "batch_size=1000 windows of 32 tokens are more than the"),
        ({"tokenizer": "train:10"}, InputError, "train:10"),
        ({"tokenizer": "absent.json"}, CheckpointError, "absent.json"),
        (
            {"model": ModelSettings(hidden_size=33, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)},
            InputError,
            "num_attention_heads=2 must divide hidden_size=33",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_data_refuses_leaves_nothing_behind(
    tmp_path: Path, changes: dict[str, object], error: type[TransMambaError], message: str
) -> None:
    run = toy_run(tmp_path, **changes)
    with pytest.raises(error, match=message):
        train_language_model(run, device="cpu")
    assert not Path(run.output).exists()


def test_layers_beyond_the_trained_length_stay_attention(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="transmamba")
    trained = train_language_model(toy_run(tmp_path, max_steps=1, schedule="0,32,31"), device="cpu")
    assert trained.model.config.trans_points == [0, None, 31]
    assert "layers 1 would switch at 32 tokens or later, beyond what is trained; they stay attention" in caplog.text


def test_the_folder_says_what_was_done(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=3, eval_every=2, tokenizer="train:300")
    trained = train_language_model(run, device="cpu")
    folder = Path(run.output)
    record = json.loads((folder / "run.json").read_text())
    assert LanguageModelRun.from_json(record["recipe"]) == run
    assert record["versions"]["transmamba"] == __version__
    assert record["num_parameters"] == trained.num_parameters == trained.model.num_parameters()
    assert record["model"]["trans_points"] == [0, 8, None]
    assert {"command", "device", "num_steps", "training_tokens", "validation_tokens"} <= set(record)
    assert json.loads((folder / "evaluation.json").read_text())["loss"] == trained.evaluation.loss
    assert [row.step for row in trained.history.evaluations] == [2, 3]  # the last step is always scored
    assert trained.history.training[-1].tokens == 3 * run.tokens_per_step
    model = AutoModelForCausalLM.from_pretrained(trained.model_folder)
    assert model.config.use_cache
    assert model.config.eos_token_id == trained.tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(trained.model_folder).get_vocab() == trained.tokenizer.get_vocab()


def test_equal_seeds_give_equal_models_and_others_do_not(tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        run = toy_run(tmp_path, max_steps=3, seed=seed, output=str(tmp_path / str(number)))
        losses.append([row.loss for row in train_language_model(run, device="cpu").history.training])
    assert losses[0] == losses[1] != losses[2]


def test_lengths_can_be_given_in_tokens_and_epochs(tmp_path: Path) -> None:
    assert toy_run(tmp_path, max_steps=None, max_tokens=1000).num_steps(50) == 8  # 4 windows of 32 are 128 tokens
    assert toy_run(tmp_path, max_steps=None, epochs=2.0).num_steps(50) == 25


def test_a_folder_in_use_is_not_written_into(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=1)
    folder = Path(run.output)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="is not an empty folder; give another --output"):
        train_language_model(run, device="cpu")
    with pytest.raises(RecipeError, match="holds no run to resume"):
        train_language_model(run, resume=True, device="cpu")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="pass --resume to go on"):
        train_language_model(run, device="cpu")
    with pytest.raises(RecipeError, match=r"run\.json is damaged"):
        train_language_model(run, resume=True, device="cpu")


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=2)
    train_language_model(run, device="cpu")
    with pytest.raises(RecipeError, match=r"holds another run: learning_rate was 0\.003 and is 0\.1"):
        train_language_model(replace(run, learning_rate=0.1), resume=True, device="cpu")
    train_language_model(replace(run, keep_checkpoints=5), resume=True, device="cpu")


def test_a_run_without_a_checkpoint_resumes_from_its_beginning(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=2)
    whole = train_language_model(replace(run, output=str(tmp_path / "whole")), device="cpu")
    Path(run.output).mkdir()
    (Path(run.output) / "run.json").write_text(json.dumps({"recipe": run.to_json()}))
    resumed = train_language_model(run, resume=True, device="cpu")
    assert [row.loss for row in resumed.history.training] == [row.loss for row in whole.history.training]


def test_what_a_checkpoint_is_scored_on_is_found_in_its_run(tmp_path: Path) -> None:
    run = toy_run(tmp_path, max_steps=1)
    trained = train_language_model(run, device="cpu")
    for checkpoint in (trained.folder, trained.model_folder, trained.folder / "checkpoint-1"):
        assert validation_source(checkpoint, None) == (run.text, False)
    source, is_whole = validation_source(trained.folder, "other.txt")
    assert (source.source, source.validation_share, is_whole) == ("other.txt", 0, True)
    with pytest.raises(RecipeError, match=r"lies in no run.*name a text with --text"):
        validation_source(tmp_path / "elsewhere" / "model", None)


def test_recipes_of_ones_own_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom transmamba.recipes import RECIPES\n\n"
        "def small():\n    return replace(RECIPES['python_docs_v9'](), name='small')\n\n"
        "def wrong():\n    return 3\n\nNUMBER = 3\n"
    )
    assert find_recipe(f"{file}:small")().name == "small"
    with pytest.raises(RecipeError, match=r"'wrong' in .* returns a int; a recipe returns a LanguageModelRun"):
        find_recipe(f"{file}:wrong")()
    for name, message in {
        f"{file}:NUMBER": "has no function 'NUMBER'",
        f"{tmp_path / 'absent.py'}:run": "There is no file",
        "python_docs_v8": r"no recipe 'python_docs_v8'\. Did you mean 'python_docs_v9'\? Known: python_docs_v9, ",
    }.items():
        with pytest.raises(RecipeError, match=message):
            find_recipe(name)


def test_the_trained_schedule_scales_with_the_length() -> None:
    run = RECIPES["python_docs_v9"]()
    assert run.asked_schedule == TransPointSchedule([0, 8, 16, 32, 64, 128, 256, 512])
    assert run.trained_schedule == TransPointSchedule([0, 8, 16, 32, 64, 128, 256, None])
