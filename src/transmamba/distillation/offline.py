"""A teacher that ran once: its k most probable next tokens at every place of packed windows, in files.

A folder holds
    teacher.json            what was stored, and for which tokens (`StoredTeacherInfo`)
    windows-000000.safetensors, windows-000001.safetensors, ...
                            ids (windows, seq_len, k), uint16 or int32, the most probable token first, and log_probs
                            (windows, seq_len, k), float16, their log-probabilities at `temperature`
At k = 64 and a vocabulary of at most 65,536 that is 256 bytes a token. A float16 carries 11 bits, so a log-probability
of -10 is right to 0.004. Every file is written in whole or not at all, and storing goes on where it stopped.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from transmamba.distillation.losses import DenseTarget, GivenTarget, TopKTarget
from transmamba.distillation.teacher import OnlineTeacher
from transmamba.errors import CheckpointError, InputError
from transmamba.progress import progress_bar

INFO_FILE = "teacher.json"
FORMAT = 1
SHARD_BYTES = 1 << 26  # about; a shard is what a kill can cost
SMALL_VOCABULARY = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTeacherInfo:
    """What a folder of stored logits holds. tokens_sha256: of the windows' tokens and of where documents begin."""

    teacher: str
    k: int
    temperature: float
    vocab_size: int
    seq_len: int
    num_windows: int
    windows_per_file: int
    tokens_sha256: str
    format: int = FORMAT

    @property
    def bytes_per_token(self) -> int:
        return self.k * (2 + (2 if self.vocab_size <= SMALL_VOCABULARY else 4))

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.seq_len

    @property
    def num_files(self) -> int:
        return -(-self.num_windows // self.windows_per_file)

    def windows_in(self, number: int) -> range:
        """The windows of one file."""
        first = number * self.windows_per_file
        return range(first, min(first + self.windows_per_file, self.num_windows))


def store_teacher(
    teacher: OnlineTeacher,
    windows: Dataset[dict[str, Tensor]],
    folder: Path | str,
    *,
    name: str,
    num_windows: int,
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> StoredTeacherInfo:
    """Write what the teacher says of the first `num_windows` windows, into a folder that is new or holds a part of it.

    name: of the teacher, for the record.

    Raises:
        InputError: a number is out of range, or the folder holds something else.
        CheckpointError: a file cannot be written.
    """
    folder = Path(folder)
    info = _info(teacher, windows, name=name, num_windows=num_windows, k=k, temperature=temperature)
    _claim(folder, info)
    todo = [number for number in range(info.num_files) if not _shard(folder, number).is_file()]
    with progress_bar("Storing the teacher", sum(len(info.windows_in(number)) for number in todo)) as advance:
        for number in todo:
            _write_shard(folder, number, info, teacher, windows, batch_size, advance)
    return info


class StoredTeacher:
    """Reads what `store_teacher` wrote; as a teacher of the last stage, it takes what TaughtWindows adds to a batch."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = _read_info(self.folder)
        missing = [n for n in range(self.info.num_files) if not _shard(self.folder, n).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of its {self.info.num_files} files, "
                f"{_shard(self.folder, missing[0]).name} first; store the teacher again into the same folder, which "
                "goes on where it stopped."
            )

    @staticmethod
    def is_stored(folder: Path | str) -> bool:
        """Whether a folder holds a stored teacher, whole or in part."""
        return (Path(folder) / INFO_FILE).is_file()

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """ids, int32, and log_probs, float16, of one window, (seq_len, k) each."""
        number, within = divmod(index, self.info.windows_per_file)
        path = _shard(self.folder, number)
        try:
            with safe_open(path, framework="pt") as file:
                ids, log_probs = (file.get_slice(name)[within] for name in ("ids", "log_probs"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and store the teacher again into the same folder."
            ) from error
        return ids.int(), log_probs

    def target(self, batch: dict[str, Tensor], counts: Tensor) -> TopKTarget:
        """What was stored for the places of the batch where counts is true."""
        return TopKTarget(
            batch["teacher_ids"][counts], batch["teacher_log_probs"][counts], temperature=self.info.temperature
        )

    def check_windows(self, windows: Dataset[dict[str, Tensor]]) -> None:
        """Raise InputError unless these are the windows that were stored."""
        if len(windows) < self.info.num_windows or self.info.tokens_sha256 != _fingerprint(  # type: ignore[arg-type]
            windows, self.info.num_windows
        ):
            raise InputError(
                f"{self.folder} was stored for other tokens than this run's; use the same text, tokenizer, seq_len "
                f"({self.info.seq_len}) and document_boundaries, or store the teacher anew."
            )


class TaughtWindows(Dataset[dict[str, Tensor]]):
    """Windows with what a stored teacher says of each: teacher_ids and teacher_log_probs, (seq_len, k)."""

    def __init__(self, windows: Dataset[dict[str, Tensor]], teacher: StoredTeacher) -> None:
        teacher.check_windows(windows)
        self.windows = windows
        self.teacher = teacher

    def __len__(self) -> int:
        return self.teacher.info.num_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, log_probs = self.teacher.window(range(len(self))[index])
        return {**self.windows[index], "teacher_ids": ids, "teacher_log_probs": log_probs}


def _info(
    teacher: OnlineTeacher,
    windows: Dataset[dict[str, Tensor]],
    *,
    name: str,
    num_windows: int,
    k: int,
    temperature: float,
) -> StoredTeacherInfo:
    vocab_size = teacher.vocab_size
    if not 1 <= k < vocab_size:
        raise InputError(f"k={k} must be at least 1 and below the teacher's vocabulary of {vocab_size}; 64 is usual.")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature={temperature} must be above 0; 1 stores the distribution as it is.")
    available = len(windows)  # type: ignore[arg-type]
    if not 1 <= num_windows <= available:
        raise InputError(f"num_windows={num_windows} must be between 1 and {available}, the windows that there are.")
    seq_len = len(windows[0]["input_ids"])
    draft = StoredTeacherInfo(
        teacher=name,
        k=k,
        temperature=float(temperature),
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_windows=num_windows,
        windows_per_file=1,
        tokens_sha256=_fingerprint(windows, num_windows),
    )
    per_file = max(1, SHARD_BYTES // (draft.bytes_per_token * seq_len))
    return StoredTeacherInfo(**asdict(draft) | {"windows_per_file": per_file})


def _claim(folder: Path, info: StoredTeacherInfo) -> None:
    """Make the folder, or check that it holds a part of the same."""
    if StoredTeacher.is_stored(folder):
        found = _read_info(folder)
        differing = [field.name for field in fields(info) if getattr(found, field.name) != getattr(info, field.name)]
        if differing:
            first = differing[0]
            raise InputError(
                f"{folder} holds another store: {first} is {getattr(found, first)!r} there and "
                f"{getattr(info, first)!r} here; give another folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something already; give a folder that is empty or not there yet.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{INFO_FILE}.partial"
    partial.write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / INFO_FILE)


def _write_shard(
    folder: Path,
    number: int,
    info: StoredTeacherInfo,
    teacher: OnlineTeacher,
    windows: Dataset[dict[str, Tensor]],
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    ids, log_probs = [], []
    indices = info.windows_in(number)
    for start in range(0, len(indices), batch_size):
        items = [windows[index] for index in indices[start : start + batch_size]]
        batch = {name: torch.stack([item[name] for item in items]).to(teacher.model.device) for name in items[0]}
        everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        target = teacher.target(batch, everywhere)
        top = most_probable(target, info.k, info.temperature)
        shape = (len(items), info.seq_len, info.k)
        ids.append(top[0].view(shape).to("cpu", torch.uint16 if info.vocab_size <= SMALL_VOCABULARY else torch.int32))
        log_probs.append(top[1].view(shape).to("cpu", torch.float16))
        advance(len(items))
    path = _shard(folder, number)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} could not be written ({error}); make room on the disk and run the same command again, which goes "
            "on."
        ) from error


def most_probable(target: DenseTarget | GivenTarget, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """ids and log-probabilities (rows, k) of the most probable tokens, most probable first, some rows at a time."""
    ids, log_probs = [], []
    step = 1 << 10
    for start in range(0, len(target), step):
        logits = target.logits(slice(start, start + step)).float()
        top = torch.log_softmax(logits / temperature, dim=-1).topk(k, dim=-1)
        ids.append(top.indices)
        log_probs.append(top.values)
    return torch.cat(ids), torch.cat(log_probs)


def _fingerprint(windows: Dataset[dict[str, Tensor]], num_windows: int) -> str:
    digest = hashlib.sha256()
    for index in range(num_windows):
        item = windows[index]
        for name in ("input_ids", "position_ids", "labels"):
            digest.update(item[name].to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def _read_info(folder: Path) -> StoredTeacherInfo:
    path = folder / INFO_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        info = StoredTeacherInfo(**content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no stored teacher: there is no {INFO_FILE}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or of another version ({error}); store the teacher anew.") from error
    if info.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {info.format} and this version reads {FORMAT}; store the teacher anew."
        )
    return info


def _shard(folder: Path, number: int) -> Path:
    return folder / f"windows-{number:06}.safetensors"
