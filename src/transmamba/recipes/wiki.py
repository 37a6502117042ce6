"""Models of English Wikipedia, for one GPU; the text is yours to give, with --text."""

from transmamba.data import TextSource
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings

__all__ = ["wiki_v9_36m_h200"]


def wiki_v9_36m_h200() -> LanguageModelRun:
    """TransMamba V9 of 36 M parameters on 20 M tokens: `transmamba train wiki_v9_36m_h200 --text wiki.txt`.

    Plain text with a blank line between articles, or rows with a field "text". One H100 reads 131,000 tokens/s (torch
    2.11, measured over the first 2 M tokens), so training takes three minutes.
    """
    return LanguageModelRun(
        name="wiki_v9_36m_h200",
        model=ModelSettings(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8),
        text=TextSource(source="wiki.txt", document_separator="\n\n", validation_share=0.01),
        schedule="v9",
        tokenizer="train:16384",
        seq_len=2048,
        batch_size=16,
        max_tokens=20_000_000,
        learning_rate=2e-3,
        warmup_steps=60,
        log_every=10,
        save_every=200,
        eval_every=200,
        eval_tokens=200_000,
        dtype="bfloat16",
    )
