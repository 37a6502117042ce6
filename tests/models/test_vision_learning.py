"""Every vision backbone learns: stripes that rise from stripes that fall, which no single row or column tells apart."""

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE
from tests.models.vision_models import SMALL, tiny_vision_model

STEPS, BATCH = 60, 24


def stripes(batch: int, generator: torch.Generator, *, frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Diagonal waves of any phase, length and noise, and whether they rise."""
    rises = torch.randint(0, 2, (batch,), generator=generator)
    phase = torch.rand(batch, 1, 1, generator=generator) * 2 * torch.pi
    rate = 0.6 + 0.3 * torch.rand(batch, 1, 1, generator=generator)
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    sign = (2 * rises - 1).view(-1, 1, 1)
    wave = torch.sin(rate * (column + sign * row) + phase)
    images = wave.unsqueeze(1).expand(-1, 3, -1, -1) + 0.3 * torch.randn(batch, 3, 16, 16, generator=generator)
    if frames is not None:
        images = images.unsqueeze(1).expand(-1, frames, -1, -1, -1)
    return images.to(DEVICE), rises.to(DEVICE)


@pytest.mark.parametrize("family", SMALL)
def test_rising_stripes_are_told_from_falling_ones(family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    depth = {"depths": [1, 1]} if family == "vmamba" else {"num_hidden_layers": 2}
    model = tiny_vision_model(family, image_size=16, num_labels=2, patch_size=4, **depth).train()
    frames = 4 if "videos" in family else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        x, y = stripes(BATCH, generator, frames=frames)
        loss = model(x, labels=y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = stripes(200, generator, frames=frames)
    with torch.no_grad():
        right = (model.eval()(x).logits.argmax(-1) == y).float().mean().item()
    assert right > 0.9  # of guesses: 0.5, give or take 0.035
