"""The progress bar: silent where nobody looks and where work is short."""

import io

import pytest
from rich.console import Console

from transmamba import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal on stderr would show."""
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=80))
    return shown


def test_short_work_shows_nothing(terminal: io.StringIO) -> None:
    with progress.progress_bar("Reading", total=2) as advance:
        advance(1)
    assert terminal.getvalue() == ""


def test_long_work_shows_how_far_it_is(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_SHOWN", -1.0)
    with progress.progress_bar("Reading", total=4) as advance:
        advance(1)
    assert "Reading" in terminal.getvalue()
    assert "25%" in terminal.getvalue()


def test_nothing_is_shown_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BEFORE_SHOWN", -1.0)
    with progress.progress_bar("Reading", total=1) as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_work_of_unknown_length_is_named(terminal: io.StringIO) -> None:
    with progress.working("Asking"):
        pass
    assert "Asking" in terminal.getvalue()


def test_work_of_unknown_length_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.working("Asking"):
        pass
    assert capfd.readouterr() == ("", "")
