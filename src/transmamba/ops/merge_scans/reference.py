"""The specification of merge_scans and begin_scans: one direction after the other."""

import torch
from torch import Tensor


def merge_scans_reference(y: Tensor, places: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (merged, y); see merge_scans."""
    merged = torch.zeros_like(y[0]) if len(y) else y.new_zeros(y.shape[1:])
    for direction, steps in zip(y, places, strict=True):
        merged = merged + direction[:, steps]
    if gate is not None:
        merged = merged * gate / (1 + torch.exp(-gate))
    return merged, y


def begin_scans_reference(x: Tensor, places: Tensor, in_order: bool) -> Tensor:
    """Return u; see begin_scans."""
    return torch.stack([x[:, torch.argsort(steps)] if in_order else x for steps in places])
