"""Data: documents out of any text source, tokenizers, and packing into windows; images with classes.

    documents = load_documents(TextSource(source="builtin:python-docs"))
    tokenizer = load_tokenizer("train:2048", documents.train)
    dataset = pack_documents(documents.train, tokenizer, seq_len=512)

An item of the data set is what the model's `forward` takes: input_ids, labels and position_ids.
"""

from transmamba.data.augmentation import Augmentation, as_floats, augment
from transmamba.data.builtin import BUILTIN_CORPORA, load_builtin
from transmamba.data.images import ImageData, ImageDataset, ImageSource, load_images, share_of_images
from transmamba.data.packing import IGNORE_INDEX, PackedDataset, pack_documents
from transmamba.data.recall import RECALL_TASKS, RecallPrompt, recall_prompts, shortest_recall
from transmamba.data.sentences import SentenceDataset, make_sentences, pad_texts, split_sentences
from transmamba.data.text import Documents, TextSource, load_documents
from transmamba.data.tokenizers import load_tokenizer, token_byte_lengths

__all__ = [
    "BUILTIN_CORPORA",
    "IGNORE_INDEX",
    "RECALL_TASKS",
    "Augmentation",
    "Documents",
    "ImageData",
    "ImageDataset",
    "ImageSource",
    "PackedDataset",
    "RecallPrompt",
    "SentenceDataset",
    "TextSource",
    "as_floats",
    "augment",
    "load_builtin",
    "load_documents",
    "load_images",
    "load_tokenizer",
    "make_sentences",
    "pack_documents",
    "pad_texts",
    "recall_prompts",
    "share_of_images",
    "shortest_recall",
    "split_sentences",
    "token_byte_lengths",
]
