"""What several tests share: the device, the measure of error, the data folder, scratch memory full of NaN."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def relative_rms_error(actual: Tensor, exact: Tensor) -> float:
    """Return the RMS of (actual - exact) over the RMS of exact, in fp64; shapes must be equal.

    Where exact is zero throughout, it is the RMS of actual. NaN anywhere gives NaN, which no bound lets pass.
    """
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} is compared with {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    scale = exact.square().mean().sqrt()
    error = (actual - exact).square().mean().sqrt()
    return (error / scale if scale != 0 else error).item()


def data_folder() -> Path:
    """Return the folder of development data; tests that read it are marked `data` and skipped where it is absent."""
    return Path(os.environ.get("TRANSMAMBA_DATA", ROOT.parent / "shared" / "data"))


def fill_scratch_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every torch.empty and its kin return NaN, so that memory read before it is written shows."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _filled_with_nan(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _filled_with_nan(getattr(Tensor, name)))


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
        scratch = allocate(*args, **kwargs)
        if scratch.device.type != "meta" and (scratch.is_floating_point() or scratch.is_complex()):
            with torch.no_grad():  # a leaf that requires gradients refuses to be written otherwise
                scratch.fill_(float("nan"))
        return scratch

    return allocate_nan


class Dispatched(TorchDispatchMode):
    """Counts what torch computes; views and memory without values are free."""

    FREE = frozenset(
        (
            *(
                "_reshape_alias",
                "_unsafe_view",
                "alias",
                "as_strided",
                "detach",
                "expand",
                "permute",
                "select",
                "slice",
            ),
            *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
            *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name.partition("::")[2]
        if name not in self.FREE:
            self.counts[name] += 1
        return op(*args, **(kwargs or {}))
