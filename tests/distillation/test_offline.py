"""Teachers that were stored: the format, its size, going on after a break, and windows that are not those stored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils.data import Dataset

from tests.conversion.checkpoints import token_ids
from tests.distillation.students import pair
from transmamba.distillation import LogitObjective, OnlineTeacher, StoredTeacher, TaughtWindows, offline, store_teacher
from transmamba.errors import CheckpointError, InputError

SEQ_LEN, WINDOWS = 16, 7


class SomeWindows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = WINDOWS, seed: int = 0) -> None:
        self.ids = token_ids(count, SEQ_LEN, seed=seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        positions = torch.arange(SEQ_LEN)
        return {
            "input_ids": self.ids[index],
            "position_ids": positions,
            "labels": torch.where(positions > 0, self.ids[index], -100),
        }


@pytest.fixture(autouse=True)
def two_windows_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "SHARD_BYTES", 2 * SEQ_LEN * 8 * 4)


def store(folder: Path, **changes: Any) -> Any:
    source, _ = pair()
    options: dict[str, Any] = {"name": "tiny", "num_windows": 5, "k": 8, "batch_size": 2}
    return store_teacher(OnlineTeacher(source), SomeWindows(), folder, **options | changes)


def test_what_is_stored_are_the_most_probable_tokens(tmp_path: Path) -> None:
    info = store(tmp_path / "stored", temperature=2.0)
    stored = StoredTeacher(tmp_path / "stored")
    assert stored.info == info
    assert (info.num_tokens, info.num_files, info.bytes_per_token, info.vocab_size) == (80, 3, 32, 257)
    source, _ = pair()
    for index in range(5):
        logits = source(input_ids=SomeWindows()[index]["input_ids"][None]).logits[0]
        exact = log_softmax(logits / 2, -1).topk(8)
        ids, log_probs = stored.window(index)
        assert torch.equal(ids.long(), exact.indices)
        # float16 keeps 11 bits: half a step of 2^-10, relative.
        assert torch.all((log_probs.double() - exact.values).abs() <= exact.values.abs() * 2**-11 + 2**-25)


def test_the_files_are_as_documented(tmp_path: Path) -> None:
    store(tmp_path / "stored")
    names = sorted(path.name for path in (tmp_path / "stored").iterdir())
    assert names == ["teacher.json", *(f"windows-{n:06}.safetensors" for n in range(3))]
    with safe_open(tmp_path / "stored" / names[1], framework="pt") as file:
        assert {key: (tuple(file.get_tensor(key).shape), file.get_tensor(key).dtype) for key in file.keys()} == {  # noqa: SIM118
            "ids": ((2, SEQ_LEN, 8), torch.uint16),
            "log_probs": ((2, SEQ_LEN, 8), torch.float16),
        }


def test_storing_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    store(whole)
    target, calls = OnlineTeacher.target, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return target(*args)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTeacher, "target", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store(broken)
    with pytest.raises(CheckpointError, match=r"lacks 2 of its 3 files, windows-000001.safetensors first; store"):
        StoredTeacher(broken)
    monkeypatch.setattr(OnlineTeacher, "target", lambda *args: calls.append(1) or target(*args))
    calls.clear()
    store(broken)
    assert len(calls) == 2
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes()


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offline, "save_file", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*run the same command again"):
        store(tmp_path / "stored")
    assert [path.name for path in (tmp_path / "stored").iterdir()] == ["teacher.json"]


def test_windows_come_with_what_was_stored_and_the_loss_is_near_the_online_one(tmp_path: Path) -> None:
    store(tmp_path / "stored", k=256)
    stored = StoredTeacher(tmp_path / "stored")
    taught = TaughtWindows(SomeWindows(), stored)
    assert len(taught) == 5
    batch = {name: torch.stack([taught[index][name] for index in range(5)]) for name in taught[0]}
    source, student = pair()
    online = LogitObjective(student, OnlineTeacher(source))(student, batch)[1]["kl"]
    offline_kl = LogitObjective(student, stored)(student, batch)[1]["kl"]
    # Every log-probability, of size up to 10, is off by 2^-12 of itself.
    assert abs(float(online) - float(offline_kl)) < 10 * 2**-11


def test_other_windows_are_refused(tmp_path: Path) -> None:
    store(tmp_path / "stored")
    stored = StoredTeacher(tmp_path / "stored")
    for windows in (SomeWindows(seed=1), SomeWindows(count=3)):
        with pytest.raises(InputError, match="was stored for other tokens than this run's"):
            TaughtWindows(windows, stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1 and below the teacher's vocabulary of 257"),
        ({"k": 257}, "k=257 must be"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"num_windows": 8}, "num_windows=8 must be between 1 and 7"),
    ],
)
def test_numbers_are_checked_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        store(tmp_path / "stored", **changes)
    assert not (tmp_path / "stored").exists()


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        store(tmp_path)
    store(tmp_path / "stored")
    with pytest.raises(InputError, match="holds another store: k is 8 there and 4 here"):
        store(tmp_path / "stored", k=4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("teacher.json", "{", "teacher.json is damaged or of another version"),
        ("windows-000001.safetensors", "x", "windows-000001.safetensors is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    store(tmp_path / "stored")
    (tmp_path / "stored" / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        StoredTeacher(tmp_path / "stored").window(2)


def test_another_format_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "stored")
    path = tmp_path / "stored" / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2 and this version reads 1"):
        StoredTeacher(path.parent)
