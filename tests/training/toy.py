"""A run that takes a second: three layers, bytes, a corpus of made-up sentences."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from transmamba.data import TextSource
from transmamba.recipes import LanguageModelRun, ModelSettings

WORDS = ("state", "space", "attends", "to", "the", "prefix", "and", "converts", "memory", "then", "scans", "on")


def write_corpus(folder: Path, num_documents: int = 60) -> Path:
    """Write documents of 30 to 400 characters; of several lengths, so that windows differ in predicted tokens."""
    draw = random.Random(0)
    path = folder / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            text = " ".join(draw.choices(WORDS, k=draw.randint(6, 70))) + "."
            file.write(json.dumps({"text": text}) + "\n")
    return path


def toy_run(folder: Path, **changes: Any) -> LanguageModelRun:
    """A run in folder/run on a corpus beside it."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(folder)
    run = LanguageModelRun(
        name="toy",
        model=ModelSettings(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2),
        text=TextSource(source=str(corpus), validation_share=0.1),
        schedule="0,8,none",
        tokenizer="bytes",
        seq_len=32,
        batch_size=4,
        max_steps=20,
        learning_rate=3e-3,
        warmup_steps=2,
        output=str(folder / "run"),
    )
    return replace(run, **changes)
