"""A call seen before goes to its compiled kernel, with the same arguments; any other goes through Triton."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers import DEVICE
from tests.ops.cases import ssd_inputs
from tests.ops.kernels import launches, needs_triton
from transmamba.ops import ssd_scan

pytestmark = needs_triton

GRID = (4, 1, 1)
CONSTANTS = {"FLAG": True, "L": 16, "num_warps": 4}


class Compiled:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.log.append(("compiled", grid, args))


class Kernel:
    """What launch asks of a JITFunction."""

    arg_names = ("x", "y", "size", "L", "FLAG")

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.log.append(("triton", grid, constants))
            return Compiled(self.log)

        return run


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from transmamba.ops import launching

    monkeypatch.setattr(launching, "JITFunction", Kernel)
    monkeypatch.setattr(launching, "_seen", {})
    return launching


def test_a_call_seen_before_goes_to_its_compiled_kernel(launching: Any) -> None:
    kernel, tensors = Kernel(), (torch.zeros(8), torch.ones(8))
    launching.launch(kernel, GRID, tensors, (8,), CONSTANTS)
    others = (torch.zeros(8), torch.ones(8))
    launching.launch(kernel, (9, 1, 1), others, (8,), CONSTANTS)
    assert kernel.log == [
        ("triton", GRID, CONSTANTS),
        # Constants in the order of the kernel's parameters, and no options of the compiler.
        ("compiled", (9, 1, 1), (*[x.data_ptr() for x in others], 8, 16, True)),
    ]


@pytest.mark.parametrize("change", ["dtype", "number", "constant", "alignment", "kernel"])
def test_what_triton_compiles_anew_goes_through_triton(launching: Any, change: str) -> None:
    kernel, tensors = Kernel(), (torch.zeros(8), torch.ones(8))
    launching.launch(kernel, GRID, tensors, (8,), CONSTANTS)
    number, constants, other = (1 if change == "number" else 8), dict(CONSTANTS), kernel
    if change == "dtype":
        tensors = (tensors[0], tensors[1].half())
    if change == "alignment":
        tensors = (tensors[0], torch.ones(9)[1:])
    if change == "constant":
        constants["FLAG"] = False
    if change == "kernel":
        other = Kernel()
    launching.launch(other, GRID, tensors, (number,), constants)
    assert [what for what, *_ in (kernel.log + (other.log if other is not kernel else []))] == ["triton", "triton"]


def test_signatures_do_not_pile_up(launching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_KEPT", 3)
    for number in range(10):
        launching.launch(Kernel(), GRID, (torch.zeros(8), torch.ones(8)), (number,), CONSTANTS)
    assert len(launching._seen) <= 3


def test_what_is_watched_is_not_gone_around() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from transmamba.ops.launching import goes_around_registration

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Special(torch.Tensor):
        pass

    x = torch.zeros(2)
    assert goes_around_registration(x, None, torch.nn.Parameter(x))
    assert not goes_around_registration(x, x.as_subclass(Special))
    with Watching():
        assert not goes_around_registration(x)
    seen: list[bool] = []
    torch.func.grad(lambda y: (seen.append(goes_around_registration(y)), y.sum())[1])(x)
    assert seen == [False]


@pytest.mark.gpu
def test_the_first_call_and_the_others_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmamba.ops import launching

    inputs = ssd_inputs((2, 2, 2, 2), seq_len=300, state_size=64, head_dim=64, dtype=torch.bfloat16, device=DEVICE)
    inputs |= {name: inputs[name].float() for name in ("dt", "A", "D", "initial_state")}
    monkeypatch.setattr(launching, "_seen", {})
    first = ssd_scan(**inputs, backend="triton", return_final_state=True)
    kept = len(launching._seen)
    again = ssd_scan(**inputs, backend="triton", return_final_state=True)
    assert kept == len(launching._seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # dt and D off by four bytes: another compiled kernel, the same numbers.
    shifted = {
        name: torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape)
        for name, x in inputs.items()
        if name in ("dt", "D")
    }
    for name, x in shifted.items():
        x.copy_(inputs[name])
    off = ssd_scan(**(inputs | shifted), backend="triton", return_final_state=True)
    assert all(torch.equal(a, b) for a, b in zip(first, off, strict=True))
    assert launches().INTERPRETED is False
