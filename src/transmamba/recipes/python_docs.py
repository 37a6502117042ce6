"""Small models of Python's own documentation: they train on two CPU cores, from nothing but an installed Python.

TransMamba and its baselines, at equal size, on the same tokens in the same order. The baselines are in their standard
form: a Transformer without convolution and gate, Mamba-2 with a gated norm; `--set model.mixer_form=shared --set
model.match_shared_size=false` runs one as a schedule of the shared model instead.
"""

from dataclasses import replace

from transmamba.data import TextSource
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings

__all__ = [
    "python_docs_hybrid_1_1",
    "python_docs_hybrid_1_7",
    "python_docs_mamba2",
    "python_docs_transformer",
    "python_docs_v9",
]


def python_docs_v9() -> LanguageModelRun:
    """TransMamba V9 of 2 M parameters: `transmamba train python_docs_v9`."""
    return LanguageModelRun(
        name="python_docs_v9",
        model=ModelSettings(hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4),
        text=TextSource(source="builtin:python-docs"),
        schedule="v9",
        tokenizer="train:2048",
        seq_len=512,
        batch_size=8,
        max_tokens=1_500_000,
        learning_rate=3e-3,
        warmup_steps=20,
        save_every=100,
        eval_every=100,
        eval_tokens=20_000,
    )


def python_docs_transformer() -> LanguageModelRun:
    """A Transformer of one size with V9: `transmamba train python_docs_transformer`."""
    return _baseline("transformer")


def python_docs_mamba2() -> LanguageModelRun:
    """Mamba-2 of one size with V9: `transmamba train python_docs_mamba2`."""
    return _baseline("mamba2")


def python_docs_hybrid_1_1() -> LanguageModelRun:
    """Mamba-2 and Transformer layers in turn, of one size with V9: `transmamba train python_docs_hybrid_1_1`."""
    return _baseline("hybrid-1-1")


def python_docs_hybrid_1_7() -> LanguageModelRun:
    """A Transformer layer to seven of Mamba-2, of one size with V9: `transmamba train python_docs_hybrid_1_7`."""
    return _baseline("hybrid-1-7")


def _baseline(schedule: str) -> LanguageModelRun:
    run = python_docs_v9()
    name = f"python_docs_{schedule.replace('-', '_')}"
    model = replace(run.model, mixer_form="standard", match_shared_size=True)
    return replace(run, name=name, schedule=schedule, model=model, output="")
