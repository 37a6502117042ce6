"""That training learns, and that what it computes changes only on purpose."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from tests.training.toy import toy_run
from transmamba.data import TextSource, load_documents
from transmamba.recipes import ModelSettings, train_language_model

GOLDEN = Path(__file__).with_name("golden_losses.json")
SCHEDULES = {"v": "0,8,none", "transformer": "transformer", "mamba2": "mamba2"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_losses_are_those_on_record(tmp_path: Path, schedule: str) -> None:
    """The record is of one CPU. Others round differently, by 2^-24, and Adam's first steps are as large as the learning
    rate whatever the gradient, so small differences grow; 1e-4 leaves room for that and for no change of ours."""
    run = toy_run(tmp_path, schedule=SCHEDULES[schedule])
    trained = train_language_model(run, device="cpu")
    losses = [row.loss for row in trained.history.training]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[schedule], rel=1e-4)


def test_the_builtin_corpus_is_learned_beyond_the_frequency_of_bytes(tmp_path: Path) -> None:
    settings = ModelSettings(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2)
    run = toy_run(
        tmp_path,
        model=settings,
        text=TextSource(source="builtin:python-docs", max_documents=30),
        schedule="0,16,none",
        seq_len=128,
        batch_size=8,
        max_steps=60,
        learning_rate=1e-2,
        warmup_steps=10,
        log_every=10,
    )
    trained = train_language_model(run, device="cpu")
    assert trained.history.training[0].loss == pytest.approx(math.log(257), rel=0.02)
    counts = Counter("".join(load_documents(run.text).validation).encode())
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert trained.evaluation.loss < 0.85 * entropy
