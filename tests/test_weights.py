"""What is said of the folder of a checkpoint before a model is made of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conversion.checkpoints import tiny_tokenizer
from transmamba.errors import CheckpointError
from transmamba.weights import (
    INDEX,
    WEIGHTS,
    check_positions,
    check_tokenizer_fits,
    in_one_line,
    read_headers,
    read_tokenizer,
)

PLACES = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "d": "three.safetensors"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with four tensors in three files."""
    for file in set(PLACES.values()):
        names = [name for name, place in PLACES.items() if place == file]
        save_file({name: torch.zeros(2, ord(name) - 96, dtype=torch.bfloat16) for name in names}, tmp_path / file)
    write_index(tmp_path, {"weight_map": PLACES})
    return tmp_path


def write_index(folder: Path, content: Any) -> None:
    (folder / INDEX).write_text(json.dumps(content))


def test_headers_come_from_all_shards(shards: Path) -> None:
    headers = read_headers(shards)
    assert {name: header.file.name for name, header in headers.items()} == PLACES
    assert {header.kind for header in headers.values()} == {"BF16"}
    assert headers["c"].shape == (2, 3)


def test_whole_weights_go_before_an_index(shards: Path) -> None:
    save_file({"whole": torch.zeros(1)}, shards / WEIGHTS)
    assert list(read_headers(shards)) == ["whole"]


def places(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {"weight_map": PLACES | changes})


def remove(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / f"{name}.safetensors").unlink()

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("two"), r"index\.json names two\.safetensors, which is missing; copy it anew"),
        (remove("one", "two", "three"), r"names one\.safetensors and 2 more, which are missing"),
        (places(e="four.safetensors"), r"names four\.safetensors, which is missing"),
        (
            places(e="one.safetensors"),
            r"names e in one\.safetensors, which does not hold it; the shards are of different",
        ),
        (places(a="../one.safetensors"), r"names '\.\./one\.safetensors' for a, which is not a file beside it"),
        (places(a="/etc/passwd"), "names '/etc/passwd' for a, which is not a file beside it"),
        (places(a=None), "names None for a"),
        (lambda folder: write_index(folder, {}), "has no weight_map"),
        (lambda folder: write_index(folder, {"weight_map": {}}), "has no weight_map"),
        (lambda folder: write_index(folder, {"weight_map": ["a"]}), "has no weight_map"),
        (lambda folder: write_index(folder, []), "holds a list and not an object"),
        (lambda folder: (folder / INDEX).write_text("{"), r"index\.json is truncated or not JSON"),
        (lambda folder: (folder / "two.safetensors").write_bytes(b""), r"two\.safetensors is truncated or damaged"),
        (
            lambda folder: (folder / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
            r"two\.safetensors is a Git LFS pointer and not the file itself; run git lfs pull",
        ),
        (lambda folder: (folder / INDEX).unlink(), r"has no model\.safetensors\. Save the model as safetensors first"),
    ],
)
def test_shards_that_are_not_what_the_index_says(shards: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(shards)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_headers(shards)
    assert "\n" not in str(caught.value)


HEADS = {"hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"max_position_embeddings": 0}, "has max_position_embeddings=0; it must be at least 1"),
        ({"n_positions": -4}, "has n_positions=-4"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "a rotary embedding of type 'spiral', .*; known are default, dyn",
        ),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "of type 'spiral'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "spiral"}}}, "of type 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"by factor=0\.5; it must be at least 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "by factor='2'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": float("nan")}}, "by factor=nan"),
        (
            HEADS | {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            "has 7 entries of long_factor; a head of this model needs 8",
        ),
    ],
    ids=str,
)
def test_positions_that_cannot_be_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^folder.config\.json .*{message}"):
        check_positions(Path("folder"), content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"max_position_embeddings": 1, "rope_scaling": None},
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 64}},
        HEADS | {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
        HEADS | {"head_dim": 4, "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0, 2.0]}},
    ],
    ids=str,
)
def test_positions_that_can_be_pass(content: dict[str, Any]) -> None:
    check_positions(Path("folder"), content)


def test_a_tokenizer_is_read_or_its_broken_file_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be loaded, or there is none .*save one beside the model"):
        read_tokenizer(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer("Zürich").input_ids) == "Zürich"
    check_tokenizer_fits(tmp_path, tokenizer, len(tokenizer))
    with pytest.raises(CheckpointError, match="the tokenizer has 257 entries and the model 256; they do not belong"):
        check_tokenizer_fits(tmp_path, tokenizer, 256)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"version": ')
        with pytest.raises(CheckpointError, match=rf"{name} is truncated or not JSON"):
            read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot be loaded, or there is none \(KeyError 'added_tokens'\)"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("gelu"), "KeyError 'gelu'"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "x" * 297 + "..."),
    ],
)
def test_errors_of_others_become_one_line(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
