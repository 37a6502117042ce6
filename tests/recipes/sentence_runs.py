"""An adaptation of a sentence encoder that takes seconds: a BERT of two layers on a page of text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from transmamba.data import TextSource
from transmamba.recipes import SentenceAdaptationRun, find_sentence_adaptation


def write_text(folder: Path, documents: int = 30) -> Path:
    """Documents with a blank line between."""
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "sees", "a", "tree", "far", "away", "now"]
    texts = []
    for _ in range(documents):
        lines = [" ".join(generator.choice(words, size=generator.integers(4, 7))).capitalize() for _ in range(5)]
        texts.append(". ".join(lines) + ".")
    path = folder / "text.txt"
    path.write_text("\n\n".join(texts))
    return path


def write_captions(folder: Path) -> Path:
    path = folder / "captions.jsonl"
    rows = [{"captions": [f"a dog and {thing}", f"the {thing} of a dog"]} for thing in ("tree", "river", "car", "boat")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def toy_run(folder: Path, recipe: str = "adapt_sentences", **changes: Any) -> SentenceAdaptationRun:
    """A run of 4 steps in folder/run."""
    run = replace(
        find_sentence_adaptation(recipe)(),
        teacher=str(folder / "teacher"),
        text=TextSource(source=str(folder / "text.txt"), document_separator="\n\n", validation_share=0.2),
        batch_size=8,
        texts=32,
        max_length=36,
        learning_rate=2e-3,
        eval_texts=16,
        log_every=1,
        output=str(folder / "run"),
    )
    return replace(run, **changes)
