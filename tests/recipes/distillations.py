"""A distillation that takes a second: a tiny Llama, its student, a corpus of made-up sentences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conversion.checkpoints import save_source, tiny_source
from tests.training.toy import write_corpus
from transmamba.conversion import convert_checkpoint
from transmamba.data import TextSource
from transmamba.distillation import TransPointCurriculum
from transmamba.recipes import AlignmentStage, DistillationRun, LogitStage

SEQ_LEN = 32


def toy_distillation(folder: Path, family: str = "Llama", **changes: Any) -> DistillationRun:
    """A run in folder/run; teacher, student and corpus lie beside it and are made once."""
    if not (folder / "student").exists():
        teacher = save_source(tiny_source(family, eos_token_id=256), folder / "teacher")
        write_corpus(folder)
        convert_checkpoint(teacher, folder / "student", schedule="0,8,none", seq_len=SEQ_LEN)
    run = DistillationRun(
        name="toy",
        teacher=str(folder / "teacher"),
        student=str(folder / "student"),
        text=TextSource(source=str(folder / "corpus.jsonl"), validation_share=0.1),
        seq_len=SEQ_LEN,
        batch_size=4,
        max_tokens=20 * 4 * SEQ_LEN,
        matrices=AlignmentStage(share=0.2, trainable="mixers"),
        mixers=AlignmentStage(share=0.3, trans_point_schedule=TransPointCurriculum(freedom=0.5)),
        logits=LogitStage(ce_weight=0.5, trans_point_schedule=TransPointCurriculum(descent=0.5, freedom=0.3)),
        save_every=3,
        keep_checkpoints=1,
        output=str(folder / "run"),
    )
    return replace(run, **changes)
