"""The commands that the documents print: each is read by the programs' own parsers, and each runs, at a small size."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import typer

from penstock.cli import build_app
from penstock.models import hub
from printed_commands import PROGRAMS, ROOT, Command, blocks, inline
from programs import ENVIRONMENT, Program
from tiny_chats import make_chat_model, turns, write_lines
from tiny_runs import MODEL, make_corpus, write_config

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


@functools.cache
def program() -> click.Group:
    """``penstock`` with all its verbs."""
    return typer.main.get_command(build_app())


def parse_penstock(words: list[str]) -> None:
    """Reads a command line of penstock down to its verb, without running anything."""
    command: click.Command = program()
    while isinstance(command, click.Group) and words:
        with command.make_context(command.name, words, resilient_parsing=True) as context:
            rest = [*context.protected_args, *context.args] if hasattr(context, "protected_args") else context.args
            _, command, words = command.resolve_command(context, rest)
    with contextlib.suppress(click.exceptions.Exit, typer.Exit):  # --help and --version are answered at once
        command.make_context(command.name, words).close()


def parse_torchrun(words: list[str]) -> list[str]:
    """What torchrun passes on to penstock."""
    from torch.distributed.run import parse_args

    read = parse_args(words)
    assert (read.module, read.training_script) == (True, "penstock")
    return read.training_script_args


def parse(words: list[str]) -> None:
    if words[0] == "torchrun":
        passed_on = parse_torchrun(words[1:])
        assert words[-len(passed_on) :] == passed_on  # to the last word: torchrun has kept none for itself
        parse_penstock(passed_on)
    elif words[0] == "penstock":
        parse_penstock(words[1:])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif "-d" in words:
        assert isinstance(json.loads(words[words.index("-d") + 1]), dict)


@pytest.mark.parametrize("command", [*blocks(), *inline()], ids=str)
def test_a_printed_command_is_read_by_its_parser(command):
    assert command.words[0] in PROGRAMS
    parse([word.removesuffix("...") for word in command.words if word != "..."])


def test_no_option_of_train_is_one_of_torchrun():
    """Whose parser takes any beginning of its own options for one, wherever it stands."""
    train = program().commands["train"]
    names = {name for parameter in train.params for name in parameter.opts if name.startswith("-")}
    assert {"--out", "--set", "--resume"} <= names
    for name in sorted(names):
        assert parse_torchrun(["--nproc-per-node", "2", "-m", "penstock", "train", name, "x"]) == ["train", name, "x"]


# What the documents take for granted: a configuration, texts, a model of one's own, finished runs.

SMALL_DATA = "data={corpus={name='folder',path='texts'},vocabulary=300,held_out=0.2}"
SMALL_CHATS = ["steps=2", "epochs=none", "compile=false", "batch={tokens=256,micro_tokens=128,stages=[{length=64}]}"]
SMALL = {
    ("train", "--preset", "demo"): ["--set", SMALL_DATA, "--set", "compile=false", "--set", "minutes=0.02"],
    **{
        ("train", "--preset", name): [word for each in SMALL_CHATS for word in ("--set", each)]
        for name in ("sft", "dpo", "kto", "distill", "reward")
    },
    ("train", "--resume"): ["--set", "minutes=0.02"],
    ("data", "build"): ["--held-out", "0.2"],
}
#: These need a GPU, minutes, the hub, a name of one's own, or the answer of another command; they are only parsed.
NOT_HERE = ("cuda", "MODEL", "|", "trace.json", "runs/first/pipeline.json", "Qwen/Qwen3-8B")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with all of that."""
    folder = tmp_path_factory.mktemp("documents")
    make_corpus(folder / "texts")
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shutil.copytree(hub.BOXED / "python-1m", folder / "path" / "to" / "model")
    tokenizer = folder / "path" / "to" / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "</s>"))
    question = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}}
    (folder / "in.jsonl").write_text(json.dumps(question) + "\n")
    problem = {"id": "1", "prompt": "def add(a, b):", "tests": ["assert add(1, 2) == 3"]}
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    for name in ("chat", "large"):
        make_chat_model(folder / "path" / "to" / name)
    asked = [turns(f"what is {number}?", f"{number} is a word") for number in range(20)]
    write_lines(folder / "chats.jsonl", [{"messages": each} for each in asked])
    pairs = [{"prompt": each[:1], "chosen": each[1:], "rejected": turns("", "a word")[1:]} for each in asked]
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "ratings.jsonl", [{"messages": each, "label": bool(i % 2)} for i, each in enumerate(asked)])
    write_lines(folder / "questions.jsonl", [{"id": "1", "messages": asked[0][:1]}])
    (folder / "score.py").write_text("def score(problem, text):\n    return float('return' in text)\n")
    data = {"corpus": {"name": "folder", "path": "texts"}, "vocabulary": 300, "held_out": 0.2, "store": "store"}
    model = {**MODEL, "layers": 8, "heads": 8, "kv_heads": 8, "vocabulary": 300}
    batch = {"tokens": 1024, "micro_tokens": 128, "stages": [{"length": 32}]}
    write_config(folder / "my.toml", folder, model=model, data=data, batch=batch, steps=2)
    return folder


def shrunk(words: list[str]) -> list[str]:
    """The command with options, and a model to start from, that make it small."""
    words = [word.replace("start_from=smollm2", "start_from=path/to/chat") for word in words]
    if "sft" in words and not any(word.startswith("start_from=") for word in words):
        words = [*words, "--set", "start_from=path/to/chat"]
    more = [option for verb, options in SMALL.items() if set(verb) <= set(words) for option in options]
    if words[0] == "torchrun":
        return [TORCHRUN, "--standalone", *words[1:], *more]  # on a port that is free
    return [sys.executable, "-m", *words, *more]


def run(words: list[str], place: Path) -> None:
    done = subprocess.run(words, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr


def torchrun(*arguments: str) -> None:
    """What a process runs that is ``torchrun``."""
    from torch.distributed.run import main

    main(arguments)


def test_two_processes_train_as_printed(place):
    """With torchrun itself; the documents' eight processes are for ``-m slow``."""
    printed = next(c.words for c in blocks() if c.words[0] == "torchrun" and "--out" in c.words)
    two = ["2" if word == "8" else word for word in printed]
    words = shrunk([word.replace("runs/third", "runs/two") for word in two])
    done = Program(torchrun, *words[1:], folder=place).completed()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads((place / "runs" / "two" / "summary.json").read_text())["steps"] == 2


def of(document: str) -> list[Command]:
    """The commands of a document that can be run here; what asks a server that cannot be cannot be either."""
    found: list[Command] = []
    asked = True
    for command in (each for each in blocks() if each.document == document):
        here = not any(word in command.words for word in NOT_HERE)
        if command.words[:2] == ["penstock", "serve"]:
            asked = here
        if here and (asked or command.words[0] != "curl"):
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", sorted({command.document for command in blocks()}))
def test_the_commands_of_a_document_run_in_their_order(place, tmp_path, document):
    place = shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("runs", "store"))
    served = None
    try:
        for words in (command.words for command in of(document)):
            if words[0] == "make":
                continue  # this suite, and a demonstration that has tests of its own
            for given in ("runs/train", "runs/third") if words[0] == "torchrun" else ():
                shutil.rmtree(place / given, ignore_errors=True)
            _provide(words, place)
            if words[:2] == ["penstock", "serve"]:
                stop_server(served)
                served = start_server(words, place)
            elif words[0] == "curl":
                run(["curl", "--fail", "--silent", "--show-error", *words[1:]], place)
            else:
                run(shrunk(words), place)
    finally:
        stop_server(served)


def _provide(words: list[str], place: Path) -> None:
    """Makes what a command takes for granted and no command before it has made."""
    for folder in ("runs/demo", "runs/first"):
        if folder in words and not (place / folder).exists() and "--out" not in words:
            shutil.copytree(hub.BOXED / "python-1m", place / folder / "model")
    if "--costs" in words:
        described = re.search(r'`(\{"forward".*?\})`', (ROOT / "docs" / "pipeline.md").read_text(), re.DOTALL)
        assert described is not None
        (place / "costs.json").write_text(described[1])
    shutil.rmtree(place / "runs" / "train", ignore_errors=True)


def start_server(words: list[str], place: Path) -> subprocess.Popen[str]:
    told = words[: words.index("2>")] if "2>" in words else words  # the rest is the shell's
    process = subprocess.Popen(
        [sys.executable, "-m", *told],
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until, said = time.monotonic() + 120, ""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Try:"):
            return process
        said += line
        assert time.monotonic() < until
    raise AssertionError(f"the server ended before it had begun:\n{said}")


def stop_server(process: subprocess.Popen[str] | None) -> None:
    if process is not None:
        process.terminate()
        process.communicate(timeout=60)
