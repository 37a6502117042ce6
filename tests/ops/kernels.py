"""The Triton kernels under test: on a GPU as they are compiled, elsewhere in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Inputs, fp32_bound, rounding
from tests.ops.oracle import oracle_scan

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton (pip install 'transmamba[triton]')")


def launches() -> Any:
    """The module that launches kernels; it imports triton, which may be absent where tests are collected."""
    return import_module("transmamba.ops.ssd_scan.launches")


@contextmanager
def tuned(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[None]:
    """Launch with another configuration; `block` is that of every kernel."""
    module = launches()
    tuning_of = module.tuning_of
    block = changes.pop("block", None)

    def changed(*sizes: Any) -> Any:
        tuning = tuning_of(*sizes)
        names = ("states", "forward", "gradients", "sweeps") if block else ()
        return replace(tuning, **{name: replace(getattr(tuning, name), block=block) for name in names})

    with monkeypatch.context() as patch:
        patch.setattr(module, "tuning_of", changed)
        with module.configured(**changes):
            yield


def gradient_names(inputs: Inputs) -> list[str]:
    return [name for name, x in inputs.items() if x is not None]


def scan_bound(inputs: Inputs, dtype: torch.dtype, roundings: int) -> float:
    """The bound of fp32, and for 16 bits `roundings` independent ones on each term: sqrt(roundings) u."""
    exact = 4 * fp32_bound(inputs)
    return exact if dtype == torch.float32 else rounding(dtype) * roundings**0.5 + exact


def rate_error(actual: Tensor, inputs: Inputs, exact: Callable[..., Any] = oracle_scan, **options: Any) -> float:
    """The error of A's gradient over the sum of what single tokens contribute, without their signs.

    Contributions of both signs cancel in A's gradient, so that its relative error has no bound of its own.
    """
    from tests.ops.cases import gradients

    spread = {name: None if x is None else x.detach().double() for name, x in inputs.items()}
    spread["A"] = spread["A"].expand(spread["dt"].shape).clone()
    names = gradient_names(inputs)
    each = gradients(exact, spread, **options)[names.index("A")]
    difference = actual.double() - each.sum((0, 1))
    return (difference.abs() / each.abs().sum((0, 1)).clamp_min(1e-300)).max().item()
