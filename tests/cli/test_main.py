"""The command line: its verbs and flags, its exit codes, its errors, and how little it imports."""

import errno
import subprocess
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import get_type_hints

import pytest
import typer

from tests.helpers import ROOT
from transmamba._version import __version__
from transmamba.cli import main as command_line
from transmamba.cli.main import VERBS, load_verb, main
from transmamba.errors import RecipeError

# Every verb, with its arguments and flags. A flag names an input, an output or a device; the rest is the recipe's.
FLAGS = {
    "adapt": {
        "--data",
        "--device",
        "--dry-run",
        "--output",
        "--recipe",
        "--resume",
        "--set",
        "--student",
        "--task",
        "--teacher",
    },
    "bench": {"WHAT", "--device", "--output", "--set"},
    "convert": {
        "SOURCE",
        "OUT",
        "--calibration",
        "--device",
        "--dry-run",
        "--initialisation",
        "--schedule",
        "--seq-len",
    },
    "distill": {
        "--data",
        "--device",
        "--output",
        "--recipe",
        "--resume",
        "--schedule",
        "--set",
        "--student",
        "--teacher",
        "--tokens",
    },
    "doctor": {"--device"},
    "evaluate": {
        "CHECKPOINT",
        "--batch-size",
        "--captions",
        "--device",
        "--json",
        "--limit",
        "--num-fewshot",
        "--seq-len",
        "--task-folder",
        "--tasks",
        "--text",
        "--trans-points",
    },
    "generate": {
        "CHECKPOINT",
        "--device",
        "--mark",
        "--max-new-tokens",
        "--no-mark",
        "--prompt",
        "--seed",
        "--temperature",
        "--top-p",
        "--trans-points",
    },
    "quickstart": {"--device", "--output", "--seed", "--smoke", "--vision"},
    "record": {"TEACHER", "OUT", "--data", "--device", "--set", "--tokens"},
    "report": {"STUDENT", "--against", "--device", "--output", "--set", "--text"},
    "schedule": {"SCHEDULE", "--config", "--figure", "--layers", "--seq-len"},
    "train": {"RECIPE", "--device", "--output", "--resume", "--set", "--text", "--tokenizer"},
}


def flags_of(verb: str) -> set[str]:
    app = typer.Typer(add_completion=False)
    app.command()(load_verb(verb))
    parameters = typer.main.get_command(app).params
    options = {flag for p in parameters if p.param_type_name == "option" for flag in [*p.opts, *p.secondary_opts]}
    arguments = {p.name.upper() for p in parameters if p.param_type_name == "argument"}
    return options - {"--help"} | arguments


def test_verbs_are_pinned() -> None:
    assert set(FLAGS) == set(VERBS)


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_flags_are_pinned(verb: str) -> None:
    assert flags_of(verb) == FLAGS[verb]


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_every_flag_has_help_and_every_verb_a_first_line(verb: str) -> None:
    function = load_verb(verb)
    assert function.__doc__.partition("\n")[0].endswith(".")
    for name, hint in get_type_hints(function, include_extras=True).items():
        if name != "return":
            assert any(getattr(note, "help", None) for note in hint.__metadata__), name
    assert all(p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in signature(function).parameters.values())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"]], ids=str)
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        f"sys.argv = ['/usr/bin/transmamba', *{arguments}]\n"  # as the installed script sets it
        "from transmamba.cli.main import main\n"
        "main()\n"
        "print('LOADED', {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert done.stdout.splitlines()[-1] == "LOADED set()"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f" {verb} ") >= 3 for verb in VERBS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"transmamba {__version__}\n"


def test_python_dash_m_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transmamba", "--version"], capture_output=True, text=True, cwd=ROOT / "src", check=True
    )
    assert done.stdout == f"transmamba {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["docter"], "Error: No such command 'docter'. Did you mean 'doctor'? See transmamba --help.\n"),
        (["doctor", "--devise", "cpu"], "--devise"),
        (["doctor", "--device"], "--device"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_a_word_out_of_place_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Return a function that puts another in the place of the verb doctor."""

    def replace(function: Callable[[], None]) -> None:
        monkeypatch.setattr(command_line, "load_verb", lambda _: function)

    monkeypatch.delenv("TRANSMAMBA_DEBUG", raising=False)
    return replace


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


LONG = "x" * 300


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RecipeError("steps=0 must be at least 1."), "Error: steps=0 must be at least 1.\n"),
        (RecipeError("two\n  lines [bold]and[/bold] brackets"), "Error: two lines [bold]and[/bold] brackets\n"),
        (RecipeError(LONG), f"Error: {LONG}\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            "Error: a.txt: No such file or directory\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "Error: No space left on device\n"),
        (OSError("no model at x"), "Error: no model at x\n"),
        (ModuleNotFoundError("pip install 'transmamba[peft]'"), "Error: pip install 'transmamba[peft]'\n"),
        (RecipeError(), "Error: RecipeError\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_mistake_is_one_line_and_code_2(verb, capsys: pytest.CaptureFixture[str], error, line) -> None:
    verb(raising(error))
    assert main(["doctor"]) == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]], ids=str)
def test_debug_shows_the_trace_before_the_line(verb, capsys: pytest.CaptureFixture[str], arguments) -> None:
    verb(raising(RecipeError("steps=0")))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("Error: steps=0\n")


def test_debug_comes_from_the_environment_too(verb, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    verb(raising(RecipeError("steps=0")))
    monkeypatch.setenv("TRANSMAMBA_DEBUG", "1")
    assert main(["doctor"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_code_130(verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted"


def test_an_interrupt_while_a_verb_is_imported_is_code_130(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "load_verb", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted"


def test_a_fault_of_ours_is_not_hidden(verb) -> None:
    verb(raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        main(["doctor"])


def test_exit_codes_of_verbs_are_passed_on(verb) -> None:
    verb(raising(typer.Exit(1)))
    assert main(["doctor"]) == 1


def test_words_after_two_dashes_are_left_to_the_verb(verb, capsys: pytest.CaptureFixture[str]) -> None:
    def show(word: str) -> None:
        typer.echo(word)

    verb(show)
    assert main(["doctor", "--", "--debug"]) == 0
    assert capsys.readouterr().out == "--debug\n"


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("transmamba")
    if not script.exists():
        pytest.skip(f"transmamba is not installed beside {sys.executable}")
    done = subprocess.run([script, "doctr"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: No such command 'doctr'.")


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [(["--device", "cpu"], 1), (["--device", "cpu:0"], 1), (["--device", "cuda"], 0), (["--device", "auto"], 2)],
)
def test_verbs_on_a_cpu_keep_the_memory_they_free(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], kept: int
) -> None:
    import torch

    calls: list[int] = []
    seen: list[str] = []

    def doctor(device: str = "auto") -> None:
        seen.append(device)

    monkeypatch.setattr(command_line, "load_verb", lambda name: doctor)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: calls.append(1))
    assert main(["doctor", *arguments]) == 0
    assert seen == arguments[1:]
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert len(calls) == (kept if kept < 2 else int(not has_gpu))


def test_a_verb_without_a_device_does_not_ask_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "load_verb", lambda name: lambda: None)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: pytest.fail("asked"))
    assert main(["schedule"]) == 0
