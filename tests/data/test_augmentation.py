"""Augmentation changes what it says, labels follow the pixels, and a seed repeats it."""

import sys

import pytest
import torch
from torch import Tensor

from tests.helpers import Dispatched
from transmamba.data import Augmentation, as_floats, augment, augmentation
from transmamba.errors import CorpusError


def batch(images: int = 64, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(5, (images,), generator=generator)


def test_nothing_is_done_unless_asked_for() -> None:
    pixels, labels = batch()
    x, same = augment(pixels, labels, 5, Augmentation())
    assert torch.equal(x, pixels.float() / 255)
    assert same is labels


def test_half_of_the_images_are_mirrored() -> None:
    pixels, labels = batch(400)
    x, _ = augment(pixels, labels, 5, Augmentation(flip=True))
    exact = as_floats(pixels)
    mirrored = (x == exact.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(x == exact).flatten(1).all(1))
    assert 150 < int(mirrored.sum()) < 250  # 200, give or take five standard deviations of 10


def test_each_image_is_moved_by_its_own_pixels() -> None:
    pixels, labels = batch(200)
    x, _ = augment(pixels, labels, 5, Augmentation(crop_padding=2))
    padded = torch.nn.functional.pad(as_floats(pixels), (2, 2, 2, 2))
    found = set()
    for row in range(200):
        moves = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(x[row], padded[row, :, down : down + 9, right : right + 9])
        ]
        assert len(moves) == 1
        found.add(moves[0])
    assert len(found) == 25  # 200 draws miss one of 25 with a chance of 0.7 %; the seed is fixed


def test_erased_rectangles_are_noise_and_the_rest_is_kept() -> None:
    pixels, labels = batch(300, 16)
    x, _ = augment(pixels, labels, 5, Augmentation(erase=0.5))
    changed = x != as_floats(pixels)
    erased = changed.flatten(1).any(1)
    assert 110 < int(erased.sum()) < 190  # 150, give or take 4.6 standard deviations of 8.7
    for mask in changed[erased].any(1):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    assert changed.float().mean() < 0.25


@pytest.mark.parametrize("how", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_labels_follow_the_pixels(how: dict[str, float]) -> None:
    """Every image has one value, a fifth of its class, so that the mean pixel says what the label must be."""
    labels = torch.arange(5).repeat(6)
    x = (labels / 5)[:, None, None, None].expand(-1, 3, 16, 16)
    seen = []
    for _ in range(20):
        mixed, target = augment(x, labels, 5, Augmentation(**how))
        assert torch.allclose(target.sum(1), torch.ones(30))
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ (torch.arange(5) / 5), atol=1e-5)
        seen.append(target.max(1).values[0].item())
    assert min(seen) < 0.9


def test_mixing_takes_one_of_two_by_chance() -> None:
    labels = torch.tensor([0, 1])
    x = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    cuts = 0
    for _ in range(60):
        mixed, _ = augment(x, labels, 2, Augmentation(mixup=1.0, cutmix=1.0))
        cuts += int(bool(((mixed == 0) | (mixed == 1)).all()))
    assert 12 < cuts < 48  # 30, give or take 4.6 standard deviations


def test_labels_are_smoothed() -> None:
    _, target = augment(*batch(), 5, Augmentation(label_smoothing=0.1))
    assert torch.allclose(target.max(1).values, torch.tensor(0.92))
    assert torch.allclose(target.min(1).values, torch.tensor(0.02))


def test_a_seed_repeats_it() -> None:
    how = Augmentation(crop_padding=2, flip=True, erase=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(augment(*batch(), 5, how))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


def test_rand_augment_is_kornias() -> None:
    pytest.importorskip("kornia", reason="kornia is in the extra vision")
    pixels, labels = batch(8, 16)
    x, same = augment(pixels, labels, 5, Augmentation(rand_augment=2))
    assert x.shape == pixels.shape
    assert 0 <= x.min() <= x.max() <= 1
    assert not torch.equal(x, as_floats(pixels))
    assert same is labels


def test_without_kornia_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(CorpusError, match=r"rand_augment needs kornia: pip install 'transmamba\[vision\]'"):
        augment(*batch(), 5, Augmentation(rand_augment=2))


@pytest.mark.parametrize(
    "changes",
    [{"crop_padding": -1}, {"erase": 1.5}, {"label_smoothing": 1.0}, {"mixup": -0.1}, {"rand_magnitude": 31.0}],
    ids=str,
)
def test_settings_out_of_range_are_named(changes: dict[str, float]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(CorpusError, match=f"{name}={value}"):
        Augmentation(**changes)


def test_erasing_draws_what_tensors_of_its_bounds_would() -> None:
    """The same bits as with logarithms on the device, which would be sent there at every batch."""
    low, high = (torch.tensor(ratio).log() for ratio in augmentation.ERASED_RATIO)
    draw = torch.rand(1000)
    smallest, span = augmentation._log_ratios()
    assert torch.equal(smallest + draw * span, low + draw * (high - low))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_batch_costs_the_same_ops_however_large_it_is(mix: str) -> None:
    how = Augmentation(crop_padding=2, flip=True, erase=0.5, label_smoothing=0.1, **{mix: 0.8})
    counts = []
    for images in (8, 64):
        with Dispatched() as mode:
            augment(*batch(images), 5, how)
        counts.append(sum(mode.counts.values()))
        assert mode.counts["_to_copy"] <= 3  # pixels, labels and the mask of a cut
    assert counts[0] == counts[1]
