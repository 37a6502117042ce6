"""Images with classes, of folders, Hugging Face data sets or scikit-learn, decoded once, as uint8 tensors in memory."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from transmamba.data.hub_images import StoredImage, content_of, file_name, may_be_on_hub, open_hub_images
from transmamba.errors import CorpusError
from transmamba.progress import progress_bar

__all__ = ["ImageData", "ImageDataset", "ImageSource", "load_images", "share_of_images"]

logger = logging.getLogger(__name__)

DIGITS = "builtin:digits"
DEFAULT_SIZE = 32
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
ON_CORRUPT = ("refuse", "skip")
NAMED = 3  # files that a message names before it counts the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Where images come from, and which are kept for validation.

    source: "builtin:digits" (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels), or a folder: a folder for each
        class, or train/ and one of val/, valid/, validation/, test/ with a folder for each class; or the name of a
        Hugging Face data set, "cifar100", "owner/name" or "owner/name:configuration".
    image_size: pixels of a side; None = DEFAULT_SIZE, or in an adaptation the teacher's. Images are scaled until the
        shorter side fits, then cut to the middle.
    validation_share: of each class, where there is no folder for validation.
    train_share: of each class's training images, so much is used.
    on_corrupt: files that cannot be read are named and "refuse" ends there, "skip" goes on without them.
    cache: a folder in which decoded images of folders are kept; "" = nowhere.
    """

    source: str = DIGITS
    image_size: int | None = None
    validation_share: float = 0.2
    train_share: float = 1.0
    on_corrupt: str = "refuse"
    cache: str = ""

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return DEFAULT_SIZE if self.image_size is None else self.image_size

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise CorpusError(f"image_size={self.image_size} must be at least 1.")
        if not 0 < self.validation_share < 1:
            raise CorpusError(f"validation_share={self.validation_share} must be above 0 and below 1.")
        if not 0 < self.train_share <= 1:
            raise CorpusError(f"train_share={self.train_share} must be above 0 and at most 1.")
        if self.on_corrupt not in ON_CORRUPT:
            raise CorpusError(f"on_corrupt={self.on_corrupt!r} is unknown; choose one of {', '.join(ON_CORRUPT)}.")


class ImageDataset(Dataset[dict[str, Tensor]]):
    """pixels (images, 3, height, width), uint8, and labels (images,), int64. An item is one of each."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        assert len(pixels) == len(labels)
        self.pixels = pixels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch at once, as torch's loaders ask for it: two kernels on a GPU, and not two an image."""
        rows = torch.tensor(indices)
        if self.labels.device.type == "cuda":  # from pinned memory, so that the CPU does not wait for the queue
            rows = rows.pin_memory().to(self.labels.device, non_blocking=True)
        return {"pixel_values": self.pixels[rows], "labels": self.labels[rows]}

    @property
    def num_bytes(self) -> int:
        """Of the pixels."""
        return self.pixels.numel()

    def to(self, device: torch.device) -> "ImageDataset":
        """The same images on another device."""
        return ImageDataset(self.pixels.to(device), self.labels.to(device))

    def rows(self, indices: Tensor) -> "ImageDataset":
        """The images of these indices."""
        return ImageDataset(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """The images to train on and to validate on. skipped: files that could not be read."""

    train: ImageDataset
    validation: ImageDataset
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "ImageData":
        """The same images on another device."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))


def share_of_images(data: ImageDataset, share: float) -> ImageDataset:
    """The same share of each class, at least one image; smaller shares are parts of larger ones."""
    if share == 1:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    kept = []
    for number in data.labels.unique().tolist():
        of_class = order[data.labels[order] == number]
        kept.append(of_class[: max(1, math.floor(share * len(of_class)))])
    return data.rows(torch.cat(kept))


def load_images(source: ImageSource) -> ImageData:
    """Read a source and split it: the same images on the same sides every time.

    Raises:
        CorpusError: the source is missing, empty, or holds files that cannot be read.
    """
    if source.source == DIGITS:
        pixels, labels, classes = _digits(source.side)
        whole = ImageDataset(pixels, labels)
        return _split(whole, classes, source, ())
    folder = Path(source.source)
    if not folder.is_dir():
        if may_be_on_hub(source.source) and not folder.exists():
            return _from_hub(source)
        raise CorpusError(
            f"{folder} is no folder; give a folder of images, a folder for each class, the name of a Hugging Face data "
            f"set, or {DIGITS!r}."
        )
    held_out = next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        classes = _classes(folder / "train")
        others = sorted(set(_classes(held_out)) - set(classes))
        if others:
            raise CorpusError(f"{held_out} has the class {others[0]!r}, which {folder / 'train'} lacks.")
        train, skipped = _read_folder(folder / "train", classes, source)
        validation, more = _read_folder(held_out, classes, source)
        return ImageData(
            train=share_of_images(train, source.train_share),
            validation=validation,
            classes=classes,
            skipped=(*skipped, *more),
        )
    classes = _classes(folder)
    whole, skipped = _read_folder(folder, classes, source)
    return _split(whole, classes, source, skipped)


def _from_hub(source: ImageSource) -> ImageData:
    name = source.source
    train, held_out, image, label, classes = open_hub_images(name)
    whole, skipped = _read_files(train[image], torch.tensor(train[label][:]), source, f"{name}, train")
    if held_out is None:
        return _split(whole, classes, source, skipped)
    validation, more = _read_files(held_out[image], torch.tensor(held_out[label][:]), source, f"{name}, validation")
    return ImageData(
        train=share_of_images(whole, source.train_share),
        validation=validation,
        classes=classes,
        skipped=(*skipped, *more),
    )


def _split(whole: ImageDataset, classes: Sequence[str], source: ImageSource, skipped: tuple[str, ...]) -> ImageData:
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held_out, kept = [], []
    for number, name in enumerate(classes):
        of_class = order[whole.labels[order] == number]
        if len(of_class) < 2:
            raise CorpusError(f"the class {name!r} has {len(of_class)} images; two are needed to train and validate.")
        count = min(len(of_class) - 1, max(1, round(source.validation_share * len(of_class))))
        held_out.append(of_class[:count])
        kept.append(of_class[count:])
    return ImageData(
        train=share_of_images(whole.rows(torch.cat(kept)), source.train_share),
        validation=whole.rows(torch.cat(held_out)),
        classes=tuple(classes),
        skipped=skipped,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(found) < 2:
        raise CorpusError(
            f"{folder} holds {len(found)} folders; there must be one for each class, and at least two classes."
        )
    return found


def _read_folder(folder: Path, classes: Sequence[str], source: ImageSource) -> tuple[ImageDataset, tuple[str, ...]]:
    files = [
        (path, number)
        for number, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not files:
        raise CorpusError(f"{folder} holds no image; files end in {', '.join(SUFFIXES)}.")
    cached = Path(source.cache) / f"{_fingerprint(files, source.side)}.safetensors" if source.cache else None
    labels = torch.tensor([number for _, number in files])
    return _read_files([path for path, _ in files], labels, source, str(folder), cached)


def _read_files(
    files: Sequence[Path | StoredImage], labels: Tensor, source: ImageSource, folder: str, cached: Path | None = None
) -> tuple[ImageDataset, tuple[str, ...]]:
    found = None if cached is None else _read_cache(cached)
    if found is None:
        found = _decode(files, source.side)
        if cached is not None:
            _write_cache(cached, *found)
    pixels, readable = found
    bad = tuple(
        file_name(file, row) for row, (file, good) in enumerate(zip(files, readable.tolist(), strict=True)) if not good
    )
    if bad:
        listed = ", ".join(bad[:NAMED]) + (f" and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        if source.on_corrupt == "refuse":
            raise CorpusError(
                f"{len(bad)} of {len(files)} files in {folder} cannot be read as images: {listed}; mend or remove "
                "them, or set on_corrupt=skip."
            )
        logger.warning("%d of %d files in %s are no images and are skipped: %s", len(bad), len(files), folder, listed)
    if not bool(readable.any()):
        raise CorpusError(f"{folder} holds no file that can be read as an image, of {len(files)}.")
    return ImageDataset(pixels[readable], labels[readable]), bad


def _decode(files: Sequence[Path | StoredImage], size: int) -> tuple[Tensor, Tensor]:
    """(files, 3, size, size), uint8, zeros where a file cannot be read; and which can."""
    pixels = torch.zeros(len(files), 3, size, size, dtype=torch.uint8)
    readable = torch.ones(len(files), dtype=torch.bool)
    with progress_bar("Reading images", total=len(files)) as advance:
        for row, file in enumerate(files):
            try:
                with Image.open(file if isinstance(file, Path) else content_of(file)) as image:
                    pixels[row] = _fitted(image.convert("RGB"), size)
            except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
                readable[row] = False
            advance(1)
    return pixels, readable


def _fitted(image: Image.Image, size: int) -> Tensor:
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    box = (left, top, left + short, top + short)
    scaled = image.resize((size, size), Image.Resampling.BICUBIC, box=box) if short != size else image.crop(box)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def _fingerprint(files: Sequence[tuple[Path, int]], size: int) -> str:
    digest = hashlib.sha256(f"{size}".encode())
    for path, _ in files:
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _read_cache(path: Path) -> tuple[Tensor, Tensor] | None:
    if not path.is_file():
        return None
    try:
        content = load_file(path)
        return content["pixels"], content["readable"]
    except (SafetensorError, OSError, KeyError):
        logger.warning("%s is damaged and is made again", path)
        return None


def _write_cache(path: Path, pixels: Tensor, readable: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({"pixels": pixels, "readable": readable}, partial)
    partial.replace(path)


def _digits(size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CorpusError(f"{DIGITS} needs scikit-learn: pip install 'transmamba[vision]'") from error
    digits = load_digits()
    grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    scaled = torch.nn.functional.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
    pixels = scaled.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return pixels, torch.tensor(digits.target, dtype=torch.int64), tuple(str(name) for name in digits.target_names)
