"""Images with classes out of Hugging Face data sets, by name, through the package datasets."""

import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict

from transmamba.errors import CorpusError

__all__ = ["StoredImage", "content_of", "file_name", "may_be_on_hub", "open_hub_images"]


class StoredImage(TypedDict):
    """A file's content, or where the file is."""

    bytes: bytes | None
    path: str | None


# Short names that people use, and where the hub keeps them now.
SHORT_NAMES = {
    "beans": "AI-Lab-Makerere/beans",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "food101": "ethz/food101",
    "mnist": "ylecun/mnist",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
VALIDATION_SPLITS = ("validation", "valid", "val", "test")


def may_be_on_hub(name: str) -> bool:
    """Whether a data set can have this name: "owner/name", "name", each with ":configuration" behind it or not."""
    return NAME.fullmatch(name) is not None and not name.startswith(".")


def open_hub_images(name: str) -> tuple[Any, Any | None, str, str, tuple[str, ...]]:
    """(the training split, that for validation or None, the column of images, that of labels, the classes).

    Items of the image column are given as they are stored, not decoded. Of several label columns, the first with the
    most classes counts: CIFAR-100's fine labels.

    Raises:
        CorpusError: datasets is missing, there is no such data set, or it has no images with classes.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{name} is no folder, and to load a Hugging Face data set of that name needs the package datasets: "
            "pip install datasets"
        ) from error
    path, _, configuration = SHORT_NAMES.get(name, name).partition(":")
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(path, configuration or None)
    # The hub's client raises what it likes where there is no network.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"{name} is no folder, and no Hugging Face data set of that name could be loaded: {reason}"
        ) from error
    if "train" not in splits:
        raise CorpusError(f"{path} has the splits {', '.join(splits)}; there must be one called train.")
    features = splits["train"].features
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not labels:
        raise CorpusError(
            f"{path} has the columns {', '.join(features)}, and none of them holds "
            f"{'classes' if images else 'images'}; give a data set of images with classes."
        )
    label = max(labels, key=lambda column: features[column].num_classes)
    held_out = next((splits[split] for split in VALIDATION_SPLITS if split in splits), None)
    if held_out is not None and set(held_out[label][:]) <= {-1}:
        held_out = None  # a test split whose labels are kept secret
    train, held_out = (
        None if split is None else split.cast_column(images[0], datasets.Image(decode=False))
        for split in (splits["train"], held_out)
    )
    return train, held_out, images[0], label, tuple(features[label].names)


def content_of(image: StoredImage) -> BytesIO | str:
    """What Pillow can open: the bytes of a file, or its path."""
    content = image["bytes"]
    return BytesIO(content) if content is not None else str(image["path"])


def file_name(file: Path | StoredImage, row: int) -> str:
    """A name for messages."""
    return str(file) if isinstance(file, Path) else f"row {row}"
