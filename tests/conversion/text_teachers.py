"""A BERT of toy size with a word-piece tokenizer of single letters."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), ".", ","]
VOCAB = [*SPECIAL, *PIECES]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCAB),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def bert_teacher(seed: int = 0, std: float = 0.3, **changes: Any) -> BertModel:
    """Weights so large that attention is far from uniform."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**(SIZES | {"initializer_range": std} | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "LayerNorm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token; [CLS] before and [SEP] behind a text."""
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(VOCAB)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", VOCAB.index("[CLS]")), ("[SEP]", VOCAB.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **names)


def write_bert(folder: Path, **changes: Any) -> Path:
    """Such a teacher with its tokenizer, in folder/teacher."""
    path = folder / "teacher"
    bert_teacher(**changes).save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    return path
