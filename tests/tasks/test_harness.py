"""lm-eval on a converted model gives what lm-eval's own class gives on the source, and says what is wrong in a line."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conversion.checkpoints import save_source, tiny_source, tiny_tokenizer
from tests.helpers import data_folder
from transmamba import TransMambaForCausalLM, convert
from transmamba.errors import CorpusError, InputError, ScheduleError
from transmamba.inference import load_language_model
from transmamba.tasks import evaluate_tasks, harness, harness_model
from transmamba.tasks.harness import _load_tasks, _quiet_harness

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'transmamba[eval]'")

# Relative, of log-likelihoods: some spacings of fp32 (6e-8), in which Llama's norms compute whatever the model's dtype.
SAME = 1e-6

WORDS = ("state", "memory", "prefix", "Zürich", "a", "scan, and then another")
TEXT_TASK = """
task: toy_texts
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
WRITING_TASK = """
task: toy_writing
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
test_split: train
output_type: generate_until
doc_to_text: prompt
doc_to_target: text
generation_kwargs: {{until: ["zzz"], max_gen_toks: {tokens}}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of choices, and a folder of YAML files; texts are shorter and longer than the model's 128 tokens."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"context": f"The {word} of a layer", "choices": [f"is {word}", "forgets", "is what it keeps"], "label": n % 3}
        for n, word in enumerate(WORDS)
    ]
    write(folder / "questions.jsonl", rows)
    write(
        folder / "blanks.jsonl",
        [{"context": f"So _ is {word}.", "choices": ["Ann", "Bo"], "label": 1} for word in WORDS],
    )
    write(folder / "pairs.jsonl", [{"good": f"The {word} is.", "bad": f"Is the {word}."} for word in WORDS])
    texts = [f"The {word} is what a layer keeps of the text. " * (number + 1) for number, word in enumerate(WORDS)]
    data = write(folder / "texts.json", [{"text": text, "prompt": text[: 5 * n + 3]} for n, text in enumerate(texts)])
    (folder / "yaml").mkdir()
    values = {"data": data, "cache": folder / "cache"}
    (folder / "yaml" / "texts.yaml").write_text(TEXT_TASK.format(**values))
    (folder / "yaml" / "writing.yaml").write_text(WRITING_TASK.format(**values, tokens=12))
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks(folder: Path) -> list[str]:
    files = [str(folder / f"{name}.jsonl") for name in ("questions", "blanks", "pairs")]
    return [*files, "toy_texts", "toy_writing"]


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return tiny_source("Llama").double()


def student_of(source: PreTrainedModel, schedule: list[int | None]) -> TransMambaForCausalLM:
    return convert(source, schedule=schedule, dtype=source.dtype)[0]


@pytest.fixture(scope="module")
def exact(source: PreTrainedModel, folder: Path, tasks: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's own class says of the source, one request at a time."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet_harness():
        language_model = HFLM(pretrained=source, tokenizer=tiny_tokenizer(), batch_size=1)
        loaded = _load_tasks(tasks, folder / "yaml")
        return evaluate(language_model, loaded, log_samples=True, bootstrap_iters=0)["samples"]


def answers(samples: dict[str, list[dict[str, Any]]]) -> tuple[list[float], list[str]]:
    """Every log-likelihood and every generated text."""

    def leaves(value: Any) -> list[Any]:
        if isinstance(value, list | tuple):
            return [leaf for part in value for leaf in leaves(part)]
        return [] if isinstance(value, bool) else [value]

    found = [leaf for documents in samples.values() for document in documents for leaf in leaves(document["resps"])]
    return [x for x in found if isinstance(x, float)], [x for x in found if isinstance(x, str)]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_conversion_scores_as_its_source_while_no_layer_switches(
    source: PreTrainedModel, folder: Path, tasks: list[str], exact: dict[str, Any], batch_size: int
) -> None:
    student = student_of(source, [None, None, None])
    result = evaluate_tasks(
        student, tiny_tokenizer(), tasks, task_folder=folder / "yaml", batch_size=batch_size, keep_samples=True
    )
    numbers, texts = answers(result.samples)
    exact_numbers, exact_texts = answers(exact)
    assert len(numbers) == 3 * len(WORDS) + 2 * len(WORDS) + 2 * len(WORDS) + len(WORDS)
    assert largest_difference(exact_numbers, numbers) < SAME
    assert texts == exact_texts
    assert len(texts) == len(WORDS)


def test_a_conversion_that_switches_scores_otherwise(
    source: PreTrainedModel, folder: Path, tasks: list[str], exact: dict[str, Any]
) -> None:
    student = student_of(source, [0, 5, None])
    result = evaluate_tasks(student, tiny_tokenizer(), tasks, task_folder=folder / "yaml", keep_samples=True)
    numbers, texts = answers(result.samples)
    assert largest_difference(answers(exact)[0], numbers) > 1e-3
    assert texts != answers(exact)[1]


def test_scores_are_those_of_the_samples(source: PreTrainedModel, folder: Path, tasks: list[str], exact: Any) -> None:
    result = evaluate_tasks(source, tiny_tokenizer(), tasks, task_folder=folder / "yaml", limit=4)
    by_name = {(score.task, score.metric): score for score in result.scores}
    assert set(by_name) == {
        *((task, metric) for task in ("questions", "pairs") for metric in ("acc", "acc_norm")),
        ("blanks", "acc"),
        ("toy_texts", "word_perplexity"),
        ("toy_texts", "bits_per_byte"),
        ("toy_writing", "exact_match"),
    }
    right = [
        max(range(3), key=lambda choice: document["resps"][choice][0][0]) == document["doc"]["label"]
        for document in exact["questions"][:4]
    ]
    assert by_name["questions", "acc"].value == sum(right) / 4
    assert by_name["questions", "acc"].num_samples == 4
    assert by_name["questions", "acc"].higher_is_better
    assert by_name["toy_texts", "bits_per_byte"].standard_error is None
    assert result.samples == {}
    assert (result.num_truncated, result.versions["questions"]) == (0, 1.0)


def test_what_a_blank_or_a_pair_asks(source: PreTrainedModel, folder: Path, exact: dict[str, Any]) -> None:
    (first, second) = exact["blanks"][0]["arguments"]
    assert (first, second) == (("So Ann", " is state."), ("So Bo", " is state."))
    assert [document["doc"]["label"] for document in exact["pairs"]] == [0, 1] * 3
    assert exact["pairs"][1]["arguments"] == [("", "Is the memory."), ("", "The memory is.")]


def test_requests_that_are_too_long_are_counted(source: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{"context": "x" * length, "choices": ["yes", "no"], "label": 0} for length in (10, 124, 125, 300)]
    file = write(tmp_path / "long.jsonl", rows)
    result = evaluate_tasks(source, tiny_tokenizer(), [str(file)])
    # 128 positions read 125 + 4 - 1 tokens of " yes", and 126 + 3 - 1 of " no"; the last token is only predicted.
    assert result.num_truncated == 2


def test_an_answer_longer_than_the_model_is_refused(source: PreTrainedModel, tmp_path: Path) -> None:
    file = write(tmp_path / "long.jsonl", [{"context": "x", "choices": ["no", "y" * 128], "label": 0}])
    with pytest.raises(InputError, match="an answer has 129 tokens and the model 128 positions"):
        evaluate_tasks(source, tiny_tokenizer(), [str(file)])


def test_whole_windows_are_read_a_few_at_a_time(
    source: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = type(source).forward

    def watched(self: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(type(source), "forward", watched)
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", 2 * 128 * 257)
    evaluate_tasks(source, tiny_tokenizer(), ["toy_texts"], task_folder=folder / "yaml", batch_size=5)
    assert max(seen) == 2
    seen.clear()
    evaluate_tasks(source, tiny_tokenizer(), [str(folder / "pairs.jsonl")], batch_size=5)
    assert max(seen) == 5


def test_a_model_keeps_its_mode_and_its_device_and_others_keep_their_bars(
    source: PreTrainedModel, folder: Path
) -> None:
    import tqdm

    bar, level = tqdm.tqdm.__init__, logging.getLogger("lm_eval").level
    source.train()
    evaluate_tasks(source, tiny_tokenizer(), [str(folder / "pairs.jsonl")])
    assert source.training
    source.eval()
    assert (tqdm.tqdm.__init__, logging.getLogger("lm_eval").level) == (bar, level)


def test_nothing_is_printed(source: PreTrainedModel, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_tasks(source, tiny_tokenizer(), [str(folder / "pairs.jsonl"), "toy_texts"], task_folder=folder / "yaml")
    assert capfd.readouterr() == ("", "")


def test_half_precision_is_summed_in_fp32(folder: Path) -> None:
    model = tiny_source("Llama").to(torch.bfloat16)
    language_model = harness_model()(pretrained=model, tokenizer=tiny_tokenizer())
    assert language_model.softmax_dtype == torch.float32
    assert harness_model()(pretrained=model.double(), tokenizer=tiny_tokenizer()).softmax_dtype == torch.float64
    asked = harness_model()(pretrained=model, tokenizer=tiny_tokenizer(), softmax_dtype="bfloat16")
    assert asked.softmax_dtype == torch.bfloat16


@pytest.mark.parametrize(("written", "entries"), [("0:9:none", [0, 9, None]), ("mamba2", [0, 0, 0])])
def test_lm_eval_finds_the_class_by_name_and_sets_the_schedule(tmp_path: Path, written: str, entries: list) -> None:
    from lm_eval.api.registry import get_model

    student = student_of(tiny_source("Llama"), [None, None, None])
    save_source(student, tmp_path)
    harness_model()
    arguments = f"pretrained={tmp_path},trans_points={written},dtype=float32"
    language_model = get_model("transmamba").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 2})
    assert language_model.model.config.trans_points == entries
    assert isinstance(language_model.model, TransMambaForCausalLM)


def test_lm_evals_own_command_line_knows_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.__main__
    from lm_eval.api.registry import model_registry

    from transmamba.tasks.__main__ import main

    known = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: known.append("transmamba" in model_registry))
    main()
    assert known == [True]


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("0:9", ScheduleError, "2 entries and the model 3 layers"),
        ("v99", ScheduleError, "There is no schedule named 'v99'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: str, error: type, message: str) -> None:
    student = student_of(tiny_source("Llama"), [None, None, None])
    with pytest.raises(error, match=message):
        harness_model()(pretrained=student, tokenizer=tiny_tokenizer(), trans_points=schedule)


def test_other_models_have_no_schedule(source: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no TransPoints; leave trans_points out"):
        harness_model()(pretrained=source, tokenizer=tiny_tokenizer(), trans_points="mamba2")


def test_a_tokenizer_without_a_beginning_is_refused(source: PreTrainedModel, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="<end>")
    with pytest.raises(InputError, match="neither a bos_token nor an eos_token"):
        evaluate_tasks(source, tokenizer, [str(folder / "pairs.jsonl")])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, InputError, "tasks is empty"),
        ({"limit": 0}, InputError, "limit=0 must be at least 1"),
        ({"num_fewshot": -1}, InputError, "num_fewshot=-1 must be at least 0"),
        ({"batch_size": 0}, InputError, "batch_size=0 must be at least 1"),
        ({"tasks": ["absent.jsonl"]}, CorpusError, r"There is no file absent\.jsonl"),
        ({"task_folder": "absent"}, InputError, "task_folder='absent' is not a folder"),
        ({"tasks": ["{folder}/pairs.jsonl", "{folder}/pairs.jsonl"]}, InputError, "pairs is asked for twice"),
    ],
    ids=str,
)
def test_a_mistake_is_said(
    source: PreTrainedModel, folder: Path, options: dict[str, Any], error: type, message: str
) -> None:
    options = {"tasks": ["{folder}/pairs.jsonl"]} | options
    options["tasks"] = [task.format(folder=folder) for task in options["tasks"]]
    with pytest.raises(error, match=message):
        evaluate_tasks(source, tiny_tokenizer(), **options)


@pytest.fixture
def own_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own list of tasks, which takes seconds to read, but for two names."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    def manager(include_defaults: bool = True, **options: Any) -> TaskManager:
        made = TaskManager(include_defaults=False, **options)
        if include_defaults:
            config = {"task": "arc_easy", "dataset_path": "allenai/ai2_arc", "output_type": "multiple_choice"}
            made.task_index["arc_easy"] = Entry(name="arc_easy", kind=Kind.TASK, yaml_path=None, cfg=config)
            made._all_tasks = sorted(made.task_index)
        return made

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.mark.usefixtures("own_tasks_only")
def test_a_task_that_is_not_known_is_named_with_its_neighbour(source: PreTrainedModel, folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"no task 'arc_eazy' among lm-eval's\. Did you mean 'arc_easy'\? Tasks of your"
    ):
        evaluate_tasks(source, tiny_tokenizer(), ["arc_eazy"])
    message = r"no task 'toy_text', neither .* which defines toy_texts, toy_writing\. Did you mean 'toy_texts'\?"
    with pytest.raises(InputError, match=message):
        evaluate_tasks(source, tiny_tokenizer(), ["toy_text"], task_folder=folder / "yaml")
    with pytest.raises(InputError, match=r"no task 'mmlu_\*'"):
        evaluate_tasks(source, tiny_tokenizer(), ["mmlu_*"])


@pytest.mark.usefixtures("own_tasks_only")
def test_a_task_whose_data_is_on_the_network_is_said_to_need_it(source: PreTrainedModel) -> None:
    message = r"data of the task arc_easy could not be fetched \(ConnectionError: .*need the network the first time"
    with pytest.raises(CorpusError, match=message):
        evaluate_tasks(source, tiny_tokenizer(), ["arc_easy"])


@pytest.mark.usefixtures("own_tasks_only")
def test_patterns_and_yaml_files_name_tasks(source: PreTrainedModel, folder: Path) -> None:
    result = evaluate_tasks(source, tiny_tokenizer(), ["toy_t*"], task_folder=folder / "yaml", limit=1)
    assert {score.task for score in result.scores} == {"toy_texts"}
    result = evaluate_tasks(source, tiny_tokenizer(), [str(folder / "yaml" / "texts.yaml")], limit=1)
    assert {score.task for score in result.scores} == {"toy_texts"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda text: text + "nonsense: 1\n", CorpusError, r"task toy_texts cannot be loaded \(TypeError: .*nonsense"),
        (lambda text: text.replace("texts.json", "gone.json"), CorpusError, r"toy_texts cannot be loaded .*gone\.json"),
        (lambda text: text + "unsafe_code: true\n", InputError, "lm-eval refuses: .* marked as unsafe"),
    ],
    ids=["unknown field", "missing data", "unsafe"],
)
def test_a_task_file_that_is_wrong_is_said_to_be(
    source: PreTrainedModel, folder: Path, tmp_path: Path, changes: Callable[[str], str], error: type, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(changes((folder / "yaml" / "texts.yaml").read_text()))
    with pytest.raises(error, match=message):
        evaluate_tasks(source, tiny_tokenizer(), ["toy_texts"], task_folder=tmp_path)


def test_a_task_that_writes_more_than_the_model_has_room_for_is_refused(
    source: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    text = WRITING_TASK.format(data=folder / "texts.json", cache=folder / "cache", tokens=128)
    (tmp_path / "writing.yaml").write_text(text)
    with pytest.raises(InputError, match=r"toy_writing writes up to 128 tokens, and the model has 128 positions"):
        evaluate_tasks(source, tiny_tokenizer(), ["toy_writing"], task_folder=tmp_path)


def test_the_extra_is_named_where_lm_eval_is_absent(monkeypatch: pytest.MonkeyPatch, source: PreTrainedModel) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval is not installed: pip install 'transmamba\[eval\]'"):
        evaluate_tasks(source, tiny_tokenizer(), ["x.jsonl"])


@pytest.mark.data
def test_a_real_checkpoint_and_its_conversion_have_the_same_log_likelihoods(tmp_path: Path) -> None:
    teacher, tokenizer = load_language_model(data_folder() / "teachers" / "llama_wiki_31m", dtype=torch.float32)
    student, _ = convert(teacher)
    for name, step in (("arc_easy_dev.jsonl", 300), ("winogrande_dev.jsonl", 150), ("piqa_dev.jsonl", 300)):
        lines = (data_folder() / "lmeval" / name).read_text(encoding="utf-8").splitlines()[::step]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    files = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    found = [
        answers(evaluate_tasks(model, tokenizer, files, keep_samples=True).samples)[0] for model in (teacher, student)
    ]
    assert len(found[0]) > 30
    assert largest_difference(*found) < SAME
    student.set_trans_points("v9")
    switched, _ = answers(evaluate_tasks(student, tokenizer, files, keep_samples=True).samples)
    assert largest_difference(found[0], switched) > 1e-3
