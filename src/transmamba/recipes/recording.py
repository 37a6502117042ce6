"""Storing a teacher: what decides which files come out, and carrying it out."""

from dataclasses import dataclass, field

import torch

from transmamba.compatibility import check_teacher_length
from transmamba.data import TextSource, load_documents, pack_documents
from transmamba.distillation import OnlineTeacher, StoredTeacherInfo, store_teacher
from transmamba.errors import RecipeError
from transmamba.inference import load_language_model, resolve_device

__all__ = ["RecordingRun", "record_teacher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingRun:
    """Which of a teacher's logits are stored. A distillation from them needs the same text, seq_len and boundaries.

    seq_len: of the windows; None = the teacher's max_position_embeddings. max_tokens: None = all of the text that is
    not kept for validation. k: tokens stored at every place. temperature: at which their probabilities are.
    batch_size: windows at a time.
    """

    teacher: str = ""
    text: TextSource = field(default_factory=lambda: TextSource(source="builtin:python-docs"))
    output: str = ""
    seq_len: int | None = None
    document_boundaries: bool = True
    max_tokens: int | None = None
    k: int = 64
    temperature: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} must be at least 1.")


def record_teacher(run: RecordingRun, *, device: str = "auto") -> StoredTeacherInfo:
    """Store what the teacher says into the output folder; one that holds a part of the same is completed.

    Raises:
        InputError: a number is out of range, or the folder holds something else.
        CheckpointError: the teacher cannot be read, or a file cannot be written.
        CorpusError: the text cannot be read or is too little.
    """
    chosen = resolve_device(device)
    model, tokenizer = load_language_model(run.teacher, device=chosen, dtype=torch.float32)
    seq_len = run.seq_len or model.config.get_text_config().max_position_embeddings
    check_teacher_length(model.config, seq_len)
    documents = load_documents(run.text)
    windows = pack_documents(documents.train, tokenizer, seq_len, boundaries=run.document_boundaries)
    wanted = len(windows) if run.max_tokens is None else max(1, run.max_tokens // seq_len)
    return store_teacher(
        OnlineTeacher(model, vocab_size=max(tokenizer.get_vocab().values()) + 1),
        windows,
        run.output,
        name=run.teacher,
        num_windows=min(wanted, len(windows)),
        k=run.k,
        temperature=run.temperature,
        batch_size=run.batch_size,
    )
