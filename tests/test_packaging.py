"""What a fresh machine installs: exact pins within the promised ranges, no compiler, one version."""

import re
import tomllib

from packaging.requirements import Requirement

from tests.helpers import ROOT
from transmamba._version import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n") if line]


def test_every_pin_is_exact_and_without_local_version() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", str(pin)) for pin in PINS)


def test_every_requirement_of_core_and_tests_is_pinned_within_its_range() -> None:
    pinned = {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in PINS}
    extras = PROJECT["optional-dependencies"]
    tested = [line for name in ("dev", "eval", "peft", "tensorboard", "text") for line in extras[name]]
    for line in [*PROJECT["dependencies"], *tested]:
        requirement = Requirement(line)
        if requirement.name != "transmamba":
            assert requirement.specifier.contains(pinned[requirement.name]), line


def test_core_needs_no_cuda_package_and_no_torchvision() -> None:
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {
        "accelerate",
        "datasets",
        "matplotlib",
        "pillow",
        "rich",
        "safetensors",
        "torch",
        "transformers",
        "typer",
    }


def test_the_version_is_written_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "\nversion:" not in citation
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
