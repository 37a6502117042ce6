"""Caption-to-caption retrieval: whether the caption nearest to a caption is another one of the same photo.

All captions of one number, one a photo, ask among all captions of another number, one a photo, so each question has one
right answer among as many as there are photos. Every ordered pair of numbers is asked, and the mean is reported.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from transmamba.errors import CorpusError, InputError

__all__ = ["RetrievalScore", "evaluate_caption_retrieval", "read_captions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalScore:
    """Shares between 0 and 1 of questions whose answer is among the nearest 1, 5 and 10, and its mean rank, from 1.

    A wrong caption that is as near as the right one counts half a place before it.
    """

    num_photos: int
    num_questions: int
    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mean_rank: float


def read_captions(path: str | Path, max_photos: int | None = None) -> list[list[str]]:
    """The captions of every photo of a .jsonl file of {"captions": [...]}, of each as many as the one with fewest has.

    Raises:
        CorpusError: the file is missing or malformed, or a photo has fewer than two captions.
    """
    found: list[list[str]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as captions: {error}.") from error
    for number, line in enumerate(lines[:max_photos], start=1):
        try:
            captions = json.loads(line)["captions"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CorpusError(f'{path}, line {number}: expected {{"captions": [...]}}, one photo a line.') from error
        if not isinstance(captions, list) or len(captions) < 2 or not all(isinstance(one, str) for one in captions):
            raise CorpusError(f"{path}, line {number}: a photo needs two captions or more, each a text.")
        found.append(captions)
    if len(found) < 2:
        raise CorpusError(f"{path} has {len(found)} photos; captions are told apart among two or more.")
    fewest = min(map(len, found))
    return [captions[:fewest] for captions in found]


@torch.no_grad()
def evaluate_caption_retrieval(
    embed: Callable[[Sequence[str]], Tensor], captions: Sequence[Sequence[str]]
) -> RetrievalScore:
    """Score an encoder. embed: texts to embeddings (texts, width), compared by their cosine.

    captions: for every photo equally many, two or more.

    Raises:
        InputError: embeddings are not finite, or not one for each text.
    """
    each = len(captions[0])
    flat = [text for photo in captions for text in photo]
    embeddings = embed(flat).double().cpu()
    if len(embeddings) != len(flat) or not bool(torch.isfinite(embeddings).all()):
        raise InputError(f"the encoder gave {len(embeddings)} embeddings for {len(flat)} texts, or some not finite.")
    unit = torch.nn.functional.normalize(embeddings, dim=-1).unflatten(0, (len(captions), each))
    ranks = torch.cat([ranks_of(unit[:, asked] @ unit[:, among].T) for asked, among in permutations(range(each), 2)])
    return RetrievalScore(
        num_photos=len(captions),
        num_questions=len(ranks),
        recall_at_1=_share(ranks, 1),
        recall_at_5=_share(ranks, 5),
        recall_at_10=_share(ranks, 10),
        mean_rank=float(ranks.mean()),
    )


def ranks_of(similarities: Tensor) -> Tensor:
    """The rank, from 1, of the diagonal's entry in its row; an equal one counts half."""
    right = similarities.diagonal()[:, None]
    before = (similarities > right).sum(1) + 0.5 * ((similarities == right).sum(1) - 1)
    return 1.0 + before.double()


def _share(ranks: Tensor, within: int) -> float:
    return float((ranks <= within).double().mean())
