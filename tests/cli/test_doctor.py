"""transmamba doctor: it names what is here, and an op that computes wrongly makes it fail."""

from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement

from transmamba.cli import doctor as room
from transmamba.cli.doctor import EXTRAS, OpCheck, Package, check_ops, installed_packages
from transmamba.cli.main import main
from transmamba.ops import explain

CPU = torch.device("cpu")
INSTALLED = bool(list(metadata.Distribution.discover(name="transmamba")))
needs_installation = pytest.mark.skipif(not INSTALLED, reason="transmamba runs from its source folder, not installed")


def test_every_op_is_checked_and_right_here() -> None:
    checks = check_ops(CPU)
    assert [check.op for check in checks] == [choice.op for choice in explain("cpu")]
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("op", [choice.op for choice in explain("cpu")])
def test_a_wrong_op_is_caught(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    right = getattr(room, op)

    def wrong(*args, backend=None, **kwargs):
        result = right(*args, backend=backend, **kwargs)
        if backend == "reference":
            return result
        return (result[0], 1.001 * result[1]) if isinstance(result, tuple) else 1.001 * result

    monkeypatch.setattr(room, op, wrong)
    assert [check.op for check in check_ops(CPU) if not check.passed] == [op]


def test_wrong_gradients_alone_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = room.memory_converter

    def four_fifths(k, *args, backend=None, **kwargs):
        # The same values; backward sees 0.8 k.
        return right(k if backend else k + 0.2 * (k.detach() - k), *args, backend=backend, **kwargs)

    monkeypatch.setattr(room, "memory_converter", four_fifths)
    (check,) = (check for check in check_ops(CPU) if check.op == "memory_converter")
    assert check.values <= check.bound < check.gradients
    assert not check.passed


def test_an_op_that_cannot_run_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel [image] for this device")

    monkeypatch.setattr(room, "ssd_scan", broken)
    (check,) = (check for check in check_ops(CPU) if check.op == "ssd_scan")
    assert check.failure == "no kernel [image] for this device"
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "Not healthy: ssd_scan on cpu" in " ".join(capsys.readouterr().out.split())


def test_nan_does_not_pass() -> None:
    assert not OpCheck(op="x", values=float("nan"), gradients=0.0, bound=1.0).passed


def test_a_healthy_machine_is_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for word in ("Versions", "Devices", "Backends on cpu", "torch", "transformers", "Healthy"):
        assert word in out


@pytest.mark.parametrize(("kept", "words"), [(True, "TRANSMAMBA_KEEP_MEMORY=0"), (False, "is given back to the")])
def test_it_says_what_becomes_of_freed_memory(monkeypatch: pytest.MonkeyPatch, kept: bool, words: str) -> None:
    monkeypatch.setattr(room, "is_kept", lambda: kept)
    assert any(words in text for _, text in room._device_rows())


@needs_installation
def test_packages_are_those_of_pyproject() -> None:
    packages = installed_packages()
    core = {package.name for package in packages if not package.extra}
    assert {"torch", "transformers", "typer"} <= core
    extras = {package.extra for package in packages if package.extra}
    assert extras <= set(EXTRAS)
    assert set(metadata.metadata("transmamba").get_all("Provides-Extra")) == {*EXTRAS, "dev"}


@needs_installation
def test_what_each_extra_is_for_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    shown = [package.name for package in installed_packages() if package.extra]
    assert shown
    assert all(name in out for name in shown)


def test_from_a_source_folder_the_versions_are_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(room.metadata, "requires", absent)
    assert [(package.name, package.satisfied) for package in installed_packages()] == [
        ("torch", True),
        ("transformers", True),
    ]


@pytest.mark.parametrize(
    ("installed", "satisfied"), [("5.17.0", True), ("5.18.0.dev0", True), ("5.16.2", False), ("6.0.0", False)]
)
def test_a_version_out_of_range_is_not_satisfied(monkeypatch: pytest.MonkeyPatch, installed, satisfied) -> None:
    monkeypatch.setattr(room.metadata, "version", lambda name: installed)
    package = room._package(Requirement("transformers>=5.17,<6"), "")
    assert package.satisfied is satisfied


def test_an_absent_requirement_is_code_1(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    absent = Package(name="accelerate", installed=None, needed=">=1.10", extra="", satisfied=False)
    monkeypatch.setattr(room, "installed_packages", lambda: [absent])
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "Not healthy: accelerate >=1.10" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "device 'cuda' is not available" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_op_is_right_on_the_gpu() -> None:
    assert all(check.passed for check in check_ops(torch.device("cuda")))
