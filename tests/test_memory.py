"""Freed memory is kept where glibc is asked to, measured in page faults; elsewhere nothing happens."""

import os
import platform
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from transmamba import memory

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

# Blocks of 16 MiB, 4,096 pages, written and freed again and again: too large for glibc to keep by itself at first, and
# the block that is freed last lies at the heap's end.
PROGRAM = """
import resource, sys
from transmamba.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    blocks = [bytes(2**24) + b"." for _ in range(8)]

use()
before = faults()
for _ in range(4):
    use()
print(faults() - before)
"""


def run(word: str, **environment: str) -> tuple[str, int]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("bytes(2**24)", "bytearray(2**24)"), word],
        env=inherited | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, faults = done.stdout.split()
    return answer, int(faults)


@pytest.mark.skipif(not GLIBC, reason="only glibc has the settings")
def test_what_was_freed_is_used_again() -> None:
    _, usual = run("leave")
    answer, kept = run("keep")
    assert answer == "True"
    assert usual > 100 * max(kept, 10)


@pytest.mark.skipif(not GLIBC, reason="only glibc has the settings")
def test_the_environment_switches_it_off() -> None:
    answer, faults = run("keep", TRANSMAMBA_KEEP_MEMORY="0")
    assert answer == "False"
    assert faults > 1000


@pytest.mark.parametrize("platform_name", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, platform_name: str) -> None:
    monkeypatch.setattr(memory.sys, "platform", platform_name)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda *_: pytest.fail("loaded a library"))
    assert memory.keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def mallopt(self, *arguments: int) -> int:
            pytest.fail("set")

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda *_: Musl())
    assert memory.keep_freed_memory() is False


@pytest.mark.parametrize("refused", [-4, -1])
def test_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    monkeypatch.setattr(memory, "_find_mallopt", lambda: lambda name, value: int(name != refused))
    monkeypatch.delenv(memory.SWITCH, raising=False)
    assert memory.keep_freed_memory() is False
