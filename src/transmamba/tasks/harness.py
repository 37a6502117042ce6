"""Tasks of lm-eval (the extra `eval`) on a causal language model: ours, or any other of transformers.

What lm-eval does is left to it: prompts, log-likelihoods, metrics. This file hands it a model, finds the tasks, says in
one line what is wrong, and counts what had to be cut. Its own command line runs our checkpoints too:

    python -m transmamba.tasks run --model transmamba --model_args pretrained=FOLDER,trans_points=0:64:none ...
"""

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transmamba.errors import CorpusError, InputError, TransMambaError
from transmamba.models import TransMambaForCausalLM
from transmamba.progress import progress_bar, working
from transmamba.tasks.choices import ChoiceFile, is_choice_file, read_choices

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

__all__ = ["HarnessResult", "TaskScore", "evaluate_tasks", "harness_model"]

MODEL_NAME = "transmamba"  # in lm-eval's registry
BOOTSTRAP_ITERATIONS = 1000  # for the standard error of metrics that have no formula, such as perplexity
LOGITS_AT_ONCE = 1 << 28  # elements, of whole windows: 1 GiB in fp32
FEW_SHOT_SEED = 1234  # lm-eval's own default
SHOWN_NAMES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """A metric of a task or a group of tasks. filter: how answers were read out of generated text; "none" = as is.

    standard_error: None where lm-eval knows none. higher_is_better: None where the task does not say.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    num_samples: int
    num_fewshot: int
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessResult:
    """What a model scored.

    scores: a row per task and metric, groups after their tasks. num_truncated: requests longer than the model's
    positions, which were cut on their left. versions: of the tasks. samples: per task what lm-eval records of every
    document, with the log-likelihoods ("resps"); empty unless asked for.
    """

    scores: tuple[TaskScore, ...]
    num_truncated: int
    versions: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_folder: Path | str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    keep_samples: bool = False,
) -> HarnessResult:
    """Score a causal language model on tasks of lm-eval, on its device and in its dtype.

    Args:
        tasks: names that lm-eval knows (tasks, groups, tags, patterns such as "blimp_*"), which fetch their data from
            the network; names that `task_folder` defines; and paths of files of choices (see read_choices).
        task_folder: a folder of lm-eval's YAML files. They may name Python functions, which are then run.
        limit: documents per task, the first ones; None = all.
        num_fewshot: examples before every question, for tasks that do not fix it; None = what the task says.
        batch_size: requests at a time; results do not depend on it beyond rounding.
        keep_samples: also return every document with its log-likelihoods.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        InputError: a task is not known, or does not fit the model; or a number is out of range.
        CorpusError: the data of a task cannot be had.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise InputError(f"{name}={value} must be at least {least}.")
    was_training = model.training
    try:
        language_model = harness_model()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        with _quiet_harness():
            loaded = _load_tasks(tasks, task_folder)
            for task in loaded["tasks"].values():
                _check_task(task, language_model)
                _set_fewshot(task, num_fewshot)
            with ExitStack() as preparing:
                preparing.enter_context(working("Preparing the questions"))
                language_model.when_first_asked = preparing.close
                results = _evaluate(language_model, loaded, limit, keep_samples=keep_samples)
    finally:
        model.train(was_training)  # lm-eval has put it into evaluation mode
    return HarnessResult(
        scores=tuple(_scores(results)),
        num_truncated=language_model.num_truncated,
        versions=dict(results["versions"]),
        samples=dict(results.get("samples", {})),
    )


def harness_model() -> "type[HFLM]":
    """The class that lm-eval runs, registered there as "transmamba".

    It is HFLM with three differences: `trans_points` sets a schedule (a name, a list, or text such as "0:64:none", as
    lm-eval's command line keeps commas for itself), nothing is cached where a text is only read, and log-probabilities
    are computed in fp32 at least, whatever the model's dtype.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401 -- only whether it is there
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tasks are evaluated with lm-eval, and {error.name} is not installed: pip install 'transmamba[eval]'"
        ) from error
    return _model_class()


@cache
def _model_class() -> "type[HFLM]":
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(MODEL_NAME)
    class TransMambaLM(HFLM):
        """Any causal language model of transformers; TransMambas with a schedule."""

        def __init__(
            self,
            pretrained: str | PreTrainedModel,
            *args: Any,
            trans_points: str | Sequence[int | None] | None = None,
            **kwargs: Any,
        ) -> None:
            with _without_advice(isinstance(pretrained, str)):
                super().__init__(pretrained, *args, **{"backend": "causal", **kwargs})
            if kwargs.get("softmax_dtype") is None:
                is_exact = self.model.dtype in (torch.float32, torch.float64)
                self.softmax_dtype: torch.dtype | None = self.model.dtype if is_exact else torch.float32
            if trans_points is not None:
                _set_trans_points(self.model, trans_points)
            if self.prefix_token_id is None:
                raise InputError(
                    "the tokenizer has neither a bos_token nor an eos_token, so there is nothing to begin a text with; "
                    "set one in tokenizer_config.json."
                )
            self.num_truncated = 0
            self.when_first_asked: Callable[[], None] = lambda: None
            self._advance: Callable[[int], None] | None = None

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            usual = self.batch_size
            if isinstance(usual, int):  # windows are as long as the model allows
                room = LOGITS_AT_ONCE // (self.max_length * self.model.config.get_text_config().vocab_size)
                self.batch_size_per_gpu = max(1, min(usual, room))
            try:
                with self._bar("Scoring texts", len(requests)):
                    return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.batch_size_per_gpu = usual

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            with self._bar("Generating", len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            longest = max((len(request[2]) for request in requests), default=0)
            if longest > self.max_length:
                raise InputError(
                    f"an answer has {longest} tokens and the model {self.max_length} positions; shorten it, or leave "
                    "the task out."
                )
            self.num_truncated += sum(len(request[1]) + len(request[2]) > self.max_length + 1 for request in requests)
            with self._bar("Scoring", len(requests)):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            longest = kwargs.get("left_truncate_len")
            if longest is not None:
                self.num_truncated += sum(len(self.tok_encode(string)) > longest for string in strings)
            return super().tok_batch_encode(strings, *args, **kwargs)

        def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
            assert not kwargs, "only decoders are evaluated"
            mixed = self.mixed_precision_dtype
            with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
                logits = self.model(inps, use_cache=False).logits
            self._count(len(inps))
            return logits

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            tokens = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return tokens

        @contextmanager
        def _bar(self, description: str, total: int) -> Iterator[None]:
            if self._advance is not None:  # texts are scored by parts, under the bar of the whole
                yield
                return
            self.when_first_asked()
            with progress_bar(description, total) as self._advance:
                try:
                    yield
                finally:
                    self._advance = None

        def _count(self, amount: int) -> None:
            if self._advance is not None:
                self._advance(amount)

    return TransMambaLM


def _set_trans_points(model: PreTrainedModel, schedule: str | Sequence[int | None]) -> None:
    """Run a TransMamba with another schedule; ":" may stand for "," in text.

    Raises:
        InputError: the model is of another kind.
    """
    if not isinstance(model, TransMambaForCausalLM):
        raise InputError(
            f"{type(model).__name__} has no TransPoints; leave trans_points out, or convert it first with "
            "`transmamba convert`."
        )
    model.set_trans_points(schedule.replace(":", ",") if isinstance(schedule, str) else schedule)


def _load_tasks(names: Sequence[str], task_folder: Path | str | None) -> dict[str, Any]:
    files = [name for name in names if is_choice_file(name)]
    others = [name for name in names if not is_choice_file(name)]
    if not names:
        raise InputError("tasks is empty; give names of tasks, or paths of .jsonl files of choices.")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise InputError(f"task_folder={str(task_folder)!r} is not a folder; give one with lm-eval's YAML files.")
    specs: list[Any] = [_choice_task(read_choices(file)) for file in files]
    manager = _task_manager(others, task_folder)
    for name in others:
        matched = manager.match_tasks([name]) if "*" in name or "?" in name else [name]
        if not matched or not _is_known(matched[0], manager):
            raise InputError(_unknown_task(name, manager, task_folder))
        specs += matched
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        name = spec if isinstance(spec, str) else spec["task"]
        part = _load_task(spec, name, manager)
        twice = sorted(set(part["tasks"]) & set(loaded["tasks"]))
        if twice:
            raise InputError(f"the task {twice[0]} is asked for twice; name each once, and not beside its group.")
        for kind in loaded:
            loaded[kind] |= part.get(kind, {})
    return loaded


def _task_manager(names: Sequence[str], task_folder: Path | str | None) -> "TaskManager":
    """Without lm-eval's own list, whose thousands of files take seconds to read, where nothing is wanted of it."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=None if task_folder is None else str(task_folder), include_defaults=False)
    if all(name in own.all_subtasks or _is_yaml(name) for name in names):
        return own
    with working("Reading lm-eval's list of tasks"):
        return TaskManager(include_path=None if task_folder is None else str(task_folder))


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _is_known(name: str, manager: "TaskManager") -> bool:
    return name in manager.all_tasks or _is_yaml(name)


def _unknown_task(name: str, manager: "TaskManager", task_folder: Path | str | None) -> str:
    near = get_close_matches(name, manager.all_tasks, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if task_folder is None:
        return f"there is no task {name!r} among lm-eval's.{hint} Tasks of your own: --task-folder, or a .jsonl file."
    here = [
        task for task, entry in manager.task_index.items() if Path(task_folder) in (entry.yaml_path or Path()).parents
    ]
    listed = ", ".join(sorted(here)[:SHOWN_NAMES]) + (", ..." if len(here) > SHOWN_NAMES else "")
    return (
        f"there is no task {name!r}, neither among lm-eval's nor in {task_folder}, which defines "
        f"{listed or 'none'}.{hint}"
    )


def _load_task(spec: Any, name: str, manager: "TaskManager") -> dict[str, Any]:
    try:
        with working(f"Loading {name}"):
            return dict(manager.load([spec]))
    except (TransMambaError, ModuleNotFoundError):
        raise
    except Exception as error:  # a task is data and code of others; whatever it raises is told with its name
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, ConnectionError) or "Hub" in reason or "offline" in reason.lower():
            raise CorpusError(
                f"the data of the task {name} could not be fetched ({reason}). Tasks that lm-eval knows need the "
                "network the first time; --task-folder and .jsonl files do not."
            ) from error
        raise CorpusError(f"the task {name} cannot be loaded ({reason}).") from error


def _choice_task(file: ChoiceFile) -> dict[str, Any]:
    """lm-eval's configuration of a file of choices, with the rows in memory."""
    is_blank = file.form == "blank"
    rows = [
        {
            "context": "" if file.form == "pair" else row.context,
            "choices": list(row.contexts if is_blank else row.choices),
            "label": row.label,
            "continuation": row.continuation if is_blank else "",
        }
        for row in file.rows
    ]

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    # The length of a choice does not matter where all are followed by the same text.
    metrics = ["acc"] if is_blank else ["acc", "acc_norm"]
    return {
        "task": file.name,
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        # lm-eval's words for several contexts with one continuation: the "text" is the index of the right one.
        "doc_to_text": "label" if is_blank else "context",
        "doc_to_choice": "choices",
        "doc_to_target": "continuation" if is_blank else "label",
        "target_delimiter": " " if file.form == "continuation" else "",
        "num_fewshot": 0,  # there is no second set to take examples from
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
    }


def _check_task(task: "Task", language_model: Any) -> None:
    if task.OUTPUT_TYPE != "generate_until":
        return
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", language_model.max_gen_toks)
    if wanted >= language_model.max_length:
        raise InputError(
            f"the task {task.config.task} writes up to {wanted} tokens, and the model has {language_model.max_length} "
            "positions for its prompt and answer; set max_gen_toks lower in the task's generation_kwargs."
        )


def _set_fewshot(task: "Task", num_fewshot: int | None) -> None:
    """As lm-eval's own command does: tasks that say 0 keep it, and those that say nothing have none."""
    said = task.get_config("num_fewshot")
    if num_fewshot is not None and said != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif said is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)


def _evaluate(language_model: Any, loaded: dict[str, Any], limit: int | None, *, keep_samples: bool) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(
            language_model,
            loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=keep_samples,
        )
    except ValueError as error:  # lm-eval's word for tasks that do not fit: unsafe code, pictures
        if isinstance(error, TransMambaError):
            raise
        raise InputError(f"lm-eval refuses: {' '.join(str(error).split())}") from error


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{name}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                num_samples=int(row.get("sample_len") or 0),
                num_fewshot=int(results["n-shot"].get(task) or 0),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
            )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep lm-eval, and the hub that it asks for data, to errors; their bars and advice are for their own commands.

    Standard errors are found in this process, since lm-eval would start one per core.
    """
    import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    usual_bar, processes = tqdm.tqdm.__init__, os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.tqdm.__init__ = partialmethod(usual_bar, disable=True)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        tqdm.tqdm.__init__ = usual_bar
        os.environ.pop("DISABLE_MULTIPROC")
        if processes is not None:
            os.environ["DISABLE_MULTIPROC"] = processes


@contextmanager
def _without_advice(wanted: bool) -> Iterator[None]:
    """Keep HFLM from warning that the model it is given is a model."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    if not wanted:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
