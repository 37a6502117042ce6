"""Augmentation of a whole batch at a time, on its device, by torch's own random numbers, so that seeds repeat it."""

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from transmamba.errors import CorpusError

__all__ = ["Augmentation", "as_floats", "augment"]

ERASED_AREA = (0.02, 1 / 3)  # of an image, as in Zhong et al. 2017 (arXiv 1708.04896)
ERASED_RATIO = (0.3, 1 / 0.3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What is done to a batch of training images, in this order; all off by default.

    rand_augment: how many operations of kornia's RandAugment (the extra vision), at rand_magnitude of 0 to 30.
    crop_padding: pixels of zeros on each side, of which the image is then cut anew, at random.
    flip: mirror half of the images.
    erase: share of images in which a rectangle is filled with noise.
    mixup, cutmix: parameters of the Beta distributions of the shares with which pairs are mixed; where both are given,
        each batch takes one of them by chance. label_smoothing: of the labels.
    """

    rand_augment: int = 0
    rand_magnitude: float = 9.0
    crop_padding: int = 0
    flip: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise CorpusError(f"{field.name}={getattr(self, field.name)} must be at least 0.")
        if self.erase > 1:
            raise CorpusError(f"erase={self.erase} is a share of the images and must be at most 1.")
        if self.label_smoothing >= 1:
            raise CorpusError(f"label_smoothing={self.label_smoothing} must be below 1; 0.1 is usual.")
        if self.rand_magnitude > 30:
            raise CorpusError(f"rand_magnitude={self.rand_magnitude} must be at most 30.")


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 pixels between 0 and 1, fp32."""
    return pixels.float() / 255


def augment(pixels: Tensor, labels: Tensor, classes: int, how: Augmentation) -> tuple[Tensor, Tensor]:
    """(images, 3, height, width) between 0 and 1, and labels as probabilities (images, classes); or as they came,
    class numbers, where nothing changes them.

    pixels: uint8, or between 0 and 1.
    """
    x = as_floats(pixels) if pixels.dtype == torch.uint8 else pixels
    if how.rand_augment:
        x = _rand_augment(x, how)
    if how.crop_padding:
        x = _crop(x, how.crop_padding)
    if how.flip:
        mirrored = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if how.erase:
        x = _erase(x, how.erase)
    if not (how.mixup or how.cutmix or how.label_smoothing):
        return x, labels
    target = one_hot(labels, classes).float()
    target = target * (1 - how.label_smoothing) + how.label_smoothing / classes
    return _mix(x, target, how)


def _crop(x: Tensor, padding: int) -> Tensor:
    """Each image moved by its own number of pixels, zeros where it leaves."""
    batch, _, height, width = x.shape
    padded = pad(x, (padding,) * 4)
    down, right = torch.randint(2 * padding + 1, (2, batch), device=x.device)
    rows = (down[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    which = torch.arange(batch, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[which, channels, rows, columns]


def _erase(x: Tensor, share: float) -> Tensor:
    batch, _, height, width = x.shape
    draw = torch.rand(5, batch, device=x.device)
    area = ERASED_AREA[0] + draw[0] * (ERASED_AREA[1] - ERASED_AREA[0])
    low, span = _log_ratios()
    ratio = torch.exp(low + draw[1] * span)
    tall, wide = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    inside = _box(draw[2] * (1 - tall), tall, height, 1) & _box(draw[3] * (1 - wide), wide, width, 0)
    chosen = (draw[4] < share)[:, None, None, None]
    return torch.where(inside & chosen, torch.rand_like(x), x)


@lru_cache(maxsize=1)
def _log_ratios() -> tuple[float, float]:
    """The smallest logarithm of ERASED_RATIO and their difference, in fp32.

    Numbers, since sending a tensor of them to a GPU waits for all that is queued there.
    """
    low, high = torch.tensor(ERASED_RATIO).log()
    return float(low), float(high - low)


def _box(start: Tensor, length: Tensor, size: int, dim: int) -> Tensor:
    """Which of `size` rows (dim 1) or columns (dim 0) lie in a stretch given as shares of the side, to be broadcast."""
    place = (torch.arange(size, device=start.device) + 0.5) / size
    inside = (place >= start[:, None]) & (place < (start + length)[:, None])
    return inside[:, None, :, None] if dim else inside[:, None, None, :]


def _mix(x: Tensor, target: Tensor, how: Augmentation) -> tuple[Tensor, Tensor]:
    """Pairs of the batch: each image with the one at the other end."""
    cuts = how.cutmix > 0 and (how.mixup == 0 or bool(torch.rand(()) < 0.5))
    parameter = how.cutmix if cuts else how.mixup
    if not parameter:
        return x, target
    share = float(torch.distributions.Beta(parameter, parameter).sample())
    if not cuts:
        return share * x + (1 - share) * x.flip(0), share * target + (1 - share) * target.flip(0)
    side = (1 - share) ** 0.5
    top, left = torch.rand(2).tolist()
    height, width = x.shape[-2:]
    start = torch.tensor([top * (1 - side), left * (1 - side)])
    length = torch.full((1,), side)
    inside = _box(start[:1], length, height, 1) & _box(start[1:], length, width, 0)  # on the CPU: its size is read
    kept = 1 - float(inside.float().mean())  # of whole pixels, which the labels follow
    return torch.where(inside.to(x.device, non_blocking=True), x.flip(0), x), kept * target + (1 - kept) * target.flip(
        0
    )


def _rand_augment(x: Tensor, how: Augmentation) -> Tensor:
    try:
        from kornia.augmentation.auto import RandAugment
    except ImportError as error:
        raise CorpusError("rand_augment needs kornia: pip install 'transmamba[vision]'") from error
    return RandAugment(n=how.rand_augment, m=int(how.rand_magnitude))(x).clamp(0, 1)
