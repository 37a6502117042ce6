"""Images out of folders and of scikit-learn: every image on one side, in its class, and bad files named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from transmamba.data import ImageSource, images, load_images
from transmamba.errors import CorpusError

COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}


def write_folder(folder: Path, per_class: int = 5, size: tuple[int, int] = (12, 8)) -> Path:
    """A folder for each colour, of images of that colour, each a little darker than the one before."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            shade = tuple(max(0, value - 10 * number) for value in colour)
            Image.new("RGB", size, shade).save(folder / name / f"{number}.png")
    return folder


def source_of(folder: Path, **changes: object) -> ImageSource:
    return replace(ImageSource(source=str(folder), image_size=8, validation_share=0.4), **changes)


def test_a_class_is_a_folder(tmp_path: Path) -> None:
    data = load_images(source_of(write_folder(tmp_path)))
    assert data.classes == ("blue", "green", "red")
    assert (len(data.train), len(data.validation)) == (9, 6)
    assert data.skipped == ()
    for side in (data.train, data.validation):
        assert side.pixels.dtype == torch.uint8
        assert side.pixels.shape[1:] == (3, 8, 8)
        for item in side:
            channel = {"red": 0, "green": 1, "blue": 2}[data.classes[item["labels"]]]
            assert item["pixel_values"][channel].min() >= 200
            assert item["pixel_values"].sum() == item["pixel_values"][channel].sum()
    everything = torch.cat([data.train.pixels, data.validation.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 15  # every image once


def test_a_folder_for_validation_is_kept_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "val", 2)
    data = load_images(source_of(tmp_path))
    assert (len(data.train), len(data.validation)) == (9, 6)
    (tmp_path / "val" / "white").mkdir()
    with pytest.raises(CorpusError, match=r"val has the class 'white', which .*train lacks"):
        load_images(source_of(tmp_path))


def test_images_are_cut_to_the_middle_and_scaled(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            image = Image.new("RGB", (24, 8), (0, 0, 0))
            image.paste((255, 255, 255), (8, 0, 16, 8))  # the middle third is white
            image.save(tmp_path / name / f"{number}.png")
    assert load_images(source_of(tmp_path)).train.pixels.min() == 255
    assert load_images(source_of(tmp_path, image_size=5)).train.pixels.shape == (2, 3, 5, 5)


def test_digits_are_split_the_same_way_every_time() -> None:
    first, second = (load_images(ImageSource(image_size=8)) for _ in range(2))
    assert len(first.train) + len(first.validation) == 1797
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert torch.equal(first.train.labels.unique(), torch.arange(10))
    assert torch.equal(first.validation.labels.unique(), torch.arange(10))
    assert first.train.pixels.max() == 255
    sums = {tuple(image.flatten().tolist()) for image in first.train.pixels[:, 0]}
    assert not any(tuple(image.flatten().tolist()) in sums for image in first.validation.pixels[:, 0])


def test_smaller_shares_are_parts_of_larger_ones() -> None:
    whole, half, tenth = (load_images(ImageSource(image_size=8, train_share=share)).train for share in (1.0, 0.5, 0.1))
    for smaller, larger, share in ((half, whole, 0.5), (tenth, half, 0.2)):
        kept = {tuple(image.flatten().tolist()) for image in larger.pixels[:, 0]}
        assert all(tuple(image.flatten().tolist()) in kept for image in smaller.pixels[:, 0])
        ratio = smaller.labels.bincount() / larger.labels.bincount()
        assert ((ratio - share).abs() < 0.02).all()


def test_files_that_are_no_images_are_named_and_refused_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path)
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "text.png").write_text("not an image")
    (folder / "red" / "short.png").write_bytes(whole[: len(whole) // 2])
    (folder / "green" / "empty.jpg").touch()
    (folder / "green" / "notes.txt").write_text("passed by")
    with pytest.raises(CorpusError, match=r"3 of 18 files in .* cannot be read") as caught:
        load_images(source_of(folder))
    assert all(name in str(caught.value) for name in ("text.png", "short.png", "empty.jpg", "on_corrupt=skip"))
    assert "\n" not in str(caught.value)
    with caplog.at_level("WARNING", logger="transmamba"):
        data = load_images(source_of(folder, on_corrupt="skip"))
    assert "text.png" in caplog.text
    assert len(data.train) + len(data.validation) == 15
    assert sorted(Path(name).name for name in data.skipped) == ["empty.jpg", "short.png", "text.png"]


def test_decoded_images_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_folder(tmp_path / "images"), tmp_path / "cache"
    (folder / "red" / "bad.png").touch()
    source = source_of(folder, cache=str(cache), on_corrupt="skip")
    exact = load_images(source)
    calls = []
    decode: Callable[..., object] = images._decode

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(images, "_decode", counted)
    again = load_images(source)
    assert not calls
    assert torch.equal(again.train.pixels, exact.train.pixels)
    assert again.skipped == exact.skipped
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(load_images(source).train.pixels, exact.train.pixels)
    assert len(calls) == 1
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "blue" / "new.png")
    assert len(load_images(source).train) == 10
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is no folder; give a folder of images"),
        (lambda folder: folder.mkdir(), "holds 0 folders; there must be one for each class"),
        (lambda folder: [(folder / name).mkdir(parents=True) for name in "ab"], "holds no image; files end in .bmp"),
        (lambda folder: write_folder(folder, 1), "the class 'blue' has 1 images; two are needed"),
    ],
    ids=["absent", "empty", "no files", "one image"],
)
def test_a_folder_without_images_is_one_line(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(CorpusError, match=message):
        load_images(source_of(tmp_path / "images"))


def test_a_folder_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    with pytest.raises(CorpusError, match="holds no file that can be read as an image, of 2"):
        load_images(source_of(tmp_path, on_corrupt="skip"))


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 0}, {"validation_share": 0.0}, {"train_share": 1.5}, {"on_corrupt": "ask"}],
    ids=str,
)
def test_settings_out_of_range_are_named(changes: dict[str, object]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(CorpusError, match=f"{name}={value!r}"):
        replace(ImageSource(), **changes)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'transmamba\[vision\]'"):
        load_images(ImageSource())
