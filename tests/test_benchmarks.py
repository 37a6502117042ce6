"""The scripts of benchmarks/ find what they import, though most of them are run once in a while."""

import runpy
from pathlib import Path

import pytest

from tests.helpers import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*/bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(monkeypatch: pytest.MonkeyPatch, script: Path) -> None:
    monkeypatch.syspath_prepend(script.parent)
    try:
        runpy.run_path(str(script))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("transmamba", "bench_")):
            raise
        pytest.skip(f"needs {error.name}")
