"""Hugging Face image data sets by name, from a stand-in for the hub: no test reaches a network."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transmamba.data import ImageSource, load_images
from transmamba.errors import CorpusError

datasets = pytest.importorskip("datasets")


def picture(level: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 4, 3), level, dtype=np.uint8)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def split_of(labels: list[int], *, images: list[dict[str, Any]] | None = None) -> Any:
    """Images whose level is ten times their fine label."""
    features = datasets.Features(
        img=datasets.Image(),
        coarse_label=datasets.ClassLabel(names=["warm", "cold"]),
        fine_label=datasets.ClassLabel(names=["apple", "bear", "chair"]),
    )
    pictures = images or [picture(10 * max(0, label)) for label in labels]
    return datasets.Dataset.from_dict(
        {"img": pictures, "coarse_label": [0] * len(labels), "fine_label": labels}, features=features
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Call it with splits to make them the answer; it returns the list of what was asked for."""

    def answer(**splits: Any) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
        return asked

    return answer


def test_a_data_set_by_its_short_name(hub: Callable[..., list[tuple[Any, ...]]]) -> None:
    asked = hub(train=split_of([0, 1, 2, 2]), test=split_of([2, 0]))
    data = load_images(ImageSource(source="cifar100", image_size=4))
    assert asked == [("uoft-cs/cifar100", None)]
    assert data.classes == ("apple", "bear", "chair")  # not the two coarse ones
    assert data.train.labels.tolist() == [0, 1, 2, 2]
    assert data.train.pixels.shape == (4, 3, 4, 4)
    assert data.train.pixels[:, 0, 0, 0].tolist() == [0, 10, 20, 20]
    assert data.validation.labels.tolist() == [2, 0]
    assert data.validation.pixels[:, 2, 3, 3].tolist() == [20, 0]


def test_configurations_and_splits(hub: Callable[..., list[tuple[Any, ...]]]) -> None:
    asked = hub(train=split_of([0, 1, 2] * 5))
    data = load_images(ImageSource(source="some/thing:small", image_size=4, validation_share=0.2))
    assert asked == [("some/thing", "small")]
    assert (len(data.train), len(data.validation)) == (12, 3)  # cut off the training images
    hub(train=split_of([0, 1, 2] * 5), test=split_of([-1, -1]))
    assert len(load_images(ImageSource(source="some/thing", image_size=4)).validation) == 3  # labels kept secret


def test_files_that_are_none_are_named_or_skipped(hub: Callable[..., list[tuple[Any, ...]]]) -> None:
    broken = [picture(0), {"bytes": b"no image", "path": None}, picture(20)]
    hub(train=split_of([0, 1, 2], images=broken), test=split_of([0]))
    with pytest.raises(CorpusError, match=r"1 of 3 files in a/b, train cannot be read as images: row 1;"):
        load_images(ImageSource(source="a/b", image_size=4))
    data = load_images(ImageSource(source="a/b", image_size=4, on_corrupt="skip"))
    assert data.train.labels.tolist() == [0, 2]
    assert data.skipped == ("row 1",)


def test_what_is_no_data_set_of_images_is_one_line(
    hub: Callable[..., list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(test=split_of([0]))
    with pytest.raises(CorpusError, match="a/b has the splits test; there must be one called train"):
        load_images(ImageSource(source="a/b"))
    hub(train=datasets.Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(CorpusError, match="a/b has the columns text, and none of them holds images"):
        load_images(ImageSource(source="a/b"))

    def unreachable(*_: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"^a/b is no folder, and no Hugging Face data set of that name could be"):
        load_images(ImageSource(source="a/b"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"needs the package datasets: pip install datasets$"):
        load_images(ImageSource(source="cifar100"))
    with pytest.raises(CorpusError, match=r"not/a/name is no folder; give a folder of images"):
        load_images(ImageSource(source="not/a/name"))
