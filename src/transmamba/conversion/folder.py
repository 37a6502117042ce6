"""From a checkpoint to a folder with the student, checked against its source before the folder appears.

The folder holds the student as save_pretrained writes it, the source's tokenizer and generation config, and the table
as conversion.json.
"""

import gc
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from transmamba._version import __version__
from transmamba.errors import CheckpointError, InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.progress import without_progress_bars
from transmamba.weights import check_tokenizer_fits, read_json, read_tokenizer

from .initialisation import calibrate
from .plan import ConversionPlan
from .source import Source, has_tokenizer, open_source
from .student import build_student, make_plan
from .verification import (
    LARGEST_DIFFERENCE,
    all_attention_logits,
    check_finite,
    logits_of,
    relative_difference,
)

TABLE = "conversion.json"
GENERATION = "generation_config.json"
CHECKED_TOKENS = 128  # in a row, or as many as the model has positions
CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 8, 512
PIECE, SPREAD = 8192, 97  # characters; a prime, so that periods in a corpus do not matter


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedFolder:
    """What a conversion wrote. difference: max |student - source| / max |source| over logits, in fp32."""

    folder: Path
    plan: ConversionPlan
    difference: float
    checked: tuple[str, ...]


def convert_checkpoint(
    source: str | Path,
    out: Path | str,
    *,
    schedule: Sequence[int | None] | str | None = None,
    seq_len: int | None = None,
    initialisation: str | None = None,
    texts: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> ConvertedFolder:
    """Convert a checkpoint, check that nothing was lost, and write the student into the new folder `out`.

    texts: of any length, to fit the state space to; used when the source has a tokenizer. The other arguments are as
    in `convert`. Either the whole folder appears or nothing.

    Raises:
        CheckpointError: the source cannot be converted, or the student's logits are not the source's.
        InputError, ScheduleError: an argument is out of range.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something already; give a folder that is empty or not there yet.")
    opened = open_source(source)
    assert opened.folder is not None
    tokenizer = load_tokenizer(opened.folder)
    if tokenizer is not None:
        check_tokenizer_fits(source, tokenizer, opened.config.vocab_size)
    if (opened.folder / GENERATION).is_file():
        read_json(opened.folder / GENERATION)
    longest = min(opened.config.max_position_embeddings, seq_len or opened.config.max_position_embeddings)
    windows = None if tokenizer is None else token_windows(tokenizer, texts, min(longest, CALIBRATION_LENGTH))
    plan, config = make_plan(
        opened,
        schedule=schedule,
        seq_len=seq_len,
        initialisation=initialisation,
        has_text=windows is not None,
        ssm_rope=True,
    )
    tokens = {"random tokens": torch.randint(config.vocab_size, (2, min(longest, CHECKED_TOKENS)))}
    if windows is not None:
        tokens["text"] = windows[:2, :CHECKED_TOKENS]
    exact = _source_logits(opened, tokens, device)

    student = build_student(opened, plan, config, dtype=None)
    if windows is not None and plan.initialisation == "calibrated":
        plan = plan.with_initial_values(calibrate(student.to(device), windows))
        student.to("cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    with suppress(FileNotFoundError):
        shutil.rmtree(partial)  # what a conversion that was killed left behind
    try:
        _write(partial, student, opened, tokenizer)
        del student
        gc.collect()
        difference = _difference(partial, tokens, exact, device)
        table = {"transmamba": __version__, "max_relative_logit_difference": difference, **plan.to_dict()}
        (partial / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ConvertedFolder(folder=out, plan=plan, difference=difference, checked=tuple(tokens))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source, or None if it has none.

    Raises:
        CheckpointError: it has one that cannot be loaded.
    """
    if not has_tokenizer(folder):
        return None
    return read_tokenizer(folder)


def token_windows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor | None:
    """At most CALIBRATION_WINDOWS windows, (windows, length), from all over the texts; None where all are shorter."""
    pieces = [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]
    windows: list[list[int]] = []
    for first in range(SPREAD):  # every SPREAD-th piece, then those between them
        for piece in pieces[first::SPREAD]:
            ids = tokenizer(piece, verbose=False).input_ids[:length]
            if len(ids) == length:
                windows.append(ids)
            if len(windows) == CALIBRATION_WINDOWS:
                return torch.tensor(windows)
    return torch.tensor(windows) if windows else None


def _source_logits(source: Source, tokens: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, use_safetensors=True)
    model.to(device).eval()
    exact = {name: logits_of(model, ids).cpu() for name, ids in tokens.items()}
    for logits in exact.values():
        check_finite(logits)
    return exact


def _difference(folder: Path, tokens: dict[str, Tensor], exact: dict[str, Tensor], device: torch.device | str) -> float:
    """The largest relative difference of what was written, read again."""
    with without_progress_bars():
        student = TransMambaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    student.to(device).eval()
    differences = {
        name: relative_difference(exact[name], all_attention_logits(student, ids)) for name, ids in tokens.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"the student's logits differ from the source's by {differences[worst]:.2g} relative on {worst}, more than "
            f"{LARGEST_DIFFERENCE:g}, so nothing was written; please report this checkpoint."
        )
    return differences[worst]


def _write(
    folder: Path, student: TransMambaForCausalLM, source: Source, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    assert source.folder is not None
    with without_progress_bars():
        student.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if (source.folder / GENERATION).is_file():
        shutil.copyfile(source.folder / GENERATION, folder / GENERATION)
