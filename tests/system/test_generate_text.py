"""``penstock generate``: streams, repeats itself by seed, and refuses what it cannot continue."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from penstock import cli
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.sampling import Sampling
from penstock.testing import reference
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from programs import penstock
from tiny_adapters import merged, written
from tiny_runs import config, make_store


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A run of a few updates, with checkpoints and a finished model."""
    folder = tmp_path_factory.mktemp("data")
    run = Run.create(config(make_store(folder), steps=30), folder / "run")
    assert train_to_the_end(run, silent)
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process: its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penstock", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, errors = capsys.readouterr()
        return exit.value.code or 0, out, errors

    return run


def wanted(model: Path, prompt: str, options: Sampling) -> str:
    """What the reference says."""
    decoder, tokenizer = hub.load(model).eval(), hub.load_tokenizer(model)
    stop = frozenset({tokenizer.eos_token_id})
    tokens = reference.sample(decoder, tokenizer(prompt)["input_ids"], options, stop)
    return f"{prompt}{tokenizer.backend_tokenizer.decode(tokens)}\n"


def test_the_text_is_that_of_the_reference(model, command):
    arguments = [model, "--prompt", "def f(", "-n", 20, "-t", 0.8, "--top-k", 50, "--top-p", 0.9, "--seed", 4]
    options = Sampling(temperature=0.8, top_k=50, top_p=0.9, max_tokens=20, seed=4)
    assert command(*arguments) == (0, wanted(model, "def f(", options), "")


def test_on_a_cpu_a_model_in_bf16_computes_in_fp32(model, tmp_path, command, monkeypatch):
    """Products in bf16 are up to a hundred times slower on processors without instructions for them."""
    hub.save(hub.load(model).to(torch.bfloat16), tmp_path / "stored")
    hub.load_tokenizer(model).save_pretrained(tmp_path / "stored")
    loaded, load = [], hub.load_for_inference
    monkeypatch.setattr(
        hub, "load_for_inference", lambda *given, **named: loaded.append(load(*given, **named)) or loaded[-1]
    )
    assert command(tmp_path / "stored", "--prompt", "def f(", "-n", 2, "--device", "cpu")[0] == 0
    assert {parameter.dtype for parameter in loaded[0].parameters()} == {torch.float32}


def test_any_folder_with_a_model_will_do(model, command):
    """A run, its finished model, or a checkpoint."""
    texts = {
        command(path, "-p", "import", "-n", 9, "-t", 0)[1]
        for path in (model, model / "model", model / "checkpoints" / "step-00000030")
    }
    assert texts == {wanted(model, "import", Sampling(temperature=0, max_tokens=9))}


def test_prompts_from_files_and_pipes(model, command, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text("-")
    status, from_file, _ = command(model, "--prompt-file", tmp_path / "prompt", "-n", 5)
    assert (status, from_file) == (0, wanted(model, "-", Sampling(temperature=0.7, top_p=0.95, max_tokens=5)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("import é"))
    status, from_pipe, _ = command(model, "--prompt", "-", "-n", 5)
    assert (status, from_pipe) == (0, wanted(model, "import é", Sampling(temperature=0.7, top_p=0.95, max_tokens=5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text to continue with --prompt or --prompt-file"),
        (["-p", "a", "--prompt-file", "b"], "give the text to continue with --prompt or --prompt-file"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "x = 1; " * 99], "tokens, and a sequence can have 64"),
        (["--prompt-file", "nowhere"], "cannot read nowhere: No such file"),
        (["--prompt-file", "binary"], "binary is not UTF-8 text"),
        (["-p", "a", "-t", "-1"], "temperature: Input should be greater than or equal to 0"),
        (["-p", "a", "-t", "nan"], "temperature: "),
        (["-p", "a", "--top-k", "0"], "top_k: Input should be greater than or equal to 1"),
        (["-p", "a", "--top-p", "0"], "top_p: Input should be greater than 0"),
        (["-p", "a", "--top-p", "1.5"], "top_p: Input should be less than or equal to 1"),
        (["-p", "a", "--min-p", "2"], "min_p: Input should be less than or equal to 1"),
        (["-p", "a", "-n", "0"], "max_tokens: Input should be greater than or equal to 1"),
        (["-p", "a", "--kv", "shadw"], "did you mean 'shadow'"),
        (["-p", "a", "--controller", "fixed"], "nothing drafts: set draft=ngram"),
        (["-p", "a", "--adapter", "sql"], "cannot read --adapter 'sql'"),
        (["-p", "a", "--device", "cuda:99"], "CUDA device"),
        (["-p", "a", "--device", "abacus"], "there is no device called 'abacus'"),
    ],
)
def test_a_refusal_comes_before_any_text(model, command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff")
    status, out, errors = command(model, *arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors


@pytest.mark.parametrize(
    ("source", "message"), [("nowhere", "there is no model 'nowhere'"), (".", "there is no model")]
)
def test_a_model_that_is_not_there(command, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    status, out, errors = command(source, "-p", "a")
    assert (status, out) == (2, "")
    assert errors.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "options",
    [
        ["--draft", "ngram", "--set", "draft.tokens=3"],
        ["--kv", "snapkv", "--kv-budget", "40", "--kv-codec", "plain"],
        ["--resident-weights", "1GB"],
        ["--deterministic"],
    ],
)
def test_options_of_the_engine_that_leave_the_text_as_it_is(model, command, options):
    arguments = [model, "--prompt", "def f(", "-n", 20, "-t", 0, *options]
    assert command(*arguments) == (0, wanted(model, "def f(", Sampling(temperature=0, max_tokens=20)), "")


def test_an_adapter_continues_the_prompt(model, command, tmp_path):
    decoder = hub.load(model).eval()
    folders = [written(tmp_path / name, decoder, seed) for seed, name in enumerate(("a", "b"))]
    hub.save(merged(decoder, folders[0]), tmp_path / "merged")
    hub.load_tokenizer(model).save_pretrained(tmp_path / "merged")
    prompt = [model, "--prompt", "def f(", "-n", 12, "-t", 0]
    told = command(*prompt, "--adapter", f"a={folders[0]}")
    assert told == (0, wanted(tmp_path / "merged", "def f(", Sampling(temperature=0, max_tokens=12)), "")
    assert told[1] != command(*prompt)[1]
    both = [f"--adapter={name}={folder}" for name, folder in zip("ab", folders, strict=True)]
    assert "continued by one adapter" in command(*prompt, *both)[2]


def test_as_a_process(model):
    """The same, seen from outside."""
    done = penstock("generate", model, "--prompt", "class", "-n", 6, "-t", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == wanted(model, "class", Sampling(temperature=0, max_tokens=6))
