"""Every test is seeded, offline and on one thread; tests under tests/ops also find NaN in scratch memory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; the workers of `make test` share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.helpers import DEVICE, data_folder, fill_scratch_with_nan

if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is loaded: the kernels' tests run them in Python

OPS_TESTS = Path(__file__).parent / "ops"
CLI_TESTS = Path(__file__).parent / "cli"
CLI_ABSENT = find_spec("typer") is None  # a GPU machine may have torch, transformers and pytest, and no more


def pytest_report_header() -> str:
    left_out = "; tests/cli is left out, since typer is not installed" if CLI_ABSENT else ""
    return f"torch {torch.__version__} on {DEVICE}{left_out}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if CLI_ABSENT and collection_path == CLI_TESTS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with a reason that the summary prints."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if not data_folder().is_dir():
        missing["data"] = f"needs the development data; {data_folder()} is absent (set TRANSMAMBA_DATA)"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def scratch_is_nan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if OPS_TESTS in request.path.parents:
        fill_scratch_with_nan(monkeypatch)
