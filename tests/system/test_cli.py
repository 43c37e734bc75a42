"""The command line as people meet it: real processes, exit codes, help, and how fast it answers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from penstock.cli import build_app, main
from programs import in_a_shell

VERBS = sorted(command.name or command.callback.__name__ for command in build_app().registered_commands)
GROUPED = [
    (group.name, command.name or command.callback.__name__.replace("_", "-"))
    for group in build_app().registered_groups
    for command in group.typer_instance.registered_commands
]
MADE_VERB = '''
"""A verb of a test."""

def made(how: str) -> None:
    """Fails as it is told. Example: `penstock made crash`"""
    import time
    from penstock.core.errors import PenstockError, UsageError

    match how:
        case "fail":
            raise PenstockError("the disk is on fire", hint="Call someone.")
        case "misuse":
            raise UsageError("there is no such thing")
        case "crash":
            raise RuntimeError("a defect")
        case "sleep":
            print("asleep", flush=True)
            time.sleep(60)
        case "talk":
            for _ in range(100_000):
                print("a line of some length")
'''


@pytest.fixture
def made(tmp_path):
    """The command line of a penstock with one more verb, which fails on request."""
    (tmp_path / "made.py").write_text(MADE_VERB)
    script = f"import penstock.cli as cli; cli.__path__.append({str(tmp_path)!r}); cli.main()"
    return [sys.executable, "-c", script, "made"]


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("fail", 1, "error: the disk is on fire\nCall someone.\n"),
        ("misuse", 2, "error: there is no such thing\n"),
    ],
)
def test_an_error_for_people_has_a_message_and_no_traceback(made, how, code, message):
    done = subprocess.run([*made, how], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)


def test_a_defect_keeps_its_traceback(made):
    done = subprocess.run([*made, "crash"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: a defect\n")


def test_interrupting_is_answered_with_130(made):
    # A process that a shell starts in the background ignores SIGINT, and hands that on; undo it for the child.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        [made[0], made[1], restore + made[2], *made[3:], "sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_is_no_traceback(made):
    process = subprocess.Popen([*made, "talk"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.wait(timeout=100)
    assert "Traceback" not in errors


def test_a_malformed_command_line_is_usage_in_a_shell():
    done = in_a_shell("nonsense")
    assert done.returncode == 2
    assert "Usage: penstock" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process: its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("arguments", [[], ["--nonsense"], ["papers", "three"], ["papers", "--nonsense"]])
def test_a_malformed_command_line_is_usage(command, arguments):
    code, out, errors = command(*arguments)
    assert code == 2
    assert "Usage: penstock" in out + errors


@pytest.mark.parametrize(
    "arguments", [["papers", "99999"], ["papers", "--family", "x"], ["bench", "no-such-thing"], ["serve", "nowhere"]]
)
def test_wrong_requests_exit_with_2(command, arguments):
    code, _, errors = command(*arguments)
    assert code == 2
    assert re.search("^error: there is no ", errors, re.MULTILINE)


def test_version():
    from penstock import __version__

    assert in_a_shell("--version").stdout == f"penstock {__version__}\n"


def test_help_lists_every_verb():
    done = in_a_shell("--help")
    assert done.returncode == 0
    assert {"papers", "bench"} <= set(VERBS)
    for verb in (*VERBS, *(group for group, _ in GROUPED)):
        assert f"│ {verb} " in done.stdout


@pytest.mark.parametrize("verb", [(verb,) for verb in VERBS] + GROUPED, ids=" ".join)
def test_the_help_of_every_verb_has_an_example(verb):
    done = CliRunner().invoke(build_app(), [*verb, "--help"], env={"COLUMNS": "120"}, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Example" in done.output


@pytest.mark.parametrize("arguments", [["--help"], ["papers", "--planned"]])
def test_start_up_is_quick(arguments):
    """What it imports says how long it takes: no more modules than 400, a third of what numpy and torch bring."""
    script = (
        "import sys; from penstock.cli import build_app; build_app()(sys.argv[1:], standalone_mode=False); "
        "print(len(sys.modules), sorted({'numpy', 'torch', 'transformers', 'matplotlib'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    assert heavy == "[]"
    assert int(modules) < 400
