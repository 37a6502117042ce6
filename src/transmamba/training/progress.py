"""What a run shows and remembers while it trains: a progress bar, a history that survives a kill, TensorBoard logs."""

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transmamba.training.checkpoints import write_atomically

__all__ = ["HISTORY", "EvaluationRow", "TrainingHistory", "TrainingProgress", "TrainingRow", "tensorboard_callbacks"]

logger = logging.getLogger(__name__)

HISTORY = "history.jsonl"
TRAINER_LOGS = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen")  # and what begins with train_
SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal
SMOOTHING = 0.9  # of the loss that the bar shows: the weight of the past at every log


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRow:
    """Training at one step: tokens read and seconds spent since the beginning, evaluation and saving left out; the loss
    is per token, the mean since the row before, and so are the loss function's own metrics."""

    step: int
    tokens: int
    seconds: float
    loss: float
    learning_rate: float
    gradient_norm: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """Validation at one step: of language bits per byte, of images the share whose class is the first guess."""

    step: int
    tokens: int
    seconds: float
    validation_loss: float
    validation_bits_per_byte: float | None = None
    validation_accuracy: float | None = None


class TrainingHistory:
    """The rows of a run, in memory and, where a folder is given, in its `history.jsonl`.

    Opened again at a step, it drops what was written after that step and a last line that a kill cut short.
    """

    def __init__(self, folder: Path | None = None, *, resume_step: int = 0) -> None:
        self.path = None if folder is None else folder / HISTORY
        self.training: list[TrainingRow] = []
        self.evaluations: list[EvaluationRow] = []
        if self.path is None:
            return
        lines = _rows_up_to(self.path, resume_step)
        for row in lines:
            self._remember(row)
        write_atomically(self.path, "".join(map(_line, lines)))

    def add(self, row: TrainingRow | EvaluationRow) -> None:
        """Remember a row and append it to the file."""
        self._remember(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    @property
    def seconds(self) -> float:
        """Seconds spent in training up to the last row."""
        return self.training[-1].seconds if self.training else 0.0

    @property
    def tokens(self) -> int:
        """Tokens read up to the last row."""
        return self.training[-1].tokens if self.training else 0

    def _remember(self, row: TrainingRow | EvaluationRow) -> None:
        if isinstance(row, TrainingRow):
            self.training.append(row)
        else:
            self.evaluations.append(row)


class TrainingProgress(TrainerCallback):
    """Keeps the history, and shows it: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, history: TrainingHistory, description: str = "Training") -> None:
        self.history = history
        self.description = description
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.smoothed = 0.0
        self.shown = 0
        self.seconds = history.seconds
        self.mark = time.monotonic()
        self.last_line = self.mark
        self.began = (history.tokens, history.seconds)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(
                self.description, total=state.max_steps, completed=state.global_step, numbers=""
            )
            self.bar.start()
        self.mark = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count_time()
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)
        # A checkpoint does not hold the losses summed since the last row, so a row is due wherever one is written.
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        at = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        if "eval_loss" in logs:
            self.history.add(
                EvaluationRow(
                    **at,
                    seconds=self.seconds,
                    validation_loss=logs["eval_loss"],
                    validation_bits_per_byte=logs.get("eval_bits_per_byte"),
                    validation_accuracy=logs.get("eval_accuracy"),
                )
            )
            self._say(f"step {state.global_step:,}: validation loss {logs['eval_loss']:.4f}", now=True)
        elif "loss" in logs:
            self._count_time()
            row = TrainingRow(
                **at,
                seconds=self.seconds,
                loss=logs["loss"],
                learning_rate=logs["learning_rate"],
                gradient_norm=logs.get("grad_norm", 0.0),
                metrics={
                    name: value for name, value in logs.items() if name not in TRAINER_LOGS and name[:6] != "train_"
                },
            )
            self.history.add(row)
            self._show(row, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mark = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mark = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds += now - self.mark
        self.mark = now

    def _show(self, row: TrainingRow, state: TrainerState) -> None:
        self.shown += 1
        past = min(SMOOTHING, 1 - 1 / self.shown)  # the plain mean, until there are enough rows
        self.smoothed = past * self.smoothed + (1 - past) * row.loss
        tokens, seconds = row.tokens - self.began[0], row.seconds - self.began[1]
        speed = tokens / seconds if seconds > 0 else 0.0
        pace = f"{speed:,.0f} tokens/s  " if row.tokens else ""  # of images none are counted
        numbers = f"loss {self.smoothed:.4f}  {pace}lr {row.learning_rate:.2e}"
        if self.bar is not None:
            self.bar.update(self.task, numbers=numbers)
            return
        steps_left = state.max_steps - row.step
        per_step = row.seconds / row.step if row.step else 0.0
        self._say(
            f"{self.description}: step {row.step:,}/{state.max_steps:,}  {numbers}  "
            f"{steps_left * per_step:,.0f} s left",
            now=row.step == state.max_steps,
        )

    def _say(self, line: str, *, now: bool) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        elif now or time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def tensorboard_callbacks(folder: Path) -> list[TrainerCallback]:
    """What writes TensorBoard logs into `folder`; nothing, and a line in the log, where it is not installed."""
    if find_spec("tensorboard") is None:
        logger.info("No TensorBoard logs are written; for them: pip install 'transmamba[tensorboard]'")
        return []
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)  # otherwise a folder named for the date and this machine
    return [callback]


def _rows_up_to(path: Path, step: int) -> list[TrainingRow | EvaluationRow]:
    if not path.exists():
        return []
    rows: list[TrainingRow | EvaluationRow] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:  # a kill cut the last line short
            break
        if content["step"] <= step:
            rows.append(EvaluationRow(**content) if "validation_loss" in content else TrainingRow(**content))
    return rows


def _line(row: TrainingRow | EvaluationRow) -> str:
    return json.dumps(asdict(row)) + "\n"
